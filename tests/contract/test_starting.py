"""Starting as the platform's agent starts it: what is not essential may fail, and an end is one.

Each start is a process of its own, run like ``entrypoint`` of config.json in production mode; that
onto a port that is taken imports everything itself.
"""

from __future__ import annotations

import json
import logging
import socket
import sys

import pytest
import requests
from app_server import SDK_ENVIRONMENT, AppServer, page_command
from platform_double import TASK_ID, TOKEN, PlatformDouble

from serve.process import ServerErrors

OPTIONAL = [
    "tasks.info",
    "tasks.data.set",
    "tasks.app-v2.data.set",
    "tasks.meta.update",
    "instance.version",
    "file-storage.list",
    "file-storage.bulk.upload",
]
DEMO = {"model_name": "demo", "model_files": {"checkpoint": "demo"}}
DEPLOYED_BEFORE = {
    "model_source": "Pretrained models",
    "model_files": DEMO["model_files"],
    "model_info": {"Model": "demo", "meta": {**DEMO, "task_type": "prompt-based object detection"}},
    "device": "cpu",
    "runtime": "PyTorch",
}


@pytest.fixture
def own_platform():
    """A double that only this test breaks."""
    double = PlatformDouble()
    double.start()
    yield double
    double.stop()


def production(address: str) -> dict[str, str]:
    return {
        **SDK_ENVIRONMENT,
        "SERVER_ADDRESS": address,
        "API_TOKEN": TOKEN,
        "TASK_ID": str(TASK_ID),
        "TEAM_ID": "3",
        "WORKSPACE_ID": "5",
        "ENV": "production",
        "APP_NAME": "Serve Florence-2",
    }


def ended(app: AppServer) -> tuple[int, str, dict]:
    """The exit status, the log, and the message of its last line, of a start that does not last."""
    app.launch()
    try:
        status = app.ended(120)
    finally:
        app.kill()
    return status, app.log, json.loads(app.log.splitlines()[-1])


def test_calls_that_are_not_essential_may_all_fail(own_platform, tmp_path):
    for method in OPTIONAL:
        own_platform.faults.fail(method, times=1000, status=404)
    own_platform.state.task_fields["autoRestartInfo"] = {"deployParams": DEPLOYED_BEFORE}
    env = {**production(own_platform.address), "NVIDIA_VISIBLE_DEVICES": "all"}
    app = AppServer(tmp_path, env, page_command, is_forked=True)
    app.start()
    info = requests.post(f"{app.url}/get_session_info", json={}, timeout=60).json()
    app.stop()
    assert own_platform.count("tasks.info") > 0
    assert "did not say whether to deploy a model by itself" in app.log
    # The image always asks for GPUs, and this start finds none.
    assert "NVIDIA_VISIBLE_DEVICES=all" in info["device_warning"]
    assert info["device"] == "cpu"
    warned = [json.loads(line) for line in app.log.splitlines() if "runs on the CPU" in line]
    assert [(line["level"], line["message"]) for line in warned] == [
        ("warn", info["device_warning"])
    ]


def failing_late(port: int) -> list[str]:
    """Fails once the SDK's threads run, in a part of it that nobody expects to fail."""
    program = (
        "import sys, uvicorn, supervisely.nn.inference.inference as sdk\n"
        "def fail(): raise RuntimeError('the card\\nfell off')\n"
        "sdk.get_gpu_count = fail\n"
        "sys.argv = sys.argv[:1] + sys.argv[2:]\n"
        "uvicorn.main(sys.argv[1:])\n"
    )
    return [sys.executable, "-c", program, *page_command(port)[2:]]


FAILURES = {
    "a task that is no number": ({"TASK_ID": "none"}, page_command, "none"),
    "an error once the SDK's threads run": (
        {"AUTOSTART": "true"},
        failing_late,
        "RuntimeError: the card fell off",
    ),
}


@pytest.mark.parametrize(("env", "command", "reason"), FAILURES.values(), ids=FAILURES.keys())
def test_whatever_ends_a_start_ends_the_process_with_a_sentence(
    own_platform, tmp_path, env, command, reason
):
    env = {**production(own_platform.address), **env}
    status, log, last = ended(AppServer(tmp_path, env, command, is_forked=True))
    assert status == 2, log
    assert last["level"] == "fatal"
    assert last["message"].startswith("The app could not start because of something unexpected (")
    assert reason in last["message"]
    assert "Traceback" in log


def test_a_port_that_is_taken_ends_the_process_with_a_sentence(own_platform, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        env = production(own_platform.address)
        status, log, last = ended(AppServer(tmp_path, env, lambda _: page_command(port)))
    assert status == 2, log
    assert "its server did not" in last["message"]
    assert "address already in use" in last["message"]


def test_an_error_about_a_request_is_no_failed_start():
    server = ServerErrors()
    for message in ("ASGI callable returned without sending handshake.", "Exception in ASGI app"):
        server.emit(logging.makeLogRecord({"msg": message, "levelno": logging.ERROR}))
    assert server.text is None
    server.emit(logging.makeLogRecord({"msg": OSError(98, "address already in use")}))
    assert "address already in use" in server.text

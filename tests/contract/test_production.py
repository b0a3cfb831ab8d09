"""A session on the platform from its start to its end, in production mode.

One process is started as the agent starts it, deploys by itself, is given a fine-tune, and is
ended; a second one is the same session, started again.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import psutil
import pytest
import requests
from app_server import AppServer
from platform_double import TASK_ID, TOKEN, PlatformDouble
from platform_methods import METHODS
from platform_seed import seed
from platform_state import TEAM_ID
from production_app import (
    AUTOSTART,
    entrypoint,
    hub_environment,
    production_environment,
    published_checkpoints,
)

from serve.platform.run_store import CUSTOM_DATA_KEY
from serve.platform.team_files import upload_experiment
from serve.sdk import sly

UPLOAD_THAT_STALLS = (
    b"POST /inference_image HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n"
    b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x"
)
SOON_S = 20.0


@pytest.fixture(scope="module")
def own_platform() -> Iterator[PlatformDouble]:
    """One that keeps what its session leaves, for the next one."""
    double = PlatformDouble()
    double.start()
    yield double
    double.stop()


@pytest.fixture(scope="module")
def fine_tune(own_platform, experiment) -> str:
    """Its path in the team files."""
    api = sly.Api(own_platform.address, TOKEN, retry_count=1)
    return upload_experiment(api, TEAM_ID, experiment)


@pytest.fixture(scope="module")
def session(own_platform, fine_tune, tmp_path_factory) -> Iterator[AppServer]:
    """It deploys large by itself, from a hub."""
    folder = tmp_path_factory.mktemp("session")
    with published_checkpoints() as (hub, command):
        env = production_environment(own_platform.address, TOKEN, TASK_ID, **AUTOSTART)
        env |= hub_environment(hub, {"FLORENCE2_CACHE": str(folder / "cache")})
        app = AppServer(folder, env, command)
        app.start()
        own_platform.app_url = app.url
        yield app
        app.stop()


def post(app: AppServer, path: str, state: dict | None = None) -> dict:
    body = {"state": state or {}, "context": {}}
    answer = requests.post(f"{app.url}/{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def kept(platform: PlatformDouble) -> dict:
    return platform.state.task_fields["autoRestartInfo"]["deployParams"]


def eventually(is_so) -> bool:
    end_s = time.monotonic() + SOON_S
    while not is_so() and time.monotonic() < end_s:
        time.sleep(0.05)
    return is_so()


def texts(platform: PlatformDouble, kind: str) -> list[str]:
    """What the widgets of a kind say that the page shows."""
    widgets = platform.state.session.page_data.items()
    return [one["text"] for name, one in widgets if name.startswith(kind) and not one["hide"]]


def test_a_session_deploys_large_by_itself_and_notes_it_for_its_next_start(session, own_platform):
    assert post(session, "get_deploy_info")["checkpoint_name"] == "Florence-2-large"
    assert kept(own_platform)["model_files"] == {"checkpoint": "Florence-2-large"}
    assert kept(own_platform)["device"] == "cpu"
    assert eventually(lambda: "STOP AND CHOOSE ANOTHER MODEL" in texts(own_platform, "Button"))
    assert "SERVE" not in texts(own_platform, "Button")


def test_the_page_is_kept_for_when_the_session_has_ended(session, own_platform):
    assert eventually(lambda: "templateRootDirectory" in own_platform.state.session.meta)
    folder = own_platform.state.session.meta["templateRootDirectory"]
    page = own_platform.state.files[f"{folder}/index.html"].content.decode()
    assert '<div id="sly-app">' in page
    assert TOKEN not in page
    # What its widgets show is kept beside it.
    assert "Florence-2-large-ft" in json.dumps(own_platform.state.session.page_data)


def test_a_fine_tune_that_is_deployed_is_noted_and_shown_as_an_input(
    session, own_platform, fine_tune
):
    state = {"model_source": "Custom models", "model_files": {"checkpoint": fine_tune}}
    post(session, "deploy_from_api", {"deploy_params": {**state, "device": "cpu"}})
    assert kept(own_platform)["model_files"]["checkpoint"] == fine_tune
    [shown] = own_platform.state.session.inputs
    assert shown["id"] == fine_tune.rpartition("/")[0]


def test_everything_that_a_session_asks_of_the_platform_is_there(session, own_platform):
    of_the_double_itself = {"tasks.info", "tasks.request.direct"}
    asked = {call.method for call in own_platform.calls}
    assert asked - METHODS.keys() - of_the_double_itself == set()


def test_a_session_that_is_ended_stops_what_runs_and_answers_who_waits(session, own_platform):
    seeded = seed(own_platform)
    state = own_platform.state
    for number in range(300):
        image = state.image(seeded.image_ids["photo_table.jpg"])
        state.add_image(image.dataset_id, f"{number}.jpg", image.content)
    run = {"projectId": seeded.project_id, "upload_mode": "append", "batch_size": 4}
    settings = {"task_prompt": "<OD>", "num_beams": 1}
    post(session, "inference_project_id_async", {**run, "settings": settings})
    assert eventually(lambda: own_platform.count("annotations.bulk.add") > 1)
    with socket.create_connection(("127.0.0.1", session.port), SOON_S) as client:
        client.sendall(UPLOAD_THAT_STALLS)
        assert requests.post(f"{session.url}/sly/shutdown", json={}, timeout=60).ok
        answered = client.recv(4096).decode()
    assert answered.startswith("HTTP/1.1 503 ")
    assert "send it again to the session that comes next" in answered
    assert session.ended(SOON_S) == 0
    labeled = [image for image in state.images.values() if image.annotation["objects"]]
    assert 8 <= len(labeled) < 300
    assert "The run failed" not in session.log
    assert "Traceback" not in session.log
    [record] = state.projects[seeded.project_id].custom_data[CUSTOM_DATA_KEY].values()
    assert record["state"] == "stopped"


@pytest.fixture
def next_session(own_platform, fine_tune, tmp_path) -> Iterator[AppServer]:
    """The session after one that served the fine-tune, with nothing on its disk; on two devices."""
    noted = {"model_source": "Custom models", "model_files": {"checkpoint": fine_tune}}
    of_the_one_before = {"deployParams": {**noted, "device": "cpu", "runtime": "PyTorch"}}
    own_platform.state.task_fields.setdefault("autoRestartInfo", of_the_one_before)
    more = {**AUTOSTART, "FLORENCE_DEVICES": "cpu,cpu", "FLORENCE2_CACHE": str(tmp_path / "none")}
    env = production_environment(own_platform.address, TOKEN, TASK_ID, **more)
    app = AppServer(tmp_path, env, entrypoint)
    app.start()
    yield app
    app.stop()


@pytest.mark.slow
def test_a_session_that_is_started_again_has_its_model_and_leaves_no_process_when_it_is_killed(
    next_session, own_platform, fine_tune
):
    info = post(next_session, "get_deploy_info")
    assert info["custom_checkpoint_path"] == fine_tune
    assert kept(own_platform)["model_files"]["checkpoint"] == fine_tune
    process = psutil.Process(next_session.pid)
    assert eventually(lambda: process.children())
    workers = process.children(recursive=True)
    process.kill()
    _, alive = psutil.wait_procs(workers, timeout=SOON_S)
    assert alive == []

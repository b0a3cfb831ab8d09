"""Drives the app with its page and prints what happened as one line of JSON.

A program of its own: the SDK's page, states and server exist once per process. Run as
``python page_steps.py [autostart]``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(
    SERVER_ADDRESS="http://127.0.0.1:9",
    API_TOKEN="x" * 128,
    TEAM_ID="1",
    SUPERVISELY_SKIP_HTTPS_USER_HELPER_CHECK="true",
    SUPERVISELY_PUBLIC_API_RETRIES="1",
    HF_ENDPOINT="http://127.0.0.1:9",
)
if "autostart" in sys.argv:
    os.environ["AUTOSTART"] = "true"

from starlette.testclient import TestClient

from florence2.errors import FlorenceError
from serve import model_service
from serve.app import Florence2App
from serve.model_service import named_model, params_for
from serve.sdk import sly  # noqa: F401  (the SDK's modules are imported after this door)

# isort: split
from supervisely.nn.inference.inference import AutoRestartInfo

HERE = "http://127.0.0.1:8000"
BIKE = Path(__file__).parents[3] / "demo" / "images" / "scene_bike.png"
CALLERS = {
    "its own page": {"Origin": HERE},
    "the tunnel of its developer": {"Host": "10.8.0.7:8000"},
    "a page of others": {"Origin": "http://evil.example"},
    "a name that leads here": {"Host": "evil.example"},
}
GPU_IS_MISSING = "A GPU can be expected here."
seen: dict[str, object] = {}
model_service.missing_gpu = lambda: GPU_IS_MISSING
app = Florence2App(use_gui=True, use_serving_gui_template=True)


def pressing_serve_deploys() -> None:
    asked: list[dict] = []
    download, load = app._download_pretrained_model, app._load_model_headless
    app._download_pretrained_model = lambda files, *_: dict(files)
    app._load_model_headless = lambda **params: asked.append(params)
    app.gui.deploy_with_current_params()
    app.gui.change_model()
    app._download_pretrained_model, app._load_model_headless = download, load
    seen["served"] = {"files": asked[0]["model_files"], "device": asked[0]["device"]}


def pressing_serve_without_weights_says_why() -> None:
    try:
        app.gui.deploy_with_current_params()
    except FlorenceError as error:
        seen["refused"] = str(error)


def answers_before_and_after_deploying() -> None:
    form = {"files": ("a.png", BIKE.read_bytes())}
    with TestClient(app.app, HERE, raise_server_exceptions=False) as client:
        seen["before"] = [client.get("/is_ready").status_code]
        seen["before"] += [client.post("/inference_image", files=form).status_code]
        app._load_model_headless(**params_for(named_model("demo", app.pretrained_models), "cpu"))
        seen["after"] = [client.get("/is_ready").status_code]
        seen["after"] += [client.post("/inference_image", files=form).status_code]
        seen["session"] = client.post("/get_session_info", json={}).json()
        answer = client.post("/get_custom_inference_settings", json={}).json()
        seen["settings"] = answer["settings"]
        shown = [client.post(path, json={}).json() for path in ("/sly/data", "/sly/state")]
        seen["shown"] = "# What to ask" in json.dumps(shown)
        seen["warning"] = shown_warning()
        seen["callers"] = {
            name: client.post("/sly/session-info", json={}, headers=headers).status_code
            for name, headers in CALLERS.items()
        }
        client.post("/get_status", json={"state": {"polluted": True}})
        seen["polluted"] = "polluted" in client.post("/sly/state", json={}).json()


def shown_warning() -> str | None:
    """The sentence on the page about the device, if one is to be seen."""
    widget = app.gui.device_warning
    return None if widget.is_hidden() else widget.text


def pressing_stop_frees() -> None:
    for stop in app.gui.on_change_model_callbacks:
        stop(app.gui)
    seen["warning after stopping"] = shown_warning()
    seen["stopped"] = [app.deployment.is_deployed, app.is_model_deployed()]


def restarting_brings_the_model_back() -> None:
    loads: list[object] = []
    switch = app.deployment.switch
    app.deployment.switch = lambda choice: (loads.append(choice), switch(choice))[1]
    app.autorestart = AutoRestartInfo(params_for(named_model("demo", app.pretrained_models), "cpu"))
    app._deploy_on_autorestart()
    app.gui.is_starting = True
    app.gui.deploy_with_current_params()
    seen["restarted"] = {
        "deployed": app.is_model_deployed(),
        "name": app.deployment.current.model.name,
        "loads": len(loads),
    }


seen["gui"] = type(app.gui).__name__
seen["chosen"] = app.gui.model_name
seen["models"] = [row["meta"]["model_name"] for row in app.pretrained_models]
if "autostart" not in sys.argv:
    pressing_serve_deploys()
    pressing_serve_without_weights_says_why()
app.serve()
answers_before_and_after_deploying()
pressing_stop_frees()
restarting_brings_the_model_back()
sys.stdout.write("\n" + json.dumps(seen) + "\n")

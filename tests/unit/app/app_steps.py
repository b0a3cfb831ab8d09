"""Drives an app with its page or without, and prints what happened as one line of JSON.

A program of its own: the SDK's page, states and server exist once per process. Run as
``python app_steps.py page|autostart|quick|plain``; the last two are apps that a program makes.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

if sys.argv[1] in ("page", "autostart"):
    os.environ.update(
        SERVER_ADDRESS="http://127.0.0.1:9",
        API_TOKEN="x" * 128,
        TEAM_ID="1",
        SUPERVISELY_SKIP_HTTPS_USER_HELPER_CHECK="true",
        SUPERVISELY_PUBLIC_API_RETRIES="1",
        HF_ENDPOINT="http://127.0.0.1:9",
    )
if sys.argv[1] == "autostart":
    os.environ["AUTOSTART"] = "true"

import requests
from starlette.testclient import TestClient

from florence2.errors import FlorenceError
from serve import model_service
from serve.app import Florence2App
from serve.model_service import named_model, params_for
from serve.sdk import sly  # noqa: F401  (the SDK's modules are imported after this door)

# isort: split
from supervisely.nn.inference.inference import AutoRestartInfo

WAY = sys.argv[1]
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


def files() -> dict[str, tuple[str, bytes]]:
    return {"files": ("a.png", BIKE.read_bytes())}


def pressing_serve_deploys(app: Florence2App) -> None:
    asked: list[dict] = []
    download, load = app._download_pretrained_model, app._load_model_headless
    app._download_pretrained_model = lambda files, *_: dict(files)
    app._load_model_headless = lambda **params: asked.append(params)
    app.gui.runtime_choice.set_value("OpenVINO")
    app.gui.precision_choice.set_value("int8:all")
    app.gui.deploy_with_current_params()
    app.gui.change_model()
    app.gui.runtime_choice.set_value("auto")
    app.gui.precision_choice.set_value("auto")
    app._download_pretrained_model, app._load_model_headless = download, load
    named = ("model_files", "device", "runtime", "precision")
    seen["served"] = {name: asked[0][name] for name in named}


def pressing_serve_without_weights_says_why(app: Florence2App) -> None:
    try:
        app.gui.deploy_with_current_params()
    except FlorenceError as error:
        seen["refused"] = str(error)


def answers_before_and_after_deploying(app: Florence2App) -> None:
    with TestClient(app.app, HERE, raise_server_exceptions=False) as client:
        seen["before"] = [client.get("/is_ready").status_code]
        seen["before"] += [client.post("/inference_image", files=files()).status_code]
        app._load_model_headless(**params_for(named_model("demo", app.pretrained_models), "cpu"))
        seen["after"] = [client.get("/is_ready").status_code]
        seen["after"] += [client.post("/inference_image", files=files()).status_code]
        seen["session"] = client.post("/get_session_info", json={}).json()
        answer = client.post("/get_custom_inference_settings", json={}).json()
        seen["settings"] = answer["settings"]
        shown = [client.post(path, json={}).json() for path in ("/sly/data", "/sly/state")]
        seen["shown"] = "# What to ask" in json.dumps(shown)
        seen["warning"] = shown_warning(app)
        seen["callers"] = {
            name: client.post("/sly/session-info", json={}, headers=headers).status_code
            for name, headers in CALLERS.items()
        }
        client.post("/get_status", json={"state": {"polluted": True}})
        seen["polluted"] = "polluted" in client.post("/sly/state", json={}).json()


def shown_warning(app: Florence2App) -> str | None:
    """The sentence on the page about the device, if one is to be seen."""
    widget = app.gui.device_warning
    return None if widget.is_hidden() else widget.text


def pressing_stop_frees(app: Florence2App) -> None:
    for stop in app.gui.on_change_model_callbacks:
        stop(app.gui)
    seen["warning after stopping"] = shown_warning(app)
    seen["stopped"] = [app.deployment.is_deployed, app.is_model_deployed()]


def restarting_brings_the_model_back(app: Florence2App) -> None:
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


def page() -> dict[str, object]:
    model_service.missing_gpu = lambda: GPU_IS_MISSING
    app = Florence2App(use_gui=True, use_serving_gui_template=True)
    seen["gui"] = type(app.gui).__name__
    seen["chosen"] = app.gui.model_name
    seen["models"] = [row["meta"]["model_name"] for row in app.pretrained_models]
    if WAY == "page":
        pressing_serve_deploys(app)
        pressing_serve_without_weights_says_why(app)
    app.serve()
    answers_before_and_after_deploying(app)
    pressing_stop_frees(app)
    restarting_brings_the_model_back(app)
    return seen


def plain() -> dict[str, object]:
    """No model at first; one is deployed by a request."""
    app = Florence2App(use_gui=False)
    app.serve()
    state = {"deploy_params": {"device": "cpu"}, "model_name": "Florence-2-base"}
    with TestClient(app.app, HERE, raise_server_exceptions=False) as client:
        first = client.get("/is_ready").status_code
        refused = client.post("/deploy_from_api", json={"state": state}).json()["message"]
        app._deploy_headless("demo")
        ready = client.get("/is_ready").status_code
        labels = client.post("/inference_image", files=files())
    return {
        "first": first,
        "refused": refused,
        "ready": ready,
        "labels": len(labels.json()["annotation"]["objects"]),
        "device": app.device,
    }


def quick() -> dict[str, object]:
    """A model by name, answering on a port at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ["FLORENCE_PORT"] = str(port)
    app = Florence2App(model="demo")
    answer = requests.post(f"http://127.0.0.1:{port}/inference_image", files=files(), timeout=60)
    info = requests.post(f"http://127.0.0.1:{port}/get_deploy_info", json={}, timeout=60).json()
    return {
        "labels": len(answer.json()["annotation"]["objects"]),
        "model": info["model_name"],
        "precision": info["model_precision"],
        "device": app.device,
    }


STEPS = {"page": page, "autostart": page, "quick": quick, "plain": plain}
sys.stdout.write("\n" + json.dumps(STEPS[WAY]()) + "\n")
sys.stdout.flush()
os._exit(0)

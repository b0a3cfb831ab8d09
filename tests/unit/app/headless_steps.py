"""Drives the app that a program makes itself, without a page; prints one line of JSON.

Run as ``python headless_steps.py quick|plain``; a program of its own, as the SDK's server is one
per process.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import requests
from starlette.testclient import TestClient

from serve.app import Florence2App

HERE = "http://127.0.0.1:8000"
BIKE = Path(__file__).parents[3] / "demo" / "images" / "scene_bike.png"


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
        labels = client.post("/inference_image", files={"files": ("a.png", BIKE.read_bytes())})
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
    files = {"files": ("a.png", BIKE.read_bytes())}
    answer = requests.post(f"http://127.0.0.1:{port}/inference_image", files=files, timeout=60)
    info = requests.post(f"http://127.0.0.1:{port}/get_deploy_info", json={}, timeout=60).json()
    return {
        "labels": len(answer.json()["annotation"]["objects"]),
        "model": info["model_name"],
        "precision": info["model_precision"],
        "device": app.device,
    }


sys.stdout.write("\n" + json.dumps({"quick": quick, "plain": plain}[sys.argv[1]]()) + "\n")
sys.stdout.flush()
os._exit(0)

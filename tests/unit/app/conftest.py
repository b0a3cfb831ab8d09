"""One demo model for the tests of the app; the SDK's process-wide objects fresh for each app."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from florence2 import Florence2
from serve.app import Florence2App, LocalServer
from serve.http.metrics import Metrics
from serve.model_service import Deployment, ModelChoice
from serve.predict.predictor import Predictor
from serve.sdk import sly  # noqa: F401  (the SDK's modules are imported after this door)

# isort: split
from supervisely.app.singleton import Singleton

HERE = "http://127.0.0.1:8000"
IMAGES = Path(__file__).parents[3] / "demo" / "images"


@pytest.fixture(scope="session")
def demo_model() -> Florence2:
    return Florence2.load("demo", device="cpu")


class Undying:
    """The shared model under another owner, who must not take its weights away."""

    def __init__(self, model: Florence2) -> None:
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def close(self) -> None:
        """The next test needs it."""


@pytest.fixture
def deployment(demo_model):
    deployed = Deployment(load=lambda choice: Undying(demo_model))
    deployed.switch(ModelChoice("demo"))
    yield deployed
    deployed.stop()


@pytest.fixture
def predictor(deployment) -> Predictor:
    return Predictor(deployment, Metrics())


@pytest.fixture
def fresh_sdk(monkeypatch, tmp_path):
    """Another app in this process: the SDK keeps one application, server and state per process."""
    monkeypatch.setattr(Singleton, "_instances", {})
    monkeypatch.setenv("SLY_APP_DATA_DIR", str(tmp_path / "data"))
    for name in ("SERVER_ADDRESS", "API_TOKEN", "TASK_ID"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def held(scheduler) -> Iterator[None]:
    """Inside, the model's thread is busy and answers nothing."""
    begun, go_on = threading.Event(), threading.Event()
    work = threading.Thread(target=scheduler.call, args=(lambda: (begun.set(), go_on.wait()),))
    work.start()
    begun.wait()
    try:
        yield
    finally:
        go_on.set()
        work.join(20)


@pytest.fixture
def busy_model():
    """Keeps the thread of a scheduler busy; see ``held``."""
    return held


@pytest.fixture
def serve_locally(fresh_sdk, monkeypatch):
    """Makes local apps whose server is a test client's; each is stopped at the end."""
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **options: None)
    made = []

    def serve(device="cpu", **local) -> Florence2App:
        app = Florence2App(local=LocalServer("demo", device, **local))
        made.append(app)
        app.serve()
        return app

    yield serve
    for app in made:
        app.shutdown_model()


@pytest.fixture
def app(serve_locally) -> Florence2App:
    return serve_locally(allow_deploy=("someone/nothing-here",))


@pytest.fixture
def client(app):
    with TestClient(app.app, HERE, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def image_path():
    return lambda name: IMAGES / name

"""One demo model for the tests of the app; the SDK's process-wide objects fresh for each app."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
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


@contextmanager
def another_app_process(folder: Path) -> Iterator[None]:
    """Inside, an app may be made as in a process of its own: the SDK keeps one of each thing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Singleton, "_instances", {})
        patch.setenv("SLY_APP_DATA_DIR", str(folder / "data"))
        for name in ("SERVER_ADDRESS", "API_TOKEN", "TASK_ID"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def fresh_sdk(tmp_path):
    """Another app in this process."""
    with another_app_process(tmp_path):
        yield


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


@contextmanager
def local_apps() -> Iterator[Callable[..., Florence2App]]:
    """Makes local apps whose server is a test client's; each is stopped at the end."""
    made = []

    def serve(device="cpu", **local) -> Florence2App:
        app = Florence2App(local=LocalServer("demo", device, **local))
        made.append(app)
        app.serve()
        return app

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uvicorn.Server.run", lambda *_, **options: None)
        yield serve
        for app in made:
            app.shutdown_model()


@contextmanager
def client_of(app: Florence2App) -> Iterator[TestClient]:
    with TestClient(app.app, HERE, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def serve_locally(fresh_sdk):
    """See ``local_apps``."""
    with local_apps() as serve:
        yield serve


@pytest.fixture
def own_app(serve_locally) -> Florence2App:
    """For tests that leave it changed, or that need one that nobody has asked anything."""
    return serve_locally(allow_deploy=("someone/nothing-here",))


@pytest.fixture
def own_client(own_app):
    with client_of(own_app) as client:
        yield client


@pytest.fixture(scope="module")
def serve_for_module(tmp_path_factory):
    """As ``serve_locally``, of apps that are there for all tests of a module."""
    with another_app_process(tmp_path_factory.mktemp("app")), local_apps() as serve:
        yield serve


@pytest.fixture(scope="module")
def app(serve_for_module) -> Florence2App:
    """One for all tests that leave it as it was: with the demo checkpoint in float32."""
    return serve_for_module(allow_deploy=("someone/nothing-here",))


@pytest.fixture(scope="module")
def client(app):
    with client_of(app) as client:
        yield client


@pytest.fixture
def image_path():
    return lambda name: IMAGES / name

"""One double of the platform and one app for the whole run; every test gets a fresh project."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from app_server import OUT_OF_REACH, SDK_ENVIRONMENT, AppServer
from contract_calls import BIKE, DEMO, TRAINING, App, classes_in
from platform_double import SESSION_TOKEN, TOKEN, PlatformDouble
from platform_seed import Seeded, seed
from platform_state import TEAM_ID

from florence2 import Florence2
from serve.platform.experiments import write_experiment
from serve.sdk import sly

# isort: split
from supervisely.nn.inference import session as sdk_session
from supervisely.nn.model import prediction_session as sdk_prediction_session


@pytest.fixture(scope="session")
def running_platform() -> Iterator[PlatformDouble]:
    double = PlatformDouble()
    double.start()
    yield double
    double.stop()


@pytest.fixture
def platform(running_platform) -> PlatformDouble:
    """The double, empty and healthy."""
    running_platform.reset()
    return running_platform


@pytest.fixture
def seeded(platform) -> Seeded:
    return seed(platform)


@pytest.fixture
def api(platform, monkeypatch) -> sly.Api:
    """The SDK's client of the double. Its polling, once a second by itself, is quicker."""
    for name, value in SDK_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    quick = SimpleNamespace(
        time=time.time, monotonic=time.monotonic, sleep=lambda seconds: time.sleep(seconds / 20)
    )
    monkeypatch.setattr(sdk_session, "time", quick)
    monkeypatch.setattr(sdk_prediction_session, "time", quick)
    return sly.Api(platform.address, TOKEN, retry_count=1)


@pytest.fixture(scope="session")
def running_app(running_platform, tmp_path_factory) -> Iterator[AppServer]:
    """``florence2 serve`` with the demo checkpoint, connected to the double."""
    env = {**SDK_ENVIRONMENT, "SERVER_ADDRESS": running_platform.address, "API_TOKEN": TOKEN}
    env |= {"FLORENCE_ALLOW_SERVERS": OUT_OF_REACH, "TEAM_ID": str(TEAM_ID)}
    server = AppServer(tmp_path_factory.mktemp("app"), env, is_forked=True)
    server.start()
    running_platform.app_url = server.url
    yield server
    server.stop()


@pytest.fixture
def app(running_app, platform) -> App:
    """The app for requests that are sent as they are."""
    return App(running_app.url)


@pytest.fixture
def session_url(running_app, platform) -> str:
    """The app behind the platform's proxy, as clients address a session."""
    return f"{platform.address}/net/{SESSION_TOKEN}"


@pytest.fixture(scope="session")
def experiment(tmp_path_factory) -> Path:
    """What a training that ended has written: the demo checkpoint under another name."""
    out = tmp_path_factory.mktemp("trained") / "street <b>"
    shutil.copytree(DEMO, out / "best")
    (out / "training.json").write_text(json.dumps(TRAINING), encoding="utf-8")
    return write_experiment(out)


@pytest.fixture(scope="session")
def model() -> Iterator[Florence2]:
    """The same checkpoint in this process: what the app should answer."""
    loaded = Florence2.load("demo", device="cpu")
    yield loaded
    loaded.close()


@pytest.fixture
def next_request_works(app):
    """Whatever was sent before, a plain request is answered afterwards."""
    yield
    [entry] = app.upload_images([BIKE], {"text": "star", "num_beams": 1})
    assert classes_in(entry["annotation"]) == ["star"]

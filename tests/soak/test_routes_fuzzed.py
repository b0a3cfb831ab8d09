"""Requests that schemathesis makes of the table of routes: no 500, known statuses, JSON."""

from __future__ import annotations

import os

import pytest
import requests
from contract_calls import App, classes_in
from hypothesis import HealthCheck, given, settings
from platform_seed import IMAGES, seed
from routes_document import READ_ONLY, document, statuses

from serve.http.routes import ROUTES

schemathesis = pytest.importorskip("schemathesis")

pytestmark = pytest.mark.soak

EXAMPLES = int(os.environ.get("FLORENCE_SOAK_EXAMPLES", "60"))
SCHEMA = schemathesis.openapi.from_dict(document())
MODES = schemathesis.GenerationMode
PATHS = [route.path for route in ROUTES]
HTML = ("/",)
TEXT = ("/metrics", "/livez", "/readyz")


@pytest.fixture(scope="module")
def url(module_app):
    platform, server = module_app
    seed(platform)
    return server.url


@pytest.mark.parametrize("mode", [MODES.POSITIVE, MODES.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", PATHS)
def test_no_request_is_answered_with_a_fault(url, path, mode):
    method = "GET" if path in READ_ONLY else "POST"
    if method == "GET" and mode is MODES.NEGATIVE:
        pytest.skip("It reads nothing.")

    @settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(case=SCHEMA[path][method].as_strategy(generation_mode=mode))
    def ask(case):
        answer = case.call(base_url=url, timeout=120)
        assert answer.status_code in statuses(), (answer.status_code, answer.content[:300])
        kind = answer.headers.get("content-type", [""])[0]
        if path not in (*HTML, *TEXT) or answer.status_code != 200:
            assert kind.startswith("application/json"), kind
        if answer.status_code != 200:
            body = answer.json()
            assert body["success"] is False
            assert body["code"]
            assert "Traceback" not in body["message"]

    ask()


def test_the_app_still_answers(url):
    assert requests.get(f"{url}/is_alive", timeout=10).status_code == 200
    [entry] = App(url).upload_images([IMAGES / "scene_bike.png"], {"text": "star", "num_beams": 1})
    assert classes_in(entry["annotation"]) == ["star"]

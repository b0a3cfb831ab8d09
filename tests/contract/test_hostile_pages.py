"""What a web page of others can have a browser send, against the app as ``serve`` starts it.

A browser sends these without asking the server first: a plain text, a form, an image, a link.
"""

from __future__ import annotations

import pytest
import requests
from contract_calls import CITY, assert_refused
from platform_double import TOKEN, PlatformDouble

EVIL = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
DEPLOY = '{"state": {"model_name": "demo", "deploy_params": {"device": "cpu"}}}'
PLAIN_JSON = "text/plain; application/json"


@pytest.fixture
def send(app, running_app):
    def send(method, path, headers, **content):
        return requests.request(method, f"{app.url}/{path}", headers=headers, timeout=60, **content)

    yield send
    # Whatever was sent, the same model answers.
    assert app.post("get_deploy_info").json()["model_name"] == "demo"
    assert running_app.is_alive()


def files():
    return {"files": ("a.jpg", CITY.read_bytes(), "image/jpeg")}


@pytest.mark.parametrize(
    "origin",
    [
        EVIL,
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"},
        {"Host": "localhost.evil.example"},
    ],
    ids=["another site", "no site", "another port", "a neighbour", "rebinding", "rebinding, quiet"],
)
def test_nothing_that_a_page_can_send_is_done(send, origin):
    kind = {"Content-Type": "text/plain"}
    answers = [
        send("POST", "deploy_from_api", {**origin, "Content-Type": PLAIN_JSON}, data=DEPLOY),
        send("POST", "freeze_model", {**origin, **kind}, data=""),
        send("POST", "inference_batch_async", origin, files=files()),
        send("POST", "inference_image", origin, files=files()),
        send("GET", "metrics", origin),
        send("POST", "sly/session-info", {**origin, **kind}, data="{}"),
    ]
    for answer in answers:
        assert_refused(answer, 403)
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert TOKEN not in answer.text


def test_a_program_and_the_own_page_are_answered(send, app):
    own = {"Origin": app.url, "Sec-Fetch-Site": "same-origin"}
    assert send("POST", "inference_image", own, files=files()).status_code == 200
    assert send("POST", "inference_image", {}, files=files()).status_code == 200
    assert send("GET", "", {"Sec-Fetch-Site": "none"}).status_code == 200


@pytest.mark.parametrize("name", ["someone/checkpoint", "/etc", "../..", "Florence-2-huge"])
def test_only_checkpoints_that_were_allowed_are_deployed(app, name):
    answer = app.post("deploy_from_api", {"model_name": name, "deploy_params": {"device": "cpu"}})
    assert_refused(answer, 400, says="--allow-deploy")


@pytest.mark.parametrize("token", [{}, {"api_token": TOKEN}], ids=["the app's", "its own"])
@pytest.mark.parametrize("path", ["inference_image_id", "tag_objects_async", "get_status", "x/y"])
def test_a_server_that_nobody_allowed_hears_nothing(app, path, token):
    stranger = PlatformDouble()
    stranger.start()
    answer = app.post(path, {"image_id": 1}, server_address=stranger.address, **token)
    stranger.stop()
    assert_refused(answer, 403, says="--allow-server")
    assert stranger.calls == []

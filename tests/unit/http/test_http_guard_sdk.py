"""The guard around the SDK's real middleware, with the defects it is there for."""

import json
from pathlib import Path

import pytest
from fastapi import FastAPI, Request, UploadFile
from fastapi.testclient import TestClient

from florence2.errors import RequestError
from serve.http.guard import Callers, Guard, Limits, install_error_handlers
from serve.http.json_bodies import Servers
from serve.sdk import sly

LIMITS = Limits(json_bytes=10_000, encoded_bytes=20_000, multipart_bytes=30_000)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The SDK's server with its page and middleware, without its process-wide Application."""
    monkeypatch.setenv("SLY_APP_DATA_DIR", str(tmp_path))
    from supervisely.app.fastapi import subapp

    server = FastAPI()
    install_error_handlers(server)

    @server.post("/inference_image_id")
    def image_id(request: Request):
        return {"state": request.state.state, "context": request.state.context}

    @server.post("/inference_image")
    def image(files: list[UploadFile]):
        return {"names": [file.filename for file in files]}

    @server.post("/is_deployed")
    def is_deployed():
        return {"deployed": True}

    @server.post("/get_status")
    def status():
        raise KeyError("nobody foresaw this")

    @server.post("/get_model_meta")
    def refused():
        raise RequestError("Correct it.")

    @server.post("/Widget1/clicked")
    def clicked():
        return {}

    # The folder that the Application itself uses: the SDK keeps the first one for good.
    subapp._init(app=server, templates_dir=str(Path(subapp.__file__).parent / "templates"))
    return server


@pytest.fixture
def client(server):
    guard = Guard(server, LIMITS, lambda uuid: False, Callers(), Servers())
    return TestClient(guard, "http://localhost", raise_server_exceptions=False)


@pytest.fixture
def gui_state():
    state = sly.app.StateJson()
    before = set(state)
    yield state
    for key in set(state) - before:
        del state[key]


def test_state_and_context_reach_the_route(client):
    response = client.post("/inference_image_id", json={"state": {"image_id": 5}})
    expected = {"state": {"image_id": 5}, "context": {"outside_request": True}}
    assert response.json() == expected


def test_a_call_of_the_api_leaves_the_state_of_the_gui_alone(client, gui_state):
    client.post("/inference_image_id", json={"state": {"image_id": 5}, "context": {}})
    client.post("/no_such_route", json={"state": {"image_id": 5}})
    assert "image_id" not in gui_state


def test_a_click_in_the_gui_still_sets_its_state(client, gui_state):
    client.post("/Widget1/clicked", json={"state": {"chosen": 3}, "context": {}})
    assert gui_state["chosen"] == 3


BAD_BODIES = {
    "a list": b"[]",
    "not JSON": b"{",
    "empty": b"",
    "null": b"null",
    "context is text": b'{"state": {}, "context": "x"}',
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_what_the_sdk_s_middleware_dies_of_is_400(client, server, body):
    headers = {"Content-Type": "application/json"}
    response = client.post("/inference_image_id", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["code"] == "bad_request"


def test_the_middleware_really_dies_of_it(server):
    # Once the SDK checks bodies itself, this fails and the guard can do less.
    bare = TestClient(server, raise_server_exceptions=False)
    headers = {"Content-Type": "application/json"}
    response = bare.post("/inference_image_id", content=b"[]", headers=headers)
    assert response.status_code == 500


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_json_header_without_a_body_is_no_error_where_nothing_is_read(client, method):
    headers = {"Content-Type": "application/json"}
    response = client.request(method, "/is_deployed", headers=headers)
    assert response.status_code == (200 if method == "POST" else 405)


def test_an_upload_passes_whole(client):
    files = [("files", ("a.png", b"x" * 20_000))]
    assert client.post("/inference_image", files=files).json() == {"names": ["a.png"]}


def test_an_upload_above_the_limit_is_413_through_the_whole_stack(client):
    def endless():
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield b"a" * 1000

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    response = client.post("/inference_image", content=endless(), headers=headers)
    assert response.status_code == 413
    assert response.json()["code"] == "too_large"


def test_a_form_without_files_is_400_through_the_whole_stack(client):
    files = {"picture": ("a.png", b"x")}
    response = client.post("/inference_image", files=files)
    assert (response.status_code, response.json()["code"]) == (400, "bad_request")


@pytest.mark.parametrize("environment", ["development", "production"])
def test_an_unexpected_error_is_the_same_500_wherever_the_app_runs(
    client, monkeypatch, environment
):
    # Without the handlers: plain text in development, the exception's repr in production.
    monkeypatch.setenv("ENV", environment)
    response = client.post("/get_status", json={})
    assert (response.status_code, response.json()["code"]) == (500, "internal_error")
    assert "foresaw" not in response.text


@pytest.mark.parametrize("environment", ["development", "production"])
def test_a_refusal_is_the_same_400_wherever_the_app_runs(client, monkeypatch, environment):
    monkeypatch.setenv("ENV", environment)
    response = client.post("/get_model_meta", json={})
    assert (response.status_code, response.json()["message"]) == (400, "Correct it.")


def test_the_token_is_not_given_away(client, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "very secret")
    response = client.post("/sly/session-info", json={})
    assert response.status_code == 404
    assert "very secret" not in response.text


def test_without_the_guard_the_token_is_given_to_anybody(server, monkeypatch):
    # Why that route is closed. Once the SDK asks who calls, it can be opened again.
    monkeypatch.setenv("API_TOKEN", "very secret")
    assert "very secret" in TestClient(server).post("/sly/session-info", json={}).text


def test_an_answer_is_plain_json(client):
    assert json.loads(client.post("/is_deployed", json={}).text) == {"deployed": True}

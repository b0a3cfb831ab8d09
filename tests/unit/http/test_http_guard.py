"""What the guard lets through, changes and refuses: alone, and around the SDK's real middleware."""

import asyncio
import json
from pathlib import Path

import pytest
from asgi_requests import FORM, JSON, Inner, ask, guard_around, parts, scope_of
from fastapi import FastAPI, Request, UploadFile
from fastapi.testclient import TestClient

from florence2.errors import FlorenceError, RequestError
from serve.http.guard import Callers, Limits, install_error_handlers
from serve.http.routes import ROUTES, RequestId, Takes
from serve.limits import MAX_IMAGE_BYTES, MIB, readable_size
from serve.sdk import sly

SMALL = Limits(json_bytes=1000, encoded_bytes=2000, multipart_bytes=3000)
STATE_PATH = "/inference_image_id"
STATE = b'{"state": {}}'


def post(inner, path, body, headers=JSON, local=False, **more):
    callers = Callers() if local else None
    known = {"limits": SMALL, "is_known": lambda uuid: uuid == "known"}
    guard = guard_around(inner, callers=callers, **{**known, **more})
    status, answer, _, _ = ask(guard, scope_of(path, headers), parts(body))
    return status, answer


def refusal(path, body, headers=JSON, **more):
    """The status and the message of a request that must not reach the app."""
    inner = Inner()
    status, answer = post(inner, path, body, headers, **more)
    assert inner.scopes == []
    body = json.loads(answer)
    assert body["success"] is False
    assert body["detail"] == body["message"]
    return status, body["message"]


BAD_JSON_BODIES = {
    "not JSON": b"{",
    "empty": b"",
    "only spaces": b"  \n",
    "a list": b"[]",
    "text": b'"state"',
    "a number": b"5",
    "null": b"null",
    "not UTF-8": b"\xff\xfe\xfa",
    "nested too deeply": b"[" * 900,
    "no state": b"{}",
    "state is null": b'{"state": null}',
    "state is a list": b'{"state": []}',
    "state is text": b'{"state": "{}"}',
    "context is a list": b'{"state": {}, "context": [1]}',
    "api_token is a number": b'{"state": {}, "api_token": 5}',
    "apiToken is an object": b'{"state": {}, "context": {"apiToken": {}}}',
    "server_address is a list": b'{"state": {}, "server_address": []}',
}


@pytest.mark.parametrize("body", BAD_JSON_BODIES.values(), ids=BAD_JSON_BODIES)
def test_a_bad_json_body_is_answered_with_400_and_one_sentence(body):
    status, message = refusal(STATE_PATH, body)
    assert status == 400
    assert message.endswith(".")


def test_a_message_about_json_says_where_it_breaks():
    assert "line 2, column 1" in refusal(STATE_PATH, b'{"state":\n}')[1]


def test_deeper_nesting_than_python_reads_is_400_too():
    inner = Inner()
    deep = b"[" * 200_000
    assert post(inner, "/tasks", deep, limits=Limits())[0] == 400
    assert inner.scopes == []


WRONG_TYPES = {
    "none where JSON is expected": (STATE_PATH, None),
    "a form where JSON is expected": (STATE_PATH, "multipart/form-data; boundary=x"),
    "curl's own": (STATE_PATH, "application/x-www-form-urlencoded"),
    "JSON where a form is expected": ("/inference_image", "application/json"),
    "none where a form is expected": ("/inference_batch", None),
    "JSON behind a plain text": (STATE_PATH, "text/plain; application/json"),
    "JSON as a parameter": (STATE_PATH, "text/plain;a=application/json"),
    "a list": (STATE_PATH, "text/plain, application/json"),
    "a list with JSON first": (STATE_PATH, "application/json, text/plain"),
    "more than JSON": (STATE_PATH, "application/jsonp"),
    "a plain text where nothing is read": ("/freeze_model", "text/plain; application/json"),
    "a widget's route": (
        "/Widget1/clicked",
        "application/x-www-form-urlencoded; Application/JSON",
    ),
    "nearly a form": ("/inference_batch", "multipart/form-dataset"),
    "JSON hidden in a form's type": (
        "/inference_batch_async",
        "multipart/form-data; boundary=application/json",
    ),
}


@pytest.mark.parametrize(("path", "kind"), WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_a_wrong_content_type_is_400(path, kind):
    status, message = refusal(path, STATE, [("content-type", kind)] if kind else [])
    assert status == 400
    assert "Content-Type" in message


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_every_route_takes_the_body_its_row_says(route):
    inner = Inner()
    if route.takes is Takes.FORM:
        status, _ = post(inner, route.path, b"--x--", FORM)
    else:
        state = {"inference_request_uuid": "known"}
        status, _ = post(inner, route.path, json.dumps({"state": state}).encode())
    assert status == 200


@pytest.mark.parametrize(
    "route", [r for r in ROUTES if r.takes is Takes.OPTIONAL], ids=lambda route: route.path
)
def test_a_route_that_reads_nothing_takes_a_json_request_without_a_body(route):
    # ModelAPI and health checks send the header with nothing behind it.
    inner = Inner()
    assert post(inner, route.path, b"") == (200, b"ok")
    if route.path != "/":
        assert inner.json == {"context": {"outside_request": True}}


ABOUT_REQUESTS = [route for route in ROUTES if route.request_id is not RequestId.NONE]


@pytest.mark.parametrize("uuid", [None, 5, "", {}, []], ids=str)
@pytest.mark.parametrize("route", ABOUT_REQUESTS, ids=lambda route: route.path)
def test_a_request_without_an_id_is_400(route, uuid):
    body = json.dumps({"state": {"inference_request_uuid": uuid}}).encode()
    status, message = refusal(route.path, body)
    assert status == 400
    assert "'inference_request_uuid' is required" in message


@pytest.mark.parametrize("route", ABOUT_REQUESTS, ids=lambda route: route.path)
def test_an_unknown_id_is_404_except_for_clearing(route):
    inner = Inner()
    body = json.dumps({"state": {"inference_request_uuid": "gone"}}).encode()
    status, _ = post(inner, route.path, body)
    assert status == (200 if route.path == "/clear_inference_request" else 404)


def test_a_known_id_passes():
    body = b'{"state": {"inference_request_uuid": "known"}}'
    assert post(Inner(), "/get_inference_progress", body)[0] == 200


MARKED = {
    "no context": {"state": {"a": 1}},
    "null context": {"state": {"a": 1}, "context": None},
    "context without the mark": {"state": {"a": 1}, "context": {"x": 1}},
    "context with the mark off": {"state": {"a": 1}, "context": {"outside_request": False}},
}


@pytest.mark.parametrize("content", MARKED.values(), ids=MARKED)
def test_a_call_of_the_api_is_marked_as_coming_from_outside_the_gui(content):
    inner = Inner()
    post(inner, STATE_PATH, json.dumps(content).encode())
    expected = {**(content.get("context") or {}), "outside_request": True}
    assert inner.json == {"state": {"a": 1}, "context": expected}
    announced = dict(inner.scopes[0]["headers"])[b"content-length"]
    assert int(announced) == len(inner.bodies[0])


def test_a_body_that_is_marked_already_goes_on_byte_for_byte():
    inner = Inner()
    body = b'{ "state": {"a": 1e2},  "context": {"outside_request": true} }'
    post(inner, STATE_PATH, body)
    assert inner.bodies == [body]


def test_the_gui_s_own_calls_still_reach_its_state():
    inner = Inner()
    body = b'{ "state": {"a": 1} }'
    post(inner, "/AutoId7/button_clicked_cb", body)
    post(inner, "/sly/state", body)
    assert inner.bodies == [body, body]


def test_a_widget_s_call_must_be_a_json_object_too():
    assert refusal("/AutoId7/button_clicked_cb", b"[]")[0] == 400


@pytest.mark.parametrize(
    "kind", ["application/json;charset=UTF-8", "application/json ; x=y", " APPLICATION/json"]
)
def test_parameters_and_capitals_are_no_part_of_the_media_type(kind):
    assert post(Inner(), STATE_PATH, STATE, [("content-type", kind)])[0] == 200


def test_a_content_type_in_capitals_is_what_the_sdk_looks_for():
    inner = Inner()
    post(inner, STATE_PATH, STATE, [("Content-Type", "Application/JSON")])
    assert dict(inner.scopes[0]["headers"])[b"content-type"] == b"application/json"


def test_a_path_prefix_and_a_root_path_are_no_part_of_the_route():
    inner = Inner()
    guard = guard_around(inner, path_prefix="/net/abc")
    scope = scope_of("/mounted/net/abc" + STATE_PATH, JSON, root_path="/mounted")
    assert ask(guard, scope, parts(b"[]"))[0] == 400


HIDDEN = {
    "the token": ("/sly/session-info", True),
    "stopping the app": ("/sly/shutdown", True),
    "stopping the app, without the mount": ("/shutdown", True),
    "the debugger": ("/debug", True),
    "the debugger on the platform": ("/debug", False),
}


@pytest.mark.parametrize(("path", "local"), HIDDEN.values(), ids=HIDDEN)
def test_what_nobody_may_call_is_404(path, local):
    assert refusal(path, b"{}", local=local)[0] == 404
    assert refusal(path, b"", headers=[], local=local)[0] == 404


@pytest.mark.parametrize("path", ["/sly/session-info", "/sly/shutdown"])
def test_the_platform_s_page_and_agent_reach_theirs(path):
    assert post(Inner(), path, b"{}")[0] == 200


def test_attributes_are_those_of_the_application():
    guard = guard_around(Inner())
    assert guard.get_server() == "the server"
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = guard.nothing_like_this


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
def test_other_kinds_of_connections_pass_untouched(kind):
    inner = Inner()
    scope = {"type": kind, "path": "/sly/ws", "headers": []}
    ask(guard_around(inner), scope, [])
    assert inner.scopes[0] is scope


def test_an_unexpected_error_is_500_with_one_sentence_and_the_trace_in_the_log(caplog):
    inner = Inner(fail_with=KeyError("a secret"))
    status, answer = post(inner, STATE_PATH, STATE)
    body = json.loads(answer)
    assert (status, body["code"], body["success"]) == (500, "internal_error", False)
    assert b"secret" not in answer
    assert "a secret" in caplog.text
    assert "Traceback" in caplog.text


def test_an_error_of_ours_keeps_its_status_and_words():
    inner = Inner(fail_with=RequestError("Correct it."))
    status, answer = post(inner, STATE_PATH, STATE)
    assert (status, json.loads(answer)["message"]) == (400, "Correct it.")


def test_an_error_after_the_answer_began_is_raised():
    inner = Inner(fail_with=ValueError("late"), start_first=True)
    with pytest.raises(ValueError, match="late"):
        post(inner, STATE_PATH, STATE)


def test_a_request_that_the_end_of_the_server_cancels_is_told_so_unless_its_answer_began():
    status, answer = post(Inner(fail_with=asyncio.CancelledError()), STATE_PATH, STATE)
    assert status == 503
    assert "the session that comes next" in json.loads(answer)["message"]
    with pytest.raises(asyncio.CancelledError):
        post(Inner(fail_with=asyncio.CancelledError(), start_first=True), STATE_PATH, STATE)


def test_the_end_of_the_server_is_told_before_the_app_hears_of_it():
    heard = []

    async def app(scope, receive, send):
        heard.append((await receive())["type"])

    guard = guard_around(app, on_end=lambda: heard.append("told"))
    ask(guard, {"type": "lifespan", "path": "", "headers": []}, [{"type": "lifespan.shutdown"}])
    assert heard == ["told", "lifespan.shutdown"]


def test_answers_are_counted_by_route_and_status():
    counted = []

    def count(route, status, seconds):
        counted.append((route, status))
        assert seconds >= 0

    post(Inner(), STATE_PATH, STATE, count_request=count)
    post(Inner(), "/no/such/path", b"", headers=[], count_request=count)
    post(Inner(), STATE_PATH, b"[]", count_request=count)
    post(Inner(fail_with=KeyError()), "/tasks", b"{}", count_request=count)
    assert counted == [(STATE_PATH, 200), ("other", 200), (STATE_PATH, 400), ("/tasks", 500)]


def json_of(size):
    frame = len(b'{"state": {}, "x": ""}')
    return b'{"state": {}, "x": "%s"}' % (b"a" * (size - frame))


# limits: 100 bytes of JSON, 200 of JSON with a picture, 300 of a form; nothing else over 100
BODIES = Limits(json_bytes=100, encoded_bytes=200, multipart_bytes=300)
SIZES = {
    "JSON": ("/inference_image_id", JSON, 100),
    "JSON with a picture": ("/visual_question_answering", JSON, 200),
    "a form": ("/inference_image", FORM, 300),
    "anything else": ("/unknown", [("content-type", "application/octet-stream")], 100),
}


@pytest.mark.parametrize(("path", "headers", "limit"), SIZES.values(), ids=SIZES)
def test_a_body_of_exactly_the_limit_passes(path, headers, limit):
    status, _, _, _ = ask(
        guard_around(Inner(), BODIES), scope_of(path, headers), parts(json_of(limit))
    )
    assert status == 200


@pytest.mark.parametrize(("path", "headers", "limit"), SIZES.values(), ids=SIZES)
def test_one_byte_more_is_413_with_one_sentence(path, headers, limit):
    body = json_of(limit + 1)
    status, answer, _, _ = ask(
        guard_around(Inner(), BODIES), scope_of(path, headers), parts(body[:50], body[50:])
    )
    assert status == 413
    assert json.loads(answer)["code"] == "too_large"
    assert f"at most {limit} bytes" in json.loads(answer)["message"]


@pytest.mark.parametrize(("path", "headers", "limit"), SIZES.values(), ids=SIZES)
def test_an_announced_size_above_the_limit_is_refused_unread(path, headers, limit):
    inner = Inner()
    announced = [*headers, ("content-length", str(limit + 1))]
    messages = parts(b"never read")
    status, _, _, unread = ask(guard_around(inner, BODIES), scope_of(path, announced), messages)
    assert (status, inner.scopes, unread) == (413, [], messages)


def test_a_body_that_never_ends_is_left_once_the_limit_is_passed():
    endless = parts(*[b"a" * 60] * 50)
    status, _, _, unread = ask(guard_around(Inner(), BODIES), scope_of("/tasks", JSON), endless)
    assert status == 413
    assert len(unread) == 51 - 2


def test_an_app_that_makes_another_error_of_a_large_body_does_not_hide_the_413():
    # FastAPI turns whatever breaks a form into a 400 of its own.
    async def inner(scope, receive, send):
        try:
            while True:
                await receive()
        except FlorenceError:
            await send({"type": "http.response.start", "status": 400, "headers": []})
            await send({"type": "http.response.body", "body": b"cannot parse"})

    endless = parts(*[b"a" * 200] * 50)
    status, answer, sent, _ = ask(
        guard_around(inner, BODIES), scope_of("/inference_image", FORM), endless
    )
    assert status == 413
    assert len(sent) == 2
    assert b"cannot parse" not in answer


def test_an_answer_that_began_before_the_body_was_read_is_not_torn():
    inner = Inner(start_first=True)
    endless = parts(b"a" * 400)
    with pytest.raises(Exception, match="at most 300 bytes"):
        ask(guard_around(inner, BODIES), scope_of("/inference_image", FORM), endless)


@pytest.mark.parametrize(("path", "headers", "limit"), SIZES.values(), ids=SIZES)
def test_the_disconnect_of_a_client_still_arrives_after_the_body(path, headers, limit):
    inner = Inner()
    ask(guard_around(inner, BODIES), scope_of(path, headers), parts(b'{"state":', b" {}}"))
    assert inner.last_message == {"type": "http.disconnect"}


def test_a_client_that_leaves_while_it_sends_json_is_not_answered_but_counted():
    inner, counted = Inner(), []
    guard = guard_around(inner, BODIES, count_request=lambda *args: counted.append(args[:2]))
    messages = parts(b'{"state"', ends_with_disconnect=True)
    _, _, sent, _ = ask(guard, scope_of("/tasks", JSON), messages)
    assert (sent, inner.scopes, counted) == ([], [], [("/tasks", 499)])


def test_the_default_limits_fit_an_encoded_picture_and_refuse_100_megabytes_of_json():
    limits = Limits()
    assert limits.encoded_bytes >= MAX_IMAGE_BYTES * 4 / 3
    assert limits.encoded_bytes < 100_000_000
    assert limits.multipart_bytes == 512 * MIB


@pytest.mark.parametrize(
    ("count_bytes", "text"),
    [(5, "5 bytes"), (MIB, "1 MiB"), (32 * MIB, "32 MiB"), (MIB + MIB // 2, "1.5 MiB")],
)
def test_sizes_are_written_for_people(count_bytes, text):
    assert readable_size(count_bytes) == text


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
    limits = Limits(json_bytes=10_000, encoded_bytes=20_000, multipart_bytes=30_000)
    guard = guard_around(server, limits, Callers(), is_known=lambda uuid: False)
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
    response = client.post("/inference_image_id", content=body, headers=dict(JSON))
    assert response.status_code == 400
    assert response.json()["code"] == "bad_request"


def test_the_middleware_really_dies_of_it(server):
    # Once the SDK checks bodies itself, this fails and the guard can do less.
    bare = TestClient(server, raise_server_exceptions=False)
    response = bare.post("/inference_image_id", content=b"[]", headers=dict(JSON))
    assert response.status_code == 500


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_json_header_without_a_body_is_no_error_where_nothing_is_read(client, method):
    response = client.request(method, "/is_deployed", headers=dict(JSON))
    if method == "GET":
        assert response.status_code == 405
    else:
        assert response.json() == {"deployed": True}


def test_an_upload_passes_whole(client):
    files = [("files", ("a.png", b"x" * 20_000))]
    assert client.post("/inference_image", files=files).json() == {"names": ["a.png"]}


def test_an_upload_above_the_limit_is_413_through_the_whole_stack(client):
    def endless():
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield b"a" * 1000

    response = client.post("/inference_image", content=endless(), headers=dict(FORM))
    assert response.status_code == 413
    assert response.json()["code"] == "too_large"


def test_a_form_without_files_is_400_through_the_whole_stack(client):
    files = {"picture": ("a.png", b"x")}
    response = client.post("/inference_image", files=files)
    assert (response.status_code, response.json()["code"]) == (400, "bad_request")


@pytest.mark.parametrize("environment", ["development", "production"])
def test_errors_are_the_same_wherever_the_app_runs(client, monkeypatch, environment):
    # Without the handlers: plain text in development, the exception's repr in production.
    monkeypatch.setenv("ENV", environment)
    unexpected = client.post("/get_status", json={})
    assert (unexpected.status_code, unexpected.json()["code"]) == (500, "internal_error")
    assert "foresaw" not in unexpected.text
    refused = client.post("/get_model_meta", json={})
    assert (refused.status_code, refused.json()["message"]) == (400, "Correct it.")


def test_the_token_is_not_given_away(client, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "very secret")
    response = client.post("/sly/session-info", json={})
    assert response.status_code == 404
    assert "very secret" not in response.text


def test_without_the_guard_the_token_is_given_to_anybody(server, monkeypatch):
    # Why that route is closed. Once the SDK asks who calls, it can be opened again.
    monkeypatch.setenv("API_TOKEN", "very secret")
    assert "very secret" in TestClient(server).post("/sly/session-info", json={}).text

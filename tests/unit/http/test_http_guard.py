"""What the guard lets through, changes and refuses."""

import asyncio
import json

import pytest
from asgi_requests import Inner, ask, parts, scope_of

from florence2.errors import RequestError
from serve.http.guard import Callers, Guard, Limits
from serve.http.json_bodies import Servers
from serve.http.routes import ROUTES, RequestId, Takes

SMALL = Limits(json_bytes=1000, encoded_bytes=2000, multipart_bytes=3000)
JSON = [("content-type", "application/json")]
FORM = [("content-type", "multipart/form-data; boundary=x")]
STATE_PATH = "/inference_image_id"


def guard_around(inner, local=False, known=lambda uuid: uuid == "known", **more):
    callers = Callers() if local else None
    return Guard(inner, SMALL, known, callers, more.pop("servers", Servers()), **more)


def post(inner, path, body, headers=JSON, **more):
    guard = guard_around(inner, **more)
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
    guard = Guard(inner, Limits(), lambda uuid: True, None, Servers())
    status, _, _, _ = ask(guard, scope_of("/tasks", JSON), parts(deep))
    assert (status, inner.scopes) == (400, [])


WRONG_TYPES = {
    "none where JSON is expected": (STATE_PATH, []),
    "a form where JSON is expected": (STATE_PATH, FORM),
    "curl's own": (STATE_PATH, [("content-type", "application/x-www-form-urlencoded")]),
    "JSON where a form is expected": ("/inference_image", JSON),
    "none where a form is expected": ("/inference_batch", []),
    "JSON behind a plain text": (STATE_PATH, [("content-type", "text/plain; application/json")]),
    "JSON as a parameter": (STATE_PATH, [("content-type", "text/plain;a=application/json")]),
    "a list": (STATE_PATH, [("content-type", "text/plain, application/json")]),
    "a list with JSON first": (STATE_PATH, [("content-type", "application/json, text/plain")]),
    "more than JSON": (STATE_PATH, [("content-type", "application/jsonp")]),
    "a plain text where nothing is read": (
        "/freeze_model",
        [("content-type", "text/plain; application/json")],
    ),
    "a widget's route": (
        "/Widget1/clicked",
        [("content-type", "application/x-www-form-urlencoded; Application/JSON")],
    ),
    "nearly a form": ("/inference_batch", [("content-type", "multipart/form-dataset")]),
    "JSON hidden in a form's type": (
        "/inference_batch_async",
        [("content-type", "multipart/form-data; boundary=application/json")],
    ),
}


@pytest.mark.parametrize(("path", "headers"), WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_a_wrong_content_type_is_400(path, headers):
    status, message = refusal(path, b'{"state": {}}', headers)
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
    assert post(Inner(), STATE_PATH, b'{"state": {}}', [("content-type", kind)])[0] == 200


def test_a_content_type_in_capitals_is_what_the_sdk_looks_for():
    inner = Inner()
    post(inner, STATE_PATH, b'{"state": {}}', [("Content-Type", "Application/JSON")])
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
    status, answer = post(inner, STATE_PATH, b'{"state": {}}')
    body = json.loads(answer)
    assert (status, body["code"], body["success"]) == (500, "internal_error", False)
    assert b"secret" not in answer
    assert "a secret" in caplog.text
    assert "Traceback" in caplog.text


def test_an_error_of_ours_keeps_its_status_and_words():
    inner = Inner(fail_with=RequestError("Correct it."))
    status, answer = post(inner, STATE_PATH, b'{"state": {}}')
    assert (status, json.loads(answer)["message"]) == (400, "Correct it.")


def test_an_error_after_the_answer_began_is_raised():
    inner = Inner(fail_with=ValueError("late"), start_first=True)
    with pytest.raises(ValueError, match="late"):
        post(inner, STATE_PATH, b'{"state": {}}')


def test_a_cancelled_request_stays_cancelled():
    inner = Inner(fail_with=asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        post(inner, STATE_PATH, b'{"state": {}}')


def test_answers_are_counted_by_route_and_status():
    counted = []

    def count(route, status, seconds):
        counted.append((route, status))
        assert seconds >= 0

    post(Inner(), STATE_PATH, b'{"state": {}}', count_request=count)
    post(Inner(), "/no/such/path", b"", headers=[], count_request=count)
    post(Inner(), STATE_PATH, b"[]", count_request=count)
    post(Inner(fail_with=KeyError()), "/tasks", b"{}", count_request=count)
    assert counted == [(STATE_PATH, 200), ("other", 200), (STATE_PATH, 400), ("/tasks", 500)]

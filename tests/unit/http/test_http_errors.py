"""What failures look like to a client, through a real FastAPI app."""

import errno
import json

import pytest
from fastapi import FastAPI, Form, HTTPException, UploadFile
from fastapi.testclient import TestClient
from starlette.datastructures import UploadFile as StarletteUpload

from florence2.errors import (
    CheckpointError,
    FlorenceError,
    ImageError,
    QueueFullError,
    RequestError,
)
from florence2.records import Failure
from serve.http.errors import TooLargeError, answer_to, kind_of
from serve.http.guard import install_error_handlers
from serve.platform.failures import FailedImageError, NotFoundError, PartialFailureError
from serve.video.source import NoRoomForVideoError

SDK_NOT_DEPLOYED = (
    "The model has not yet been deployed. Please select the appropriate model in the UI and "
    "press the 'Serve' button. If this app has no GUI, it signifies that 'load_on_device' was "
    "never called."
)


STATUSES = {
    "bad_request": 400,
    "bad_image": 400,
    "bad_region": 400,
    "not_found": 404,
    "too_large": 413,
    "partial_failure": 422,
    "cancelled": 499,
    "not_deployed": 503,
    "queue_full": 503,
    "deadline": 504,
    "out_of_memory": 507,
    "not_finite": 422,
    "no rule names this": 500,
}


@pytest.mark.parametrize(("code", "status"), STATUSES.items(), ids=STATUSES)
def test_a_code_has_its_status(code, status):
    assert answer_to(FailedImageError(Failure(code, "No.")), "/").status_code == status


def test_the_body_has_the_keys_of_the_sdk_and_the_code():
    expected = {"detail": "No.", "success": False, "message": "No.", "code": "bad_image"}
    for error in (ImageError("No."), FailedImageError(Failure("bad_image", "No.", "cat.png"))):
        assert json.loads(answer_to(error, "/").body) == expected


WAITS = {
    "a queue that knows how long": (QueueFullError("Full.", 2.4), "3"),
    "no model yet": (RuntimeError(SDK_NOT_DEPLOYED), "5"),
    "a failure of one image": (FailedImageError(Failure("queue_full", "Full.")), "5"),
    "a request": (RequestError("No."), None),
    "a file": (TooLargeError("No."), None),
    "a name": (NotFoundError("No."), None),
}


@pytest.mark.parametrize(("error", "wait"), WAITS.values(), ids=WAITS)
def test_only_a_503_says_when_to_come_back(error, wait):
    assert answer_to(error, "/").headers.get("retry-after") == wait


def raising(error):
    def route():
        raise error

    return route


@pytest.fixture
def client():
    server = FastAPI()
    install_error_handlers(server)

    @server.post("/form")
    def form(files: list[UploadFile], number: int = Form(1)):
        return len(files) * number

    faults = {
        "/ours": RequestError("Correct it."),
        "/waiting": QueueFullError("Full.", 2.4),
        "/damaged": FlorenceError("The model gave nothing."),
        "/sdk": HTTPException(400, "Only one file expected but got 2"),
        "/undeployed": RuntimeError(SDK_NOT_DEPLOYED),
        "/runtime": RuntimeError("the secret path"),
        "/value": ValueError("the secret path"),
        "/widget/clicked": ValueError("for the GUI's dialog"),
    }
    for path, fault in faults.items():
        server.add_api_route(path, raising(fault))
    return TestClient(server, raise_server_exceptions=False)


ANSWERS = {
    "ours": ("/ours", 400, "bad_request", "Correct it."),
    "full": ("/waiting", 503, "queue_full", "Full."),
    "our own fault": ("/damaged", 500, "error", "The model gave nothing."),
    "the SDK without a model": ("/undeployed", 503, "not_deployed", None),
    "a RuntimeError of anything else": ("/runtime", 500, "internal_error", None),
    "a ValueError is not the client's fault": ("/value", 500, "internal_error", None),
}


@pytest.mark.parametrize(("path", "status", "code", "message"), ANSWERS.values(), ids=ANSWERS)
def test_what_a_route_raises_becomes_an_answer(client, path, status, code, message):
    response = client.get(path)
    body = response.json()
    assert (response.status_code, body["code"], body["success"]) == (status, code, False)
    assert message in (None, body["message"])
    assert "secret" not in response.text


def test_the_trace_of_an_unexpected_error_is_in_the_log(client, caplog):
    client.get("/value")
    assert "/value failed" in caplog.text
    assert "the secret path" in caplog.text


MULTIPART = {"Content-Type": "multipart/form-data; boundary=b"}
REFUSALS = {
    "the SDK's own": ("GET", "/sdk", b"", 400, "bad_request", "Only one file expected but got 2"),
    "a path that is not there": ("GET", "/nope", b"", 404, "not_found", "There is no /nope here"),
    "another method": ("PUT", "/ours", b"", 405, "bad_request", "/ours takes GET, and PUT was"),
    "a form that breaks off": ("POST", "/form", b"x", 400, "bad_request", "cannot be read"),
    "too many files": (
        "POST",
        "/form",
        b"".join(
            b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n\r\n'
            for _ in range(1001)
        )
        + b"--b--",
        400,
        "bad_request",
        "Too many files",
    ),
}


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code", "words"), REFUSALS.values(), ids=REFUSALS
)
def test_what_the_framework_refuses_has_the_same_body_as_our_errors(
    client, method, path, content, status, code, words
):
    response = client.request(method, path, content=content, headers=MULTIPART)
    body = response.json()
    assert (response.status_code, body["code"], body["success"]) == (status, code, False)
    assert words in body["message"]
    assert body["detail"] == body["message"]


def test_a_page_that_is_not_there_keeps_the_frameworks_answer(client):
    assert client.get("/widget/nope").json() == {"detail": "Not Found"}


def test_a_widget_s_error_is_left_to_the_gui(client):
    # The SDK's own handler opens a dialog for it; here nothing does, and it stays plain text.
    assert client.get("/widget/clicked").text == "Internal Server Error"


FORMS = {
    "no files": ({}, None, "'files', and it is missing"),
    "a text where a file belongs": ({"files": "text"}, None, "'files.0'"),
    "a word where a number belongs": (
        {"number": "five"},
        [("files", ("a.png", b"x"))],
        "'number' of the request is not what it should be",
    ),
}


@pytest.mark.parametrize(("data", "files", "words"), FORMS.values(), ids=FORMS)
def test_a_form_that_lacks_something_is_400_and_says_what(client, data, files, words):
    response = client.post("/form", data=data, files=files)
    assert response.status_code == 400
    assert response.json()["code"] == "bad_request"
    assert words in response.json()["message"]
    assert response.json()["message"].count(". ") == 0


KINDS = {
    "an object": {},
    "a list": [1],
    "text": "a",
    "true or false": False,
    "nothing": None,
    "a number": 0,
}


@pytest.mark.parametrize(("words", "value"), KINDS.items(), ids=KINDS)
def test_every_json_value_has_a_kind(words, value):
    assert kind_of(value) == words


def test_a_form_that_finds_no_room_on_the_disk_is_not_blamed_for_it(client, monkeypatch):
    async def write(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StarletteUpload, "write", write)
    answer = client.post("/form", files={"files": b"content"})
    assert (answer.status_code, answer.json()["code"]) == (507, "disk_full")
    assert "make room" in answer.json()["message"]
    assert answer_to(OSError(errno.EDQUOT, "Quota"), "/").status_code == 507
    assert answer_to(OSError(errno.EACCES, "Denied"), "/").status_code == 500


KEEP_THEIR_SENTENCE = {
    "a run that is done in part": (PartialFailureError("3 of 9 are done."), 422),
    "a video to download": (NoRoomForVideoError("'a.mp4' does not fit."), 507),
    "weights": (CheckpointError("The folder of weights is full."), 400),
}


@pytest.mark.parametrize(("error", "status"), KEEP_THEIR_SENTENCE.values(), ids=KEEP_THEIR_SENTENCE)
def test_a_full_disk_does_not_speak_for_what_has_a_sentence_of_its_own(error, status):
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    answer = answer_to(error, "/")
    assert (answer.status_code, json.loads(answer.body)["message"]) == (status, str(error))

"""Limits on what is sent, and what is left of a request whose client leaves."""

import json

import pytest
from asgi_requests import Inner, ask, parts, scope_of

from florence2.errors import FlorenceError
from serve.http.guard import Guard, Limits
from serve.http.json_bodies import Servers
from serve.limits import MAX_IMAGE_BYTES, MIB, readable_size

SMALL = Limits(json_bytes=100, encoded_bytes=200, multipart_bytes=300)
JSON = [("content-type", "application/json")]
FORM = [("content-type", "multipart/form-data; boundary=x")]
OTHER = [("content-type", "application/octet-stream")]


def guard_around(inner, limits=SMALL, **more):
    return Guard(inner, limits, lambda uuid: True, None, Servers(), **more)


def json_of(size):
    frame = len(b'{"state": {}, "x": ""}')
    return b'{"state": {}, "x": "%s"}' % (b"a" * (size - frame))


# limits: 100 bytes of JSON, 200 of JSON with a picture, 300 of a form; nothing else over 100
SIZES = {
    "JSON": ("/inference_image_id", JSON, 100),
    "JSON with a picture": ("/visual_question_answering", JSON, 200),
    "a form": ("/inference_image", FORM, 300),
    "anything else": ("/unknown", OTHER, 100),
}


@pytest.mark.parametrize(("path", "headers", "limit"), SIZES.values(), ids=SIZES)
def test_a_body_of_exactly_the_limit_passes(path, headers, limit):
    status, _, _, _ = ask(guard_around(Inner()), scope_of(path, headers), parts(json_of(limit)))
    assert status == 200


@pytest.mark.parametrize(("path", "headers", "limit"), SIZES.values(), ids=SIZES)
def test_one_byte_more_is_413_with_one_sentence(path, headers, limit):
    body = json_of(limit + 1)
    status, answer, _, _ = ask(
        guard_around(Inner()), scope_of(path, headers), parts(body[:50], body[50:])
    )
    assert status == 413
    assert json.loads(answer)["code"] == "too_large"
    assert f"at most {limit} bytes" in json.loads(answer)["message"]


@pytest.mark.parametrize(("path", "headers", "limit"), SIZES.values(), ids=SIZES)
def test_an_announced_size_above_the_limit_is_refused_unread(path, headers, limit):
    inner = Inner()
    announced = [*headers, ("content-length", str(limit + 1))]
    messages = parts(b"never read")
    status, _, _, unread = ask(guard_around(inner), scope_of(path, announced), messages)
    assert (status, inner.scopes, unread) == (413, [], messages)


def test_a_body_that_never_ends_is_left_once_the_limit_is_passed():
    endless = parts(*[b"a" * 60] * 50)
    status, _, _, unread = ask(guard_around(Inner()), scope_of("/tasks", JSON), endless)
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
    status, answer, sent, _ = ask(guard_around(inner), scope_of("/inference_image", FORM), endless)
    assert status == 413
    assert len(sent) == 2
    assert b"cannot parse" not in answer


def test_an_answer_that_began_before_the_body_was_read_is_not_torn():
    inner = Inner(start_first=True)
    endless = parts(b"a" * 400)
    with pytest.raises(Exception, match="at most 300 bytes"):
        ask(guard_around(inner), scope_of("/inference_image", FORM), endless)


@pytest.mark.parametrize(("path", "headers", "limit"), SIZES.values(), ids=SIZES)
def test_the_disconnect_of_a_client_still_arrives_after_the_body(path, headers, limit):
    inner = Inner()
    ask(guard_around(inner), scope_of(path, headers), parts(b'{"state":', b" {}}"))
    assert inner.last_message == {"type": "http.disconnect"}


def test_a_client_that_leaves_while_it_sends_json_is_not_answered_but_counted():
    inner, counted = Inner(), []
    guard = guard_around(inner, count_request=lambda *args: counted.append(args[:2]))
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

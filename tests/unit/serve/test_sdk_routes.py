"""The SDK's routes of the cache: what they take is checked, and a failure costs no connection."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from florence2.errors import RequestError
from serve.http.guard import install_error_handlers
from serve.http.sdk_routes import cacheable, register_sdk_routes


def png(size_wh=(2, 2)):
    file = io.BytesIO()
    Image.new("L", size_wh).save(file, "PNG")
    return file.getvalue()


CACHEABLE = {
    "images": {"image_ids": [1, 2], "dataset_id": 3},
    "hashes": {"image_hashes": ["a/b=", "c"]},
    "a video": {"video_id": 4},
    "frames": {"video_id": 4, "frame_indexes": [0, 2]},
    "ranges, also backwards": {"video_id": 4, "frame_ranges": [[0, 10], [20, 12]]},
}


@pytest.mark.parametrize("state", CACHEABLE.values(), ids=CACHEABLE)
def test_what_the_sdk_sends_for_the_cache_passes_unchanged(state):
    assert cacheable(state) == state


def test_an_empty_key_is_as_one_that_is_left_out():
    assert cacheable({"image_ids": None, "video_id": 4}) == {"video_id": 4}


REFUSED = {
    "nothing": ({}, "none was received"),
    "nothing but null": ({"image_ids": None}, "none was received"),
    "one number": ({"image_ids": 5}, "image_ids is a list"),
    "lists in the list": ({"image_ids": [[1]]}, "image_ids is a list"),
    "true": ({"image_ids": [True]}, "image_ids is a list"),
    "a negative id": ({"image_ids": [-1]}, "image_ids is a list"),
    "a text": ({"image_hashes": "abc"}, "image_hashes is a list"),
    "a path": ({"image_hashes": ["../a"]}, "image_hashes is a list"),
    "a video that is a name": ({"video_id": "a"}, "video_id is a whole number"),
    "frames of nothing": ({"frame_indexes": [1]}, "no video_id"),
    "ranges that are numbers": ({"video_id": 4, "frame_ranges": [1, 2]}, "list of pairs"),
    "a range of three": ({"video_id": 4, "frame_ranges": [[1, 2, 3]]}, "list of pairs"),
    "a range without end": ({"video_id": 4, "frame_ranges": [[0, 10**12]]}, "at most 10000"),
    "too many": ({"image_ids": [1] * 10_001}, "at most 10000"),
}


@pytest.mark.parametrize(("state", "words"), REFUSED.values(), ids=REFUSED)
def test_what_the_cache_would_fail_on_is_refused(state, words):
    with pytest.raises(RequestError, match=words):
        cacheable(state)


class FailingCache:
    def cache_files_task(self, files, state):
        raise TypeError("the SDK failed")


def test_a_cache_that_fails_after_the_answer_is_logged_and_costs_no_connection(caplog):
    server = FastAPI()
    install_error_handlers(server)
    services = SimpleNamespace(answering=None, sdk=SimpleNamespace(cache=FailingCache()))
    register_sdk_routes(server, services)
    client = TestClient(server)
    response = client.post(
        "/smart_cache_files",
        files=[("files", ("a.png", png()))],
        data={"state": '{"image_ids": [1]}'},
    )
    assert response.status_code == 200
    assert "the SDK failed" in caplog.text
    assert (
        client.post("/smart_cache_files", data={"state": '{"image_ids": [1]}'}).status_code == 400
    )

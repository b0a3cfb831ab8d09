"""Clients that repeat, leave, ask twice at once or name what is gone: each with its own request."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import requests
from contract_calls import App, annotation_of, assert_refused, classes_in, refused_now_or_later

GONE = 999_999
TOOL = {"task_prompt": None, "text": "car. moon", "mapping": None, "confidence_threshold": 0.0}
WINDOW = {"windowHeight": 256, "windowWidth": 256, "overlapY": 0, "overlapX": 0, "naive": False}


@dataclass(frozen=True)
class Asking:
    """A client's request: its route, the key of the ids, and what it sends beside them."""

    path: str
    key: str
    state: dict[str, Any]
    takes_many: bool = True

    def body(self, ids: list[int]) -> dict[str, Any]:
        return {**self.state, self.key: ids if self.takes_many else ids[0]}

    def entries(self, app: App, ids: list[int]) -> list[dict[str, Any]]:
        """The entries of the answer; of one that goes on behind it, once it has ended."""
        if self.path.endswith("_async"):
            progress, entries = app.done(self.path, self.body(ids))
            assert progress["exception"] is None
            return entries
        answer = app.post(self.path, self.body(ids))
        assert answer.status_code == 200, answer.text
        found = answer.json()
        return found if self.takes_many else [found]


CLIENTS = {
    "annotation tool": Asking("inference_image_id", "image_id", {"settings": TOOL}, False),
    "Apply NN to Images": Asking(
        "inference_batch_ids", "batch_ids", {"dataset_id": 1, "settings": TOOL}
    ),
    "Apply NN to Images, in windows": Asking(
        "inference_image_id_async",
        "image_id",
        {
            "settings": {
                **TOOL, "inference_mode": "sliding_window", "sliding_window_params": WINDOW
            }
        },
        False,
    ),
    "Apply Florence-2": Asking(
        "inference_image_id",
        "image_id",
        {"settings": {"mapping": None, "mode": "text_prompt", "text": "car. moon"}},
        False,
    ),
    "Predict App's preview": Asking(
        "inference_batch_ids_async",
        "images_ids",
        {"settings": {**TOOL, "inference_mode": "full_image", "recursive": False}},
    ),
    "Session": Asking(
        "inference_batch_ids", "batch_ids", {"settings": {"text": "car. moon"}, "upload": False}
    ),
    "Session, in the background": Asking(
        "inference_batch_ids_async",
        "images_ids",
        {"settings": {"text": "car. moon"}, "output_project_id": None, "batch_size": None},
    ),
}  # fmt: skip
LISTS = {name: asking for name, asking in CLIENTS.items() if asking.takes_many}
each_client = pytest.mark.parametrize("asking", CLIENTS.values(), ids=CLIENTS)
each_list = pytest.mark.parametrize("asking", LISTS.values(), ids=LISTS)


@pytest.fixture
def city(seeded):
    return seeded.image_ids["scene_city.jpg"]


def found_in(entries):
    return [classes_in(entry["annotation"]) for entry in entries]


@each_client
def test_a_request_that_comes_twice_at_once_and_again_has_one_answer(app, asking, city):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: found_in(asking.entries(app, [city])), range(2))
    assert first == second == found_in(asking.entries(app, [city]))
    assert first[0]


@each_client
def test_images_that_are_gone_are_named_in_a_sentence_and_not_tried_again(app, seeded, asking):
    # A client of the SDK tries again whatever is answered with 5xx.
    assert str(GONE) in refused_now_or_later(app, asking.path, asking.body([GONE]))


@each_list
def test_an_image_that_is_gone_costs_itself_and_keeps_its_place(app, asking, city):
    gone, found = asking.entries(app, [GONE, city])
    assert (gone["image_id"], gone["annotation"]) == (GONE, None)
    assert gone["error"]["code"] == "not_found"
    assert len(found["annotation"]["objects"]) == 3


@each_list
def test_no_ids_are_refused(app, asking, seeded):
    assert "image id" in refused_now_or_later(app, asking.path, asking.body([]))


@each_list
def test_one_image_named_twice_is_answered_twice(app, asking, city):
    first, second = found_in(asking.entries(app, [city, city]))
    assert first == second != []


SPELLINGS = ("batch_ids", "image_ids", "images_ids", "imageIds", "image_id", "imageId")


@pytest.mark.parametrize("key", SPELLINGS)
def test_ids_are_found_under_every_name_that_clients_ever_used(app, city, key):
    found = app.post("inference_image_id", {key: city, "settings": {"text": "car"}})
    assert classes_in(found.json()["annotation"]) == ["car", "car"]


@each_client
@pytest.mark.usefixtures("next_request_works")
def test_a_client_that_leaves_in_the_middle_holds_nobody_up(app, platform, asking, city):
    method = "images.bulk.download"
    with platform.faults.held(method):
        if asking.path.endswith("_async"):
            app.post(asking.path, asking.body([city]))
        else:
            with pytest.raises(requests.ReadTimeout):
                requests.post(
                    f"{app.url}/{asking.path}", json={"state": asking.body([city])}, timeout=0.2
                )


@pytest.mark.parametrize("again", ["stop_inference", "clear_inference_request"])
def test_a_request_may_be_stopped_and_cleared_as_often_as_a_client_likes(app, seeded, again):
    started = app.post("inference_project_id_async", {"projectId": seeded.project_id}).json()
    asked = {"inference_request_uuid": started["inference_request_uuid"]}
    for path in ("stop_inference", again, "get_inference_result", again, "get_inference_progress"):
        answer = app.post(path, asked)
        assert answer.status_code == 200, answer.text


def test_results_that_were_popped_do_not_come_again(app, city):
    asking = CLIENTS["Session, in the background"]
    uuid = app.post(asking.path, asking.body([city])).json()["inference_request_uuid"]
    _, first = app.finished(uuid)
    _, second = app.finished(uuid)
    assert (len(first), second) == (1, [])


def test_the_uuid_of_another_session_is_a_404_with_a_sentence(app, seeded):
    answer = app.post("get_inference_progress", {"inference_request_uuid": "0" * 32})
    assert_refused(answer, 404, says="start it again")


TWICE = {
    "a double click on a run that merges": ("iou_merge", ["car. moon", "car. moon"], 1 + 3),
    "a double click on one that appends": ("append", ["car. moon", "car. moon"], 1 + 3 + 3),
    "two people with prompts of their own": ("append", ["car", "moon"], 1 + 2 + 1),
    "a double click on one that replaces": ("replace", ["car. moon", "car. moon"], 3),
}


@pytest.mark.parametrize(("mode", "texts", "expected"), TWICE.values(), ids=TWICE)
def test_two_runs_over_an_image_at_once_lose_nothing(
    app, api, platform, city, mode, texts, expected
):
    def run(text):
        state = {"image_ids": [city], "settings": {"text": text}, "upload_mode": mode}
        return app.done("inference_batch_ids_async", state)

    with platform.faults.held("annotations.bulk.add") as gate, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(run, text) for text in texts]
        until = time.monotonic() + 0.4
        while platform.count("annotations.bulk.add") < 2 and time.monotonic() < until:
            time.sleep(0.02)
        gate.set()
        assert all(one.result()[0]["exception"] is None for one in running)
    assert len(annotation_of(api, city).labels) == expected


def test_no_datasets_are_none_and_not_all_of_them(app, seeded):
    state = {"projectId": seeded.project_id, "dataset_ids": []}
    progress, entries = app.done("inference_project_id_async", state)
    assert (progress["stage"], progress["exception"], entries) == ("Finished", None, [])


def test_a_run_that_is_deleted_from_under_is_told(app, platform, seeded):
    with platform.faults.held("images.bulk.download"):
        started = app.post("inference_project_id_async", {"projectId": seeded.project_id}).json()
        while not platform.count("images.bulk.download"):
            time.sleep(0.01)
        platform.state.images.clear()
    progress, _ = app.finished(started["inference_request_uuid"])
    assert progress["exception"]["message"].endswith((".", "?"))

"""Objects that labelers drew get attributes from the model, and stay what they are."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from contract_calls import assert_refused


@pytest.fixture
def tag_objects(app, seeded):
    def send(**state):
        images = {"image_ids": [seeded.labeled_id], "task_prompt": "<REGION_TO_CATEGORY>"}
        return app.post("tag_objects", {**images, **state})

    return send


@pytest.fixture
def figure(platform, seeded):
    """The labeler's object as the platform has it now."""
    return lambda: copy.deepcopy(platform.state.image(seeded.labeled_id).annotation["objects"][0])


def tags_of(figure):
    return {tag["name"]: tag.get("value") for tag in figure["tags"]}


def test_an_object_gets_a_tag_and_keeps_everything_else(tag_objects, figure):
    before = figure()

    answer = tag_objects()

    assert answer.status_code == 200, answer.text
    after = figure()
    assert {key: value for key, value in after.items() if key != "tags"} == {
        key: value for key, value in before.items() if key != "tags"
    }
    assert after["tags"][: len(before["tags"])] == before["tags"]
    assert set(tags_of(after)) == {"reviewed", "category"}
    assert tags_of(after)["category"]


def test_a_second_run_continues_and_writes_nothing_twice(tag_objects, figure, platform):
    tag_objects()
    first = figure()
    answer = tag_objects()
    assert answer.status_code == 200, answer.text
    assert figure() == first


@pytest.mark.parametrize("overwrite", [False, True])
def test_three_at_once_write_one_tag(tag_objects, figure, platform, overwrite):
    with ThreadPoolExecutor(3) as clients:
        with platform.faults.held("figures.tags.bulk.add"):
            asked = [clients.submit(tag_objects, overwrite=overwrite) for _ in range(3)]
            while platform.count("images.bulk.download") < 3:
                pass
            time.sleep(0.2)
        answers = [one.result() for one in asked]

    assert [one.status_code for one in answers] == [200, 200, 200]
    assert [tag["name"] for tag in figure()["tags"]] == ["reviewed", "category"]
    [entries] = zip(*[one.json() for one in answers], strict=True)
    assert sorted((one["written"], one["skipped"]) for one in entries) == [(0, 1), (0, 1), (1, 0)]


def test_a_repeat_after_a_time_out_writes_nothing_twice(app, tag_objects, figure, platform, seeded):
    state = {"image_ids": [seeded.labeled_id], "task_prompt": "<REGION_TO_CATEGORY>"}
    with platform.faults.held("figures.tags.bulk.add"):
        with pytest.raises(requests.Timeout):
            requests.post(f"{app.url}/tag_objects", json={"state": state}, timeout=1)
        with ThreadPoolExecutor(1) as client:
            again = client.submit(tag_objects)
            while platform.count("images.bulk.download") < 2:
                pass
            time.sleep(0.2)
            platform.faults.gates["figures.tags.bulk.add"].set()

    assert again.result().status_code == 200
    assert [tag["name"] for tag in figure()["tags"]] == ["reviewed", "category"]


def test_a_write_that_was_done_and_not_answered_is_not_repeated(tag_objects, figure, platform):
    platform.faults.lose("figures.tags.bulk.add")
    answer = tag_objects()
    assert answer.status_code == 200, answer.text
    assert [tag["name"] for tag in figure()["tags"]] == ["reviewed", "category"]


def test_overwriting_leaves_one_tag(tag_objects, figure):
    tag_objects()
    answer = tag_objects(overwrite=True)
    assert answer.status_code == 200, answer.text
    assert [tag["name"] for tag in figure()["tags"]] == ["reviewed", "category"]


def test_only_objects_of_chosen_classes_are_asked_about(tag_objects, figure):
    before = figure()
    tag_objects(classes=["outline"])
    assert figure() == before


def test_a_project_is_done_in_the_background(app, platform, seeded, figure):
    state = {"projectId": seeded.project_id, "task_prompt": "<REGION_TO_DESCRIPTION>"}
    progress, _ = app.done("tag_objects_async", state)
    assert progress["exception"] is None
    assert "description" in tags_of(figure())
    assert platform.count("annotations.bulk.add") == 0


def test_a_platform_that_refuses_the_tags_is_an_error_and_nothing_is_lost(
    tag_objects, figure, platform
):
    before = figure()
    for method in ("object-tags.add-to-object", "figures.tags.bulk.add"):
        platform.faults.fail(method, times=20, status=400)

    answer = tag_objects()

    assert answer.status_code >= 400
    assert answer.json()["success"] is False
    assert figure() == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({"task_prompt": None}, "task_prompt", id="no task"),
        pytest.param({"task_prompt": "<OD>"}, "<OD>", id="a task that is about no region"),
        pytest.param({"classes": "car"}, "classes", id="classes that are a text"),
        pytest.param({"overwrite": "yes please"}, "overwrite", id="overwrite"),
        pytest.param({"image_ids": ["a"]}, "image_ids", id="ids"),
        pytest.param({"image_ids": [999]}, "999", id="an unknown image"),
    ],
)
def test_what_cannot_be_asked_is_refused(tag_objects, figure, changes, says):
    before = figure()
    assert_refused(tag_objects(**changes), says=says)
    assert figure() == before

"""Runs over images by id: results, failures, what a stop leaves."""

import pytest
from platform_fakes import CodedError, FakePlatform, FakePredictor, png
from requests.exceptions import ConnectionError as ConnectionFailed
from requests.exceptions import HTTPError, Timeout

from florence2.errors import RequestError
from florence2.records import Failure
from serve.platform.failures import FailedImageError, PartialFailureError
from serve.sdk import sly

Stage = sly.nn.inference.inference_request.InferenceRequest.Stage
DAMAGED = png()[:60]


@pytest.mark.parametrize(
    "key", ["batch_ids", "image_ids", "images_ids", "imageIds", "image_id", "imageId"]
)
@pytest.mark.parametrize("ids", [3, [3]])
def test_every_spelling_of_the_ids_is_read(runner, platform, key, ids):
    [entry] = runner.ids(platform, {key: ids})
    assert (entry["image_id"], entry["dataset_id"], entry["project_id"]) == (3, 10, 1)
    assert entry["name"] == entry["image_name"] == "3.png"
    assert entry["annotation"]["objects"][0]["classTitle"] == "cat"
    assert entry["data"] == {}
    assert "error" not in entry


def test_results_are_in_the_order_asked_for_over_batches_and_datasets(runner):
    platform = FakePlatform(ids=[1, 2, 3], other_ids=[4, 5])
    asked = [5, 1, 4, 3, 2, 1]
    entries = runner.ids(platform, {"image_ids": asked, "batch_size": 2})
    assert [entry["image_id"] for entry in entries] == asked
    assert {entry["image_id"]: entry["dataset_id"] for entry in entries}[4] == 11


def test_a_single_image_is_interactive_and_several_are_bulk(runner, platform):
    predict = FakePredictor()
    runner.ids(platform, {"image_id": 1}, predict)
    runner.ids(platform, {"image_ids": [1, 2, 3, 4, 5]}, predict)
    assert predict.batches == [(1, False), (4, True), (1, True)]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "at least one image id"),
        ({"image_ids": []}, "at least one image id"),
        ({"image_id": "abc"}, "whole numbers"),
        ({"image_id": True}, "whole numbers"),
        ({"image_ids": [1, None]}, "whole numbers"),
        ({"image_id": 1, "batch_size": "abc"}, "batch_size"),
        ({"image_id": 1, "batch_size": 0}, "batch_size"),
        ({"image_id": 1, "batch_size": 257}, "batch_size"),
        ({"image_id": 1, "upload_mode": "apend"}, "Did you mean 'append'"),
        ({"image_id": 1, "upload_mode": 5}, "upload_mode"),
        ({"image_id": 1, "output_project_id": "x"}, "output_project_id"),
        ({"image_id": 1, "settings": {"existing_objects_iou_thresh": "x"}}, "iou_thresh"),
        ({"image_id": 1, "iou_merge_threshold": 1.5}, "iou_thresh"),
        ({"image_id": 1, "model_prediction_suffix": 5}, "model_prediction_suffix"),
    ],
)
def test_a_wrong_request_is_refused_before_any_work(runner, platform, state, words):
    with pytest.raises(RequestError, match=words):
        runner.ids(platform, state)
    assert platform.called("download") == []


def test_without_a_platform_ids_are_refused(runner):
    with pytest.raises(RequestError, match="not connected to a platform"):
        runner.ids(None, {"image_id": 1})


def test_an_unknown_image_fails_alone(runner, platform):
    good, missing, other = runner.ids(platform, {"image_ids": [1, 99, 2]})
    assert good["annotation"]["objects"]
    assert other["annotation"]["objects"]
    assert missing["image_id"] == 99
    assert missing["annotation"] is None
    assert missing["error"]["code"] == "not_found"


def test_when_all_images_are_unknown_the_request_is_wrong(runner, platform):
    with pytest.raises(RequestError, match="Image 98 does not exist") as caught:
        runner.ids(platform, {"image_ids": [98, 99]})
    assert caught.value.code == "not_found"


def test_a_damaged_image_fails_alone_with_its_own_code(runner, platform):
    platform.content[2] = DAMAGED
    entries = runner.ids(platform, {"image_ids": [1, 2, 3]})
    assert [entry["annotation"] is None for entry in entries] == [False, True, False]
    assert entries[1]["error"]["code"] == "bad_image"


def test_the_only_image_raises_its_failure(runner, platform):
    platform.content[2] = DAMAGED
    with pytest.raises(FailedImageError) as caught:
        runner.ids(platform, {"image_id": 2})
    assert caught.value.code == "bad_image"


def test_a_download_that_fails_costs_only_its_own_image(runner, platform):
    def fault(ids):
        if 2 in ids:
            raise HTTPError("500 for image 2")

    platform.download_fault = fault
    entries = runner.ids(platform, {"image_ids": [1, 2, 3]})
    assert [entry.get("error", {}).get("code") for entry in entries] == [
        None,
        "download_failed",
        None,
    ]
    assert [ids for [ids] in platform.called("download")] == [(1, 2, 3), (1,), (2,), (3,)]


@pytest.mark.parametrize("kind", [ConnectionFailed, Timeout])
def test_without_a_connection_images_are_not_tried_one_by_one(runner, platform, kind):
    def fault(ids):
        if 2 in ids:
            raise kind("no route to the platform")

    platform.download_fault = fault
    entries = runner.ids(platform, {"image_ids": [1, 2, 3, 4], "batch_size": 2})
    codes = [entry.get("error", {}).get("code") for entry in entries]
    assert codes == ["download_failed"] * 2 + [None] * 2
    assert len(platform.called("download")) == 2


def test_a_prediction_that_fails_is_tried_image_by_image(runner, platform):
    def before(images):
        if any(platform.content[2] == image for image in images):
            raise ZeroDivisionError("a fault of the model")

    predict = FakePredictor(before)
    entries = runner.ids(platform, {"image_ids": [1, 2, 3]}, predict)
    assert [entry["annotation"] is None for entry in entries] == [False, True, False]
    assert entries[1]["error"]["code"] == "internal_error"
    assert [size for size, _ in predict.batches] == [3, 1, 1, 1]


@pytest.mark.parametrize("code", ["bad_request", "device_lost", "not_deployed", "not_found"])
def test_what_fails_for_every_image_ends_the_run_at_once(runner, platform, code):
    def before(images):
        raise CodedError(code)

    predict = FakePredictor(before)
    with pytest.raises(CodedError) as caught:
        runner.ids(platform, {"image_ids": [1, 2, 3], "batch_size": 1}, predict)
    assert caught.value.code == code
    assert len(predict.batches) == 1


def test_a_run_that_ends_early_says_how_far_it_came_and_keeps_its_results(runner, platform):
    done = []

    def before(images):
        if done:
            raise CodedError("not_deployed")
        done.append(images)

    request = runner.finish(
        platform, {"image_ids": [1, 2, 3], "batch_size": 1}, FakePredictor(before)
    )
    assert request.stage == Stage.ERROR
    assert "stopped after 1 of 3 images" in str(request.exception)
    assert "This is not_deployed." in str(request.exception)
    assert [entry["image_id"] for entry in request.pop_pending_results()] == [1]


def test_a_device_that_fails_ends_the_run_which_names_the_images_it_ended_with(runner, platform):
    lost = Failure("device_lost", "The device cuda:0 failed.")

    def predict(images, settings, **how):
        predicted = FakePredictor()(images, settings, **how)
        return predicted if not asked else [predicted[0], *[lost] * (len(images) - 1)]

    asked: list[int] = []

    def counted(images, settings, **how):
        try:
            return predict(images, settings, **how)
        finally:
            asked.append(len(images))

    state = {"image_ids": [1, 2, 3, 4, 5, 6], "batch_size": 2}
    request = runner.finish(platform, state, counted)
    assert request.stage == Stage.ERROR
    assert asked == [2, 2]
    assert "stopped after 2 of 6 images" in str(request.exception)
    assert "ids 3, 4" in str(request.exception)
    assert "The device cuda:0 failed." in str(request.exception)
    entries = request.pop_pending_results()
    assert [entry["image_id"] for entry in entries] == [1, 2, 3, 4]
    assert [entry["annotation"] is None for entry in entries] == [False, False, True, True]


def test_progress_counts_every_image_once(runner, platform):
    platform.content[2] = DAMAGED
    request = runner.finish(platform, {"image_ids": [1, 2, 3, 99]})
    assert (request.progress.current, request.progress.total) == (4, 4)
    assert [failed["image_id"] for failed in request.context["failures"]] == [2, 99]
    assert request.stage == Stage.FINISHED


def test_a_project_run_goes_through_all_datasets_and_reports_failures_at_the_end(runner):
    platform = FakePlatform(ids=[1, 2], other_ids=[3, 4])
    platform.content[4] = DAMAGED
    request = runner.project(platform, {"project_id": 1})
    assert request.stage == Stage.ERROR
    assert isinstance(request.exception, PartialFailureError)
    assert "1 of 4 images failed and has no result (id 4)" in str(request.exception)
    entries = request.pop_pending_results()
    assert [entry["image_id"] for entry in entries] == [1, 2, 3, 4]
    assert [failed.image_id for failed in request.exception.failures] == [4]


@pytest.mark.parametrize("key", ["dataset_ids", "datasetIds"])
def test_a_project_run_can_be_held_to_some_datasets(runner, key):
    platform = FakePlatform(ids=[1, 2], other_ids=[3, 4])
    request = runner.project(platform, {"projectId": 1, key: [11]})
    assert [entry["image_id"] for entry in request.pop_pending_results()] == [3, 4]


def test_an_empty_project_is_finished_at_once(runner):
    request = runner.project(FakePlatform(), {"projectId": 1})
    assert request.stage == Stage.FINISHED
    assert request.exception is None


@pytest.mark.parametrize(
    ("state", "kind", "words"),
    [
        ({}, "images", "needs one project id"),
        ({"project_id": 9}, "images", "Project 9 does not exist"),
        ({"project_id": 1}, "videos", "Only projects of images"),
        ({"project_id": 1, "dataset_ids": [77]}, "images", "no dataset 77"),
    ],
)
def test_a_wrong_project_is_refused(runner, platform, state, kind, words):
    platform.projects[1].type = kind
    request = runner.project(platform, state)
    assert isinstance(request.exception, RequestError)
    assert words in str(request.exception)


def test_a_result_for_each_image_is_insisted_on(runner, platform):
    def predict(images, settings, **call):
        return FakePredictor()(images, settings, **call)[:1]

    entries = runner.ids(platform, {"image_ids": [1, 2]}, predict)
    assert all(entry["annotation"] for entry in entries)

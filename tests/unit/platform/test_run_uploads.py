"""Runs that write labels to the platform, with the SDK's own ``upload_predictions``."""

import pytest
from platform_fakes import FakePlatform, FakePredictor, annotation, png, rectangle
from requests.exceptions import ConnectionError as ConnectionFailed

from serve.platform.failures import FailedImageError, PartialFailureError
from serve.predict.annotations import TAG_METAS
from serve.sdk import sly

Stage = sly.nn.inference.inference_request.InferenceRequest.Stage
DAMAGED = png()[:60]
HUMAN = rectangle("dog", (0, 0, 5, 5))


def with_labels(platform, image_id, *labels):
    platform.annotations[image_id] = annotation(*labels).to_json()
    for label in labels:
        meta = platform.metas[1]
        if meta.get_obj_class(label.obj_class.name) is None:
            platform.metas[1] = meta.add_obj_class(label.obj_class)


def names(platform, image_id):
    return [label.obj_class.name for label in platform.uploads[image_id].labels]


def failing_for(*image_ids, kind=ValueError):
    def fault(ids):
        if set(ids) & set(image_ids):
            raise kind("refused")

    return fault


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("append", ["dog", "cat"]), ("iou_merge", ["dog", "cat"]), ("replace", ["cat"])],
)
def test_each_upload_mode_does_with_existing_labels_what_it_says(runner, platform, mode, expected):
    with_labels(platform, 1, HUMAN)
    [entry] = runner.ids(platform, {"image_id": 1, "upload_mode": mode})
    assert names(platform, 1) == expected
    assert entry["annotation"] is entry["data"] is None
    assert "error" not in entry
    assert platform.metas[1].get_obj_class("cat") is not None


def test_uploaded_labels_are_marked_as_made_by_a_model(runner, platform):
    runner.ids(platform, {"image_id": 1, "upload_mode": "append"})
    assert platform.uploads[1].labels[0].to_json()["nnCreated"] is True


@pytest.mark.parametrize(
    "state",
    [
        {"upload_mode": "iou_merge"},
        {"upload_mode": "append", "settings": {"existing_objects_iou_thresh": 0.5}},
        {"upload_mode": "append", "settings": {"existing_objects_iou_thresh": 1}},
        {"upload_mode": "append", "iou_merge_threshold": 0.5},
    ],
)
def test_objects_that_are_labeled_already_are_left_out(runner, platform, state):
    with_labels(platform, 1, rectangle("cat"))
    runner.ids(platform, {"image_id": 1, **state})
    assert platform.uploads == {}, "nothing new, so nothing is written"


def test_the_same_object_under_another_class_stays(runner, platform):
    with_labels(platform, 1, rectangle("dog"))
    runner.ids(platform, {"image_id": 1, "upload_mode": "iou_merge"})
    assert names(platform, 1) == ["dog", "cat"]


def test_a_second_run_knows_its_own_labels_under_their_renamed_class(runner, platform):
    polygon = sly.Label(
        sly.Polygon([sly.PointLocation(*point) for point in [(0, 0), (0, 9), (9, 9)]]),
        sly.ObjClass("cat", sly.Polygon),
    )
    with_labels(platform, 1, polygon)
    for _ in range(2):
        runner.ids(platform, {"image_id": 1, "upload_mode": "iou_merge"})
    assert names(platform, 1) == ["cat", "cat_nn"]
    assert len(platform.called("upload")) == 1


def test_an_image_without_new_labels_is_not_written_in_append_mode(runner, platform):
    with_labels(platform, 1, HUMAN)
    state = {"image_id": 1, "upload_mode": "append"}
    [entry] = runner.ids(platform, state, FakePredictor(labels=[]))
    assert platform.uploads == {}
    assert entry["image_id"] == 1


def test_replacing_with_nothing_is_written(runner, platform):
    with_labels(platform, 1, HUMAN)
    state = {"image_id": 1, "upload_mode": "replace"}
    runner.ids(platform, state, FakePredictor(labels=[]))
    assert names(platform, 1) == []


def test_create_copies_the_images_to_a_project_made_once(runner):
    platform = FakePlatform(ids=[1, 2], other_ids=[3])
    request = runner.project(platform, {"project_id": 1, "upload_mode": "create", "batch_size": 1})
    assert request.stage == Stage.FINISHED
    assert platform.called("create_project") == [["Predictions from task #3"]]
    copies = [one for one in platform.infos.values() if one.id > 1000]
    assert sorted(copy.name for copy in copies) == ["1.png", "2.png", "3.png"]
    assert all(platform.datasets[copy.dataset_id].project_id == 2 for copy in copies)
    assert set(platform.uploads) == {copy.id for copy in copies}
    assert {one["image_id"] for one in request.pop_pending_results()} == {1, 2, 3}


def test_an_output_project_gets_copies_without_what_is_labeled_in_the_source(runner, platform):
    platform.projects[2], platform.metas[2] = platform._project(2), sly.ProjectMeta()
    with_labels(platform, 1, rectangle("cat"))
    runner.ids(platform, {"image_ids": [1, 2], "output_project_id": 2, "upload_mode": "iou_merge"})
    uploaded = {platform.infos[one].name: len(ann.labels) for one, ann in platform.uploads.items()}
    assert uploaded == {"1.png": 0, "2.png": 1}


def test_the_source_as_output_project_means_the_images_themselves(runner, platform):
    runner.ids(platform, {"image_id": 1, "output_project_id": 1})
    assert set(platform.uploads) == {1}
    assert all(image_id < 1000 for image_id in platform.infos)


def test_a_damaged_image_among_others_is_never_written_and_is_told_at_the_end(runner, platform):
    platform.content[2] = DAMAGED
    with_labels(platform, 2, HUMAN)
    request = runner.finish(platform, {"image_ids": [1, 2, 3], "upload_mode": "replace"})
    assert request.stage == Stage.ERROR
    assert isinstance(request.exception, PartialFailureError)
    message = str(request.exception)
    assert "1 of 3 images failed and has no new labels (id 2)" in message
    assert "The others are done. Send these ids again." in message
    assert set(platform.uploads) == {1, 3}
    entries = {entry["image_id"]: entry for entry in request.pop_pending_results()}
    assert entries[2]["error"]["code"] == "bad_image"
    assert entries[2]["annotation"] is None
    assert "error" not in entries[1]
    [failure] = request.context["failures"]
    assert (failure["image_id"], failure["code"]) == (2, "bad_image")


def test_an_upload_that_fails_is_tried_image_by_image_and_costs_only_its_own(runner, platform):
    platform.upload_fault = failing_for(2)
    request = runner.finish(platform, {"image_ids": [1, 2, 3], "upload_mode": "append"})
    assert set(platform.uploads) == {1, 3}
    assert [failed["image_id"] for failed in request.context["failures"]] == [2]
    assert request.context["failures"][0]["code"] == "upload_failed"
    assert (request.progress.current, request.progress.total) == (3, 3)


@pytest.mark.parametrize("mode", ["append", "iou_merge"])
def test_an_upload_that_failed_in_part_does_not_double_or_lose_labels(runner, platform, mode):
    with_labels(platform, 1, HUMAN)
    broken = []
    upload = platform.annotation.upload_anns

    def upload_part(ids, annotations):
        if not broken:
            broken.append(upload(ids[:1], annotations[:1]))
            raise ValueError("the second half is refused")
        upload(ids, annotations)

    platform.annotation.upload_anns = upload_part
    runner.ids(platform, {"image_ids": [1, 2], "upload_mode": mode})
    assert names(platform, 1) == ["dog", "cat"]
    assert names(platform, 2) == ["cat"]


def test_a_copy_left_by_a_failed_upload_is_labeled_and_not_copied_again(runner, platform):
    platform.projects[2], platform.metas[2] = platform._project(2), sly.ProjectMeta()
    faults = [ValueError("once")]

    def fault(ids):
        if faults:
            raise faults.pop()

    platform.upload_fault = fault
    entries = runner.ids(platform, {"image_ids": [1, 2], "output_project_id": 2})
    copies = [one for one in platform.infos.values() if one.id > 1000]
    assert sorted(copy.name for copy in copies) == ["1.png", "2.png"]
    assert set(platform.uploads) == {copy.id for copy in copies}
    assert sorted(entry["image_id"] for entry in entries) == [1, 2]


def test_three_lost_batches_in_a_row_end_the_run(runner, platform):
    platform.upload_fault = failing_for(2, 3, 4, 5, 6)
    state = {"image_ids": [1, 2, 3, 4, 5, 6], "batch_size": 1, "upload_mode": "append"}
    request = runner.finish(platform, state)
    assert isinstance(request.exception, PartialFailureError)
    assert "3 batches in a row could not be uploaded" in str(request.exception)
    assert "stopped after 1 of 6 images" in str(request.exception)
    assert [failed["image_id"] for failed in request.context["failures"]] == [2, 3, 4]


def test_without_a_connection_images_are_not_tried_one_by_one(runner, platform):
    platform.upload_fault = failing_for(1, 2, 3, kind=ConnectionFailed)
    request = runner.finish(platform, {"image_ids": [1, 2, 3], "upload_mode": "append"})
    assert len(platform.called("upload")) == 1
    assert "3 of 3 images failed" in str(request.exception)


def test_the_only_upload_raises_its_own_failure(runner, platform):
    platform.upload_fault = failing_for(1)
    with pytest.raises(FailedImageError, match="labels of image 1") as caught:
        runner.ids(platform, {"image_id": 1, "upload_mode": "append"})
    assert caught.value.code == "upload_failed"


def test_classes_added_by_somebody_else_meanwhile_survive(runner, platform):
    def add_by_hand(ids):
        if 1 in ids:
            by_hand = sly.ObjClass("by hand", sly.Rectangle)
            platform.metas[1] = platform.metas[1].add_obj_class(by_hand)

    def before(images):
        if len(predict.batches) == 2:
            predict.labels = [rectangle("new class")]

    predict = FakePredictor(before)
    platform.upload_fault = add_by_hand
    state = {"image_ids": [1, 2], "batch_size": 1, "upload_mode": "append"}
    runner.finish(platform, state, predict)
    assert {one.name for one in platform.metas[1].obj_classes} == {"cat", "by hand", "new class"}


def test_labels_of_a_class_that_came_meanwhile_are_no_failure(runner, platform):
    def label_by_hand(ids):
        if 1 in ids:
            with_labels(platform, 2, rectangle("by hand"))

    platform.upload_fault = label_by_hand
    state = {"image_ids": [1, 2], "batch_size": 1, "upload_mode": "append"}
    request = runner.finish(platform, state)
    assert request.stage == Stage.FINISHED, request.exception
    assert names(platform, 2) == ["by hand", "cat"]


def test_numbers_do_not_go_into_a_tag_of_texts(runner):
    theirs = sly.TagMeta("confidence", sly.TagValueType.ANY_STRING)
    platform = FakePlatform(ids=[1], meta=sly.ProjectMeta(tag_metas=[theirs]))
    ours = rectangle("cat", tags=[sly.Tag(TAG_METAS["confidence"], 0.5)])
    state = {"image_id": 1, "upload_mode": "append"}
    runner.ids(platform, state, FakePredictor(labels=[ours]))
    [label] = platform.uploads[1].labels
    assert [(tag.name, tag.value) for tag in label.tags] == [("confidence_nn", 0.5)]
    assert platform.metas[1].get_tag_meta("confidence_nn").value_type == "any_number"


def test_names_that_clash_take_the_suffix_asked_for(runner):
    theirs = sly.TagMeta("confidence", sly.TagValueType.ANY_STRING)
    platform = FakePlatform(ids=[1], meta=sly.ProjectMeta(tag_metas=[theirs]))
    ours = rectangle("cat", tags=[sly.Tag(TAG_METAS["confidence"], 0.5)])
    state = {"image_id": 1, "upload_mode": "append", "model_prediction_suffix": "_f2"}
    runner.ids(platform, state, FakePredictor(labels=[ours]))
    assert [tag.name for tag in platform.uploads[1].labels[0].tags] == ["confidence_f2"]


def test_a_run_that_uploads_is_not_paused_by_results_nobody_fetches(runner, platform, monkeypatch):
    request = runner.create()
    monkeypatch.setattr(type(request), "PENDING_RESULTS_MAX_SIZE", 1)
    monkeypatch.setattr(type(request), "PAUSE_SLEEP_MAX_WAIT", -1)
    state = {"image_ids": [1, 2, 3, 4, 5, 6], "batch_size": 1, "upload_mode": "append"}
    runner.finish(platform, state, request=request)
    assert request.stage == Stage.FINISHED
    assert set(platform.uploads) == {1, 2, 3, 4, 5, 6}


def test_the_context_does_not_grow_with_the_images(runner, platform):
    request = runner.finish(
        platform, {"image_ids": [1, 2, 3, 4], "batch_size": 1, "upload_mode": "append"}
    )
    assert request.context["annotation"] == {}
    assert request.context["image_info"] == {}


def test_a_stopped_upload_keeps_what_is_uploaded(runner, platform):
    request = runner.create()

    def before(images):
        if len(predict.batches) == 2:
            request.stop()

    predict = FakePredictor(before)
    state = {"image_ids": [1, 2, 3], "batch_size": 1, "upload_mode": "append"}
    runner.finish(platform, state, predict, request)
    assert request.stage == Stage.CANCELLED
    assert set(platform.uploads) == {1, 2}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("mode", ["append", "iou_merge", "replace", "create"])
def test_an_image_named_twice_gets_its_labels_once(runner, platform, mode, batch_size):
    state = {"image_ids": [1, 2, 1, 1], "upload_mode": mode, "batch_size": batch_size}
    request = runner.finish(platform, state)
    assert [entry["image_id"] for entry in request.pop_pending_results()] == [1, 2]
    assert [len(uploaded.labels) for uploaded in platform.uploads.values()] == [1, 1]

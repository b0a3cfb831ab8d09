"""Runs that write labels to the platform, with the SDK's own ``upload_predictions``."""

import threading
from types import SimpleNamespace

import pytest
from platform_fakes import (
    DAMAGED,
    FakePlatform,
    FakePredictor,
    Stage,
    annotation,
    fails_for,
    failures_of,
    rectangle,
    services,
    wait_until,
)
from requests.exceptions import ConnectionError as ConnectionFailed

from serve.platform.failures import FailedImageError, PartialFailureError
from serve.platform.project_run import run_image_ids, run_project
from serve.platform.upload import compatible_tag_meta, with_compatible_tags
from serve.predict.annotations import TAG_METAS
from serve.provenance import RUN_TAG
from serve.sdk import sly

Type = sly.TagValueType
CONFIDENCE = TAG_METAS["confidence"]
AS_TEXT = sly.TagMeta("confidence", Type.ANY_STRING)
HUMAN = rectangle("dog", (0, 0, 5, 5))
IDS = {"image_ids": [1, 2, 3], "upload_mode": "append"}
ONE_BY_ONE = {**IDS, "batch_size": 1}


def sure():
    return rectangle(tags=[sly.Tag(CONFIDENCE, 0.5)])


def labels_by_name(platform):
    """How many labels each uploaded image has."""
    return {platform.infos[one].name: len(ann.labels) for one, ann in platform.uploads.items()}


@pytest.mark.parametrize(
    ("mode", "labels", "expected"),
    [
        ("append", None, ["dog", "cat"]),
        ("iou_merge", None, ["dog", "cat"]),
        ("replace", None, ["cat"]),
        ("replace", [], []),
    ],
)
def test_each_upload_mode_does_with_existing_labels_what_it_says(
    runner, platform, mode, labels, expected
):
    platform.add_label(1, HUMAN)
    predict = FakePredictor(labels=labels)
    [entry] = runner.ids(platform, {"image_id": 1, "upload_mode": mode}, predict)
    assert platform.classes_uploaded(1) == expected
    assert all(label.to_json()["nnCreated"] for label in platform.uploads[1].labels[-1:])
    assert entry["annotation"] is entry["data"] is None
    assert "error" not in entry
    known = {one.name for one in platform.metas[1].obj_classes}
    assert set(expected) <= known


@pytest.mark.parametrize(
    ("labels", "state"),
    [
        ([], {"upload_mode": "append"}),
        (None, {"upload_mode": "iou_merge"}),
        (None, {"upload_mode": "append", "settings": {"existing_objects_iou_thresh": 0.5}}),
        (None, {"upload_mode": "append", "settings": {"existing_objects_iou_thresh": 1}}),
        (None, {"upload_mode": "append", "iou_merge_threshold": 0.5}),
    ],
)
def test_nothing_is_written_where_there_is_nothing_new(runner, platform, labels, state):
    platform.add_label(1, rectangle("cat"))
    [entry] = runner.ids(platform, {"image_id": 1, **state}, FakePredictor(labels=labels))
    assert platform.uploads == {}
    assert entry["image_id"] == 1


def test_the_meta_of_a_project_becomes_json_as_often_for_five_images_as_for_two(
    runner, monkeypatch
):
    """The SDK asks for it with every image, and that takes longer than all else about one."""
    made = []
    original = sly.ProjectMeta.to_json

    def to_json(meta):
        made.append(meta)
        return original(meta)

    monkeypatch.setattr(sly.ProjectMeta, "to_json", to_json)
    counts = []
    for ids in ([1, 2], [1, 2, 3, 4, 5]):
        made.clear()
        runner.ids(FakePlatform(range(1, 6)), {**ONE_BY_ONE, "image_ids": ids}, FakePredictor())
        counts.append(len(made))
    assert counts[0] == counts[1] > 0


def test_a_meta_that_is_asked_for_with_every_batch_is_read_again_only_once_it_is_another(
    runner, monkeypatch
):
    read = []
    original = sly.ProjectMeta.from_json.__func__

    def from_json(cls, stored):
        read.append(stored)
        return original(cls, stored)

    def before(images):
        if images == [platform.content[4]]:
            wait_until(lambda: 3 in platform.uploads)
            platform.add_label(4, rectangle("by hand"))

    monkeypatch.setattr(sly.ProjectMeta, "from_json", classmethod(from_json))
    platform = FakePlatform(range(1, 6), meta=sly.ProjectMeta([rectangle().obj_class]))
    platform.projects[1].custom_data, platform.projects[1].team_id = {}, 1
    platform.file = SimpleNamespace(list=lambda team_id, folder, **options: [])
    state = {"image_ids": [1, 2, 3, 4, 5], "batch_size": 1, "upload_mode": "replace_own"}
    request = runner.finish(platform, state, FakePredictor(before))
    assert (request.exception, platform.classes_uploaded(4)) == (None, ["by hand", "cat"])
    assert len(platform.called("update_meta")) == 1
    assert len(read) == 3, "at first, with our tag, and with the class by hand"


def test_the_same_object_under_another_class_stays(runner, platform):
    platform.add_label(1, rectangle("dog"))
    runner.ids(platform, {"image_id": 1, "upload_mode": "iou_merge"})
    assert platform.classes_uploaded(1) == ["dog", "cat"]


def test_a_second_run_knows_its_own_labels_under_their_renamed_class(runner, platform):
    corners = [sly.PointLocation(*point) for point in [(0, 0), (0, 9), (9, 9)]]
    platform.add_label(1, sly.Label(sly.Polygon(corners), sly.ObjClass("cat", sly.Polygon)))
    for _ in range(2):
        runner.ids(platform, {"image_id": 1, "upload_mode": "iou_merge"})
    assert platform.classes_uploaded(1) == ["cat", "cat_nn"]
    assert len(platform.called("upload")) == 1


def test_create_copies_the_images_to_a_project_made_once(runner):
    platform = FakePlatform(ids=[1, 2], other_ids=[3])
    state = {"project_id": 1, "upload_mode": "create", "batch_size": 1}
    request = runner.finish(platform, state, work=run_project)
    assert request.stage == Stage.FINISHED
    assert platform.called("create_project") == [["Predictions from task #3"]]
    assert labels_by_name(platform) == {"1.png": 1, "2.png": 1, "3.png": 1}
    assert {platform.datasets[copy.dataset_id].project_id for copy in platform.copies} == {2}
    assert set(platform.uploads) == {copy.id for copy in platform.copies}
    assert {one["image_id"] for one in request.pop_pending_results()} == {1, 2, 3}


def test_an_output_project_gets_copies_without_what_is_labeled_in_the_source(runner, platform):
    platform.add_project(2)
    platform.add_label(1, rectangle("cat"))
    runner.ids(platform, {"image_ids": [1, 2], "output_project_id": 2, "upload_mode": "iou_merge"})
    assert labels_by_name(platform) == {"1.png": 0, "2.png": 1}


def test_the_source_as_output_project_means_the_images_themselves(runner, platform):
    runner.ids(platform, {"image_id": 1, "output_project_id": 1})
    assert set(platform.uploads) == {1}
    assert platform.copies == []


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("mode", ["append", "iou_merge", "replace", "create"])
def test_an_image_named_twice_gets_its_labels_once(runner, platform, mode, batch_size):
    state = {"image_ids": [1, 2, 1, 1], "upload_mode": mode, "batch_size": batch_size}
    request = runner.finish(platform, state)
    assert [entry["image_id"] for entry in request.pop_pending_results()] == [1, 2]
    assert labels_by_name(platform) == {"1.png": 1, "2.png": 1}


def test_a_damaged_image_among_others_is_never_written_and_is_told_at_the_end(runner, platform):
    platform.content[2] = DAMAGED
    platform.add_label(2, HUMAN)
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


def test_an_upload_that_fails_is_tried_image_by_image_and_costs_only_its_own(runner, platform):
    platform.upload_fault = fails_for(2)
    request = runner.finish(platform, IDS)
    assert set(platform.uploads) == {1, 3}
    assert failures_of(request) == {2: "upload_failed"}
    assert (request.progress.current, request.progress.total) == (3, 3)


@pytest.mark.parametrize("mode", ["append", "iou_merge"])
def test_an_upload_that_failed_in_part_does_not_double_or_lose_labels(runner, platform, mode):
    platform.add_label(1, HUMAN)
    broken = []
    upload = platform.annotation.upload_anns

    def upload_part(ids, annotations):
        if not broken:
            broken.append(upload(ids[:1], annotations[:1]))
            raise ValueError("the second half is refused")
        upload(ids, annotations)

    platform.annotation.upload_anns = upload_part
    runner.ids(platform, {"image_ids": [1, 2], "upload_mode": mode})
    assert platform.classes_uploaded(1) == ["dog", "cat"]
    assert platform.classes_uploaded(2) == ["cat"]


def test_a_copy_left_by_a_failed_upload_is_labeled_and_not_copied_again(runner, platform):
    platform.add_project(2)
    platform.upload_fault = fails_for(times=1)
    entries = runner.ids(platform, {"image_ids": [1, 2], "output_project_id": 2})
    assert sorted(copy.name for copy in platform.copies) == ["1.png", "2.png"]
    assert set(platform.uploads) == {copy.id for copy in platform.copies}
    assert sorted(entry["image_id"] for entry in entries) == [1, 2]


def test_three_lost_batches_in_a_row_end_the_run(runner, platform):
    platform.upload_fault = fails_for(2, 3, 4, 5, 6)
    request = runner.finish(platform, {**ONE_BY_ONE, "image_ids": [1, 2, 3, 4, 5, 6]})
    assert isinstance(request.exception, PartialFailureError)
    assert "3 batches in a row could not be uploaded" in str(request.exception)
    assert "stopped after 1 of 6 images" in str(request.exception)
    assert list(failures_of(request)) == [2, 3, 4]


def test_without_a_platform_images_are_not_tried_one_by_one(runner, platform, away):
    platform.upload_fault = fails_for(1, 2, 3, error=ConnectionFailed)
    away(platform)
    request = runner.finish(platform, IDS)
    assert set(map(tuple, platform.called("upload"))) == {((1, 2, 3),)}
    assert "3 of 3 images failed" in str(request.exception)


def test_the_only_upload_raises_its_own_failure(runner, platform):
    platform.upload_fault = fails_for(1)
    with pytest.raises(FailedImageError, match="labels of image 1") as caught:
        runner.ids(platform, {"image_id": 1, "upload_mode": "append"})
    assert caught.value.code == "upload_failed"


def test_classes_added_by_somebody_else_meanwhile_survive(runner, platform):
    def add_by_hand(ids):
        if 1 in ids:
            by_hand = sly.ObjClass("by hand", sly.Rectangle)
            platform.metas[1] = platform.metas[1].add_obj_class(by_hand)

    def before(images):
        if images == [platform.content[2]]:
            wait_until(lambda: 1 in platform.uploads)
            predict.labels = [rectangle("new class")]

    predict = FakePredictor(before)
    platform.upload_fault = add_by_hand
    runner.finish(platform, ONE_BY_ONE, predict)
    assert {one.name for one in platform.metas[1].obj_classes} == {"cat", "by hand", "new class"}


def test_a_click_waits_for_a_run_that_hangs_only_where_both_write_on_one_image(runner, platform):
    hangs, goes_on = threading.Event(), threading.Event()

    def fault(ids):
        if ids == [1, 2] and not goes_on.is_set():
            hangs.set()
            assert goes_on.wait(60)

    platform.upload_fault = fault
    run, _ = runner.start(
        lambda api, state, inference_request: run_image_ids(
            api, state, inference_request, services()
        ),
        platform,
        {"image_ids": [1, 2], "upload_mode": "append"},
    )
    assert hangs.wait(60)
    runner.ids(platform, {"image_id": 3, "upload_mode": "append"})
    assert list(platform.uploads) == [3]
    dog = FakePredictor(labels=[HUMAN])
    clicked, _ = runner.start(
        lambda api, state, inference_request: run_image_ids(
            api, state, inference_request, services(dog)
        ),
        platform,
        {"image_id": 2, "upload_mode": "append"},
    )
    wait_until(lambda: dog.batches)
    goes_on.set()
    wait_until(lambda: run.is_finished() and clicked.is_finished())
    assert platform.classes_uploaded(2) == ["cat", "dog"]


def test_labels_of_a_class_that_came_meanwhile_are_no_failure(runner, platform):
    def label_by_hand(ids):
        if 1 in ids:
            platform.add_label(2, rectangle("by hand"))

    platform.upload_fault = label_by_hand
    request = runner.finish(platform, ONE_BY_ONE)
    assert request.stage == Stage.FINISHED, request.exception
    assert platform.classes_uploaded(2) == ["by hand", "cat"]


def test_the_context_does_not_grow_with_the_images(runner, platform):
    request = runner.finish(platform, ONE_BY_ONE)
    assert request.context["annotation"] == {}
    assert not request.context.get("image_info")


@pytest.mark.parametrize(("suffix", "name"), [(None, "confidence_nn"), ("_f2", "confidence_f2")])
def test_numbers_do_not_go_into_a_tag_of_texts(runner, suffix, name):
    platform = FakePlatform(ids=[1], meta=sly.ProjectMeta(tag_metas=[AS_TEXT]))
    state = {"image_id": 1, "upload_mode": "append", "model_prediction_suffix": suffix}
    runner.ids(platform, state, FakePredictor(labels=[sure()]))
    [label] = platform.uploads[1].labels
    told = [(tag.name, tag.value) for tag in label.tags if tag.name != RUN_TAG.name]
    assert told == [(name, 0.5)]
    assert platform.metas[1].get_tag_meta(name).value_type == Type.ANY_NUMBER


def number(name="confidence", **limits):
    return sly.TagMeta(name, Type.ANY_NUMBER, **limits)


ON_IMAGES = sly.TagApplicableTo.IMAGES_ONLY
FITTING_NAMES = {
    "a free name": ([], "confidence"),
    "the same": ([number()], "confidence"),
    "text instead of a number": ([AS_TEXT], "confidence_nn"),
    "only on images": ([number(applicable_to=ON_IMAGES)], "confidence_nn"),
    "only on some classes": ([number(applicable_classes=["dog"])], "confidence_nn"),
    "the other name is taken too": (
        [AS_TEXT, sly.TagMeta("confidence_nn", Type.NONE)],
        "confidence_nn_2",
    ),
    "the other name is ours from before": ([AS_TEXT, number("confidence_nn")], "confidence_nn"),
}


@pytest.mark.parametrize(("metas", "expected"), FITTING_NAMES.values(), ids=FITTING_NAMES)
def test_the_name_of_a_tag_is_the_first_that_fits(metas, expected):
    fitting = compatible_tag_meta(CONFIDENCE, sly.ProjectMeta(tag_metas=metas))
    assert (fitting.name, fitting.value_type) == (expected, Type.ANY_NUMBER)


@pytest.mark.parametrize(
    ("theirs", "fits"), [(["a", "b", "c"], True), (["a"], False)], ids=["as many", "fewer"]
)
def test_a_tag_of_choices_fits_where_all_of_its_choices_are(theirs, fits):
    wanted = sly.TagMeta("kind", Type.ONEOF_STRING, possible_values=["a", "b"])
    known = sly.TagMeta("kind", Type.ONEOF_STRING, possible_values=theirs)
    fitting = compatible_tag_meta(wanted, sly.ProjectMeta(tag_metas=[known]))
    assert fitting.name == ("kind" if fits else "kind_nn")


def test_the_sdk_leaves_a_number_under_a_tag_of_texts_and_this_does_not():
    project, ours = sly.ProjectMeta(tag_metas=[AS_TEXT]), annotation(sure())
    update = sly.nn.inference.inference.update_meta_and_ann
    _, theirs, _ = update(project, ours)
    assert theirs.labels[0].tags.get("confidence") is not None, "the defect is gone from the SDK"

    meta, uploaded, _ = update(project, with_compatible_tags(ours, project))
    [tag] = uploaded.labels[0].tags
    assert (tag.name, tag.value) == ("confidence_nn", 0.5)
    assert meta.get_tag_meta("confidence_nn").value_type == Type.ANY_NUMBER


def test_an_annotation_that_fits_is_left_as_it_is():
    ours = annotation(sure())
    assert with_compatible_tags(ours, sly.ProjectMeta(tag_metas=[CONFIDENCE])) is ours


def test_only_the_clashing_tags_are_renamed_and_parts_of_one_object_stay_together():
    text, caption = (sly.Tag(TAG_METAS[name], "EXIT") for name in ("text", "caption"))
    label = sure().add_tag(text).clone(binding_key="one")
    ours = annotation(label, rectangle("dog"), tags=[caption])
    theirs = sly.ProjectMeta(tag_metas=[AS_TEXT, sly.TagMeta("caption", Type.NONE)])
    fitted = with_compatible_tags(ours, theirs, "_f2")
    assert [tag.name for tag in fitted.labels[0].tags] == ["confidence_f2", "text"]
    assert [tag.name for tag in fitted.img_tags] == ["caption_f2"]
    assert [label.obj_class.name for label in fitted.labels] == ["cat", "dog"]
    assert fitted.labels[0].binding_key == "one"

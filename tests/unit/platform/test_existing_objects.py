"""Questions about labels that exist already, and their answers as tags of these labels."""

import numpy as np
import pytest
from platform_fakes import (
    DAMAGED,
    FakeModel,
    FakePlatform,
    Stage,
    annotation,
    fails_for,
    failures_of,
    rectangle,
)

from florence2.errors import RequestError
from florence2.records import Failure, Region
from serve.platform.existing_objects import region_of, tag_existing_objects
from serve.platform.failures import PartialFailureError
from serve.sdk import sly

CAT, DOG = sly.ObjClass("cat", sly.Rectangle), sly.ObjClass("dog", sly.Rectangle)
META = sly.ProjectMeta(obj_classes=[CAT, DOG])
CATEGORY = {"task_prompt": "<REGION_TO_CATEGORY>"}
ONE, BOTH = {"image_ids": [1], **CATEGORY}, {"image_ids": [1, 2], **CATEGORY}


@pytest.fixture
def labeled():
    """Images 1 and 2 with a cat (x from 10) and a dog (x from 20) each; image 3 with nothing.

    The label's ids are 11 and 12, 21 and 22.
    """
    platform = FakePlatform(ids=[1, 2, 3], meta=META)
    for image_id in (1, 2):
        cat, dog = rectangle("cat", (1, 10, 9, 19)), rectangle("dog", (1, 20, 9, 29))
        platform.annotations[image_id] = annotation(cat, dog).to_json()
        for number, figure in enumerate(platform.annotations[image_id]["objects"], 1):
            figure["id"] = 10 * image_id + number
    return platform


@pytest.fixture
def tag(runner):
    def run(platform, state, model=None, request=None):
        return runner.finish(platform, state, ask=model, request=request, work=tag_existing_objects)

    return run


def tags_of(platform, figure_id):
    return {tag["name"]: tag["value"] for tag in platform.tags_of(figure_id)}


def counts(request):
    return [
        (entry["image_id"], entry["written"], entry["skipped"], len(entry["failed"]))
        for entry in request.pop_pending_results()
    ]


def test_every_label_is_asked_and_tagged_where_it_is(tag, labeled):
    model = FakeModel()
    request = tag(labeled, {"image_ids": [1, 2, 3], **CATEGORY}, model)
    assert request.stage == Stage.FINISHED, request.exception
    assert counts(request) == [(1, 2, 0, 0), (2, 2, 0, 0), (3, 0, 0, 0)]
    assert tags_of(labeled, 11) == {"category": "thing 10"}
    assert tags_of(labeled, 22) == {"category": "thing 20"}
    assert labeled.called("upload") == [], "labels are never written anew"
    assert labeled.metas[1].get_tag_meta("category").value_type == "any_string"


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_image_named_twice_is_tagged_once(tag, labeled, batch_size):
    state = {"image_ids": [1, 2, 1], "batch_size": batch_size, **CATEGORY}
    assert counts(tag(labeled, state)) == [(1, 2, 0, 0), (2, 2, 0, 0)]
    assert len(labeled.tags_of(11)) == 1


def test_all_labels_of_an_image_go_in_one_request_with_one_picture(tag, labeled):
    model = FakeModel()
    tag(labeled, BOTH, model)
    [asks] = model.calls
    assert [ask.region.box_xyxy for ask in asks[:2]] == [(10, 1, 20, 10), (20, 1, 30, 10)]
    assert asks[0].image is asks[1].image
    assert asks[1].image is not asks[2].image
    assert {(ask.task, ask.num_beams) for ask in asks} == {("<REGION_TO_CATEGORY>", 1)}


def test_an_image_without_labels_to_ask_about_is_not_downloaded(tag, labeled):
    tag(labeled, {"image_ids": [2, 3], **CATEGORY})
    assert labeled.called("download") == [[(2,)]]


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("<REGION_TO_CATEGORY>", "category"),
        ("region_description", "description"),
        ("<region_to_ocr>", "text"),
    ],
)
def test_each_task_has_its_tag(tag, labeled, task, name):
    tag(labeled, {**ONE, "task_prompt": task})
    assert set(tags_of(labeled, 11)) == {name}


def test_a_second_run_writes_nothing(tag, labeled):
    tag(labeled, BOTH)
    model = FakeModel()
    request = tag(labeled, BOTH, model)
    assert counts(request) == [(1, 0, 2, 0), (2, 0, 2, 0)]
    assert model.calls == []
    assert len(labeled.called("add_tags")) == 2
    assert len(labeled.called("update_meta")) == 1


def test_overwriting_replaces_what_is_different(tag, labeled):
    tag(labeled, ONE)
    for expected in ([(1, 2, 0, 0)], [(1, 0, 2, 0)]):
        request = tag(labeled, {**ONE, "overwrite": True}, FakeModel(word="new"))
        assert counts(request) == expected
        assert [one["value"] for one in labeled.tags_of(11)] == ["new 10"]


def test_a_value_that_cannot_be_replaced_stays(tag, labeled):
    tag(labeled, ONE)
    labeled.upload_fault = fails_for(times=1)
    request = tag(labeled, {**ONE, "overwrite": True}, FakeModel(word="new"))
    assert counts(request) == [(1, 1, 0, 1)]
    assert tags_of(labeled, 11) == {"category": "thing 10"}
    assert tags_of(labeled, 12) == {"category": "new 20"}


def test_only_the_classes_asked_for(tag, labeled):
    tag(labeled, {**ONE, "classes": ["dog"]})
    assert (tags_of(labeled, 11), tags_of(labeled, 12)) == ({}, {"category": "thing 20"})


def test_a_tag_of_the_same_name_and_another_meaning_is_left_alone(tag, labeled):
    labeled.metas[1] = META.add_tag_meta(sly.TagMeta("category", sly.TagValueType.ANY_NUMBER))
    tag(labeled, ONE)
    assert tags_of(labeled, 11) == {"category_nn": "thing 10"}


def test_a_label_that_cannot_be_answered_costs_only_itself(tag, labeled):
    def fault(ask):
        return Failure("bad_region", "Too small.") if ask.region.box_xyxy[0] == 10 else None

    request = tag(labeled, {"image_ids": [1, 3], **CATEGORY}, FakeModel(fault))
    assert isinstance(request.exception, PartialFailureError)
    assert "1 of 2 images failed and has labels without the tag (id 1)" in str(request.exception)
    entry = request.pop_pending_results()[0]
    assert entry["failed"] == [{"label_id": 11, "code": "bad_region", "message": "Too small."}]
    assert entry["written"] == 1
    assert tags_of(labeled, 12) == {"category": "thing 20"}


def test_a_write_that_fails_is_tried_label_by_label(tag, labeled):
    labeled.upload_fault = fails_for(11)
    first, second = tag(labeled, BOTH).pop_pending_results()
    assert (first["written"], first["failed"][0]["code"]) == (1, "upload_failed")
    assert (first["error"]["code"], second["error"]) == ("upload_failed", None)


def test_a_write_that_arrived_although_it_failed_is_not_repeated(tag, labeled):
    add = labeled.image.tag.add_to_objects
    calls = []

    def add_and_fail(project_id, tags):
        add(project_id, tags)
        calls.append(tags)
        raise ConnectionError("the answer was lost")

    labeled.image.tag.add_to_objects = add_and_fail
    request = tag(labeled, ONE)
    assert counts(request) == [(1, 2, 0, 0)]
    assert len(calls) == 1


def test_an_empty_answer_is_no_tag_and_no_failure(tag, labeled):
    request = tag(labeled, ONE, FakeModel(word=""))
    [entry] = request.pop_pending_results()
    assert (entry["written"], entry["unanswered"], entry["error"]) == (0, 2, None)
    assert request.stage == Stage.FINISHED


@pytest.mark.parametrize(
    ("break_it", "code"),
    [
        pytest.param(lambda p: p.content.update({1: DAMAGED}), "bad_image", id="the image"),
        pytest.param(
            lambda p: p.annotations[1]["objects"][0].update(classTitle="unheard of"),
            "bad_annotation",
            id="the labels",
        ),
        pytest.param(lambda p: p.infos.pop(1), "not_found", id="the id"),
    ],
)
def test_a_damaged_image_costs_only_itself(tag, labeled, break_it, code):
    break_it(labeled)
    request = tag(labeled, BOTH)
    first, second = request.pop_pending_results()
    assert first["error"]["code"] == code
    assert (second["error"], second["written"]) == (None, 2)
    assert request.stage == Stage.ERROR


def test_a_whole_project(tag, labeled):
    request = tag(labeled, {"project_id": 1, "dataset_ids": [10], **CATEGORY})
    assert len(counts(request)) == 3
    assert (request.progress.current, request.progress.total) == (3, 3)


def test_a_stopped_run_is_cancelled_and_leaves_no_image_half_told(tag, labeled, runner):
    request = runner.create()

    def fault(ask):
        request.stop()
        return Failure("cancelled", "The caller left.")

    tag(labeled, {**BOTH, "batch_size": 1}, FakeModel(fault), request)
    assert request.stage == Stage.CANCELLED
    assert request.pop_pending_results() == []
    assert labeled.called("add_tags") == []


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"image_ids": [1]}, "task_prompt names"),
        ({**ONE, "task_prompt": "<OD>"}, "choose one of these"),
        ({**ONE, "task_prompt": "<REGION_TO_SEGMENTATION>"}, "choose one of these"),
        ({**ONE, "classes": "cat"}, "list of names"),
        ({**ONE, "overwrite": "no"}, "true or false"),
        (CATEGORY, "project id"),
    ],
)
def test_a_wrong_request_is_refused(tag, labeled, state, words):
    request = tag(labeled, state)
    assert isinstance(request.exception, RequestError)
    assert words in str(request.exception)
    assert labeled.called("update_meta") == []


def test_a_tag_that_cannot_be_put_back_is_told_in_the_log(tag, labeled, monkeypatch):
    tag(labeled, ONE)
    told = []
    monkeypatch.setattr(sly.logger, "error", lambda words, **options: told.append(words))
    labeled.upload_fault = fails_for(11)
    request = tag(labeled, {**ONE, "overwrite": True}, FakeModel(word="new"))
    assert counts(request) == [(1, 1, 0, 1)]
    assert "Label 11 lost its tag 'category' ['thing 10']" in told[0]


def test_labels_that_cannot_be_read_together_are_read_image_by_image(tag, labeled):
    download = labeled.annotation.download_json_batch
    refuse = fails_for(2)

    def download_part(dataset_id, ids):
        refuse(ids)
        return download(dataset_id, ids)

    labeled.annotation.download_json_batch = download_part
    assert failures_of(tag(labeled, BOTH)) == {2: "bad_annotation"}


def test_a_model_that_is_gone_ends_the_run(tag, labeled):
    gone = FakeModel(lambda ask: Failure("not_deployed", "It is gone."))
    request = tag(labeled, {**BOTH, "batch_size": 1}, gone)
    assert str(request.exception) == "It is gone."
    assert len(gone.calls) == 1


def shape(kind, *pairs):
    return kind([sly.PointLocation(row, column) for row, column in pairs])


BITMAP = sly.Bitmap(np.ones((4, 5), bool), sly.PointLocation(10, 20))
REGIONS = {
    "rectangle": (sly.Rectangle(2, 3, 11, 13), (40, 60), (3, 2, 14, 12)),
    "polygon": (shape(sly.Polygon, (2, 3), (2, 9), (7, 9)), (40, 60), (3, 2, 10, 8)),
    "bitmap": (BITMAP, (40, 60), (20, 10, 25, 14)),
    "line": (shape(sly.Polyline, (1, 1), (5, 9)), (40, 60), (1, 1, 10, 6)),
    "a point is one pixel": (sly.Point(4, 6), (40, 60), (6, 4, 7, 5)),
    "no size cuts nothing off": (sly.Rectangle(0, 0, 4000, 4), (None, None), (0, 0, 5, 4001)),
    "outside of the image": (sly.Rectangle(50, 50, 60, 60), (40, 40), None),
    "a shape without a place": (sly.AnyGeometry({"points": []}, "spiral"), (40, 60), None),
}


@pytest.mark.parametrize(("geometry", "size_hw", "box_xyxy"), REGIONS.values(), ids=REGIONS)
def test_the_region_of_every_shape_is_its_outer_box(geometry, size_hw, box_xyxy):
    assert region_of(geometry, size_hw) == (box_xyxy and Region(box_xyxy))

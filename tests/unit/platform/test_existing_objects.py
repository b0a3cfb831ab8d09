"""Questions about labels that exist already, and their answers as tags of these labels."""

import pytest
from platform_fakes import SIZE_WH, FakePlatform, annotation, png, rectangle

from florence2.errors import FlorenceError, RequestError
from florence2.images import open_image
from florence2.records import Failure, Result
from serve.platform.existing_objects import tag_existing_objects
from serve.platform.failures import PartialFailureError
from serve.platform.images import ExistingServices
from serve.sdk import sly
from serve.settings import Settings

Stage = sly.nn.inference.inference_request.InferenceRequest.Stage
CAT, DOG = sly.ObjClass("cat", sly.Rectangle), sly.ObjClass("dog", sly.Rectangle)
META = sly.ProjectMeta(obj_classes=[CAT, DOG])
CATEGORY = {"task_prompt": "<REGION_TO_CATEGORY>"}


class Model:
    """Says a word about each region of an image that opens: its left edge.

    ``fault`` may give a Failure instead.
    """

    def __init__(self, fault=lambda ask: None, word="thing"):
        self.fault, self.word, self.calls = fault, word, []

    def __call__(self, asks, *, should_stop):
        self.calls.append(list(asks))
        return [self.fault(ask) or self._said(ask) for ask in asks]

    def _said(self, ask):
        try:
            open_image(ask.image)
        except FlorenceError as error:
            return Failure(error.code, str(error))
        text = f"{self.word} {ask.region.box_xyxy[0]:g}" if self.word else ""
        return Result(ask.task, SIZE_WH, (), text, "", (), False)


def stored(*labels):
    """An annotation as the platform sends it: labels and tags have ids."""
    ours = annotation(*labels).to_json()
    for number, label in enumerate(labels):
        ours["objects"][number]["id"] = label.sly_id
        for tag in ours["objects"][number]["tags"]:
            tag["id"] = 70 + label.sly_id
    return ours


def place(image_id, number):
    return image_id * 10 + number


@pytest.fixture
def labeled():
    """Images 1 and 2 with a cat (x from 10) and a dog (x from 20) each; image 3 with nothing."""
    platform = FakePlatform(ids=[1, 2, 3], meta=META)
    for image_id in (1, 2):
        platform.annotations[image_id] = stored(
            rectangle("cat", (1, 10, 9, 19), figure_id=place(image_id, 1)),
            rectangle("dog", (1, 20, 9, 29), figure_id=place(image_id, 2)),
        )
    return platform


@pytest.fixture
def tag(manager):
    def run(platform, state, model=None, request=None):
        services = ExistingServices(
            ask=model or Model(),
            settings_of=lambda state, api: Settings(num_beams=1),
            default_batch_size=4,
        )

        def tag_objects(api, state, inference_request):
            return tag_existing_objects(api, state, inference_request, services)

        request = request or manager.create()
        _, future = manager.schedule_task(tag_objects, platform, state, inference_request=request)
        future.result()
        manager._on_inference_end(future, request.uuid)
        return request

    return run


def tags_of(platform, figure_id):
    return {tag["name"]: tag["value"] for tag in platform.advanced.tags_of(figure_id)}


def counts(request):
    return [
        (entry["image_id"], entry["written"], entry["skipped"], len(entry["failed"]))
        for entry in request.pop_pending_results()
    ]


def test_every_label_is_asked_and_tagged_where_it_is(tag, labeled):
    model = Model()
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
    assert len(labeled.advanced.tags_of(11)) == 1


def test_all_labels_of_an_image_go_in_one_request_with_one_picture(tag, labeled):
    model = Model()
    tag(labeled, {"image_ids": [1, 2], **CATEGORY}, model)
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
    tag(labeled, {"image_ids": [1], "task_prompt": task})
    assert set(tags_of(labeled, 11)) == {name}


def test_a_second_run_writes_nothing(tag, labeled):
    state = {"image_ids": [1, 2], **CATEGORY}
    tag(labeled, state)
    model = Model()
    request = tag(labeled, state, model)
    assert counts(request) == [(1, 0, 2, 0), (2, 0, 2, 0)]
    assert model.calls == []
    assert len(labeled.called("add_tags")) == 2
    assert len(labeled.called("update_meta")) == 1


def test_overwriting_replaces_what_is_different(tag, labeled):
    tag(labeled, {"image_ids": [1], **CATEGORY})
    fault = Model(word="new")
    request = tag(labeled, {"image_ids": [1], "overwrite": True, **CATEGORY}, fault)
    assert counts(request) == [(1, 2, 0, 0)]
    assert [one["value"] for one in labeled.advanced.tags_of(11)] == ["new 10"]
    again = tag(labeled, {"image_ids": [1], "overwrite": True, **CATEGORY}, Model(word="new"))
    assert counts(again) == [(1, 0, 2, 0)]


def test_a_value_that_cannot_be_replaced_stays(tag, labeled):
    tag(labeled, {"image_ids": [1], **CATEGORY})
    faults = [ValueError("refused")]

    def fault(ids):
        if faults:
            raise faults.pop()

    labeled.upload_fault = fault
    request = tag(labeled, {"image_ids": [1], "overwrite": True, **CATEGORY}, Model(word="new"))
    assert counts(request) == [(1, 1, 0, 1)]
    assert tags_of(labeled, 11) == {"category": "thing 10"}
    assert tags_of(labeled, 12) == {"category": "new 20"}


def test_only_the_classes_asked_for(tag, labeled):
    tag(labeled, {"image_ids": [1], "classes": ["dog"], **CATEGORY})
    assert (tags_of(labeled, 11), tags_of(labeled, 12)) == ({}, {"category": "thing 20"})


def test_a_tag_of_the_same_name_and_another_meaning_is_left_alone(tag, labeled):
    labeled.metas[1] = META.add_tag_meta(sly.TagMeta("category", sly.TagValueType.ANY_NUMBER))
    tag(labeled, {"image_ids": [1], **CATEGORY})
    assert tags_of(labeled, 11) == {"category_nn": "thing 10"}


def test_a_label_that_cannot_be_answered_costs_only_itself(tag, labeled):
    def fault(ask):
        return Failure("bad_region", "Too small.") if ask.region.box_xyxy[0] == 10 else None

    request = tag(labeled, {"image_ids": [1, 3], **CATEGORY}, Model(fault))
    assert isinstance(request.exception, PartialFailureError)
    assert "1 of 2 images failed and has labels without the tag (id 1)" in str(request.exception)
    entry = request.pop_pending_results()[0]
    assert entry["failed"] == [{"label_id": 11, "code": "bad_region", "message": "Too small."}]
    assert entry["written"] == 1
    assert tags_of(labeled, 12) == {"category": "thing 20"}


def test_a_write_that_fails_is_tried_label_by_label(tag, labeled):
    def fault(figure_ids):
        if 11 in figure_ids:
            raise ValueError("refused")

    labeled.upload_fault = fault
    request = tag(labeled, {"image_ids": [1, 2], **CATEGORY})
    assert counts(request) == [(1, 1, 0, 1), (2, 2, 0, 0)]
    assert request.context["failures"][0]["code"] == "upload_failed"


def test_a_write_that_arrived_although_it_failed_is_not_repeated(tag, labeled):
    add = labeled.image.tag.add_to_objects
    calls = []

    def add_and_fail(project_id, tags):
        add(project_id, tags)
        calls.append(tags)
        raise ConnectionError("the answer was lost")

    labeled.image.tag.add_to_objects = add_and_fail
    request = tag(labeled, {"image_ids": [1], **CATEGORY})
    assert counts(request) == [(1, 2, 0, 0)]
    assert len(calls) == 1


def test_an_empty_answer_is_no_tag_and_no_failure(tag, labeled):
    request = tag(labeled, {"image_ids": [1], **CATEGORY}, Model(word=""))
    [entry] = request.pop_pending_results()
    assert (entry["written"], entry["unanswered"], entry["error"]) == (0, 2, None)
    assert request.stage == Stage.FINISHED


@pytest.mark.parametrize(
    ("break_it", "code"),
    [
        pytest.param(lambda p: p.content.update({1: png()[:60]}), "bad_image", id="the image"),
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
    request = tag(labeled, {"image_ids": [1, 2], **CATEGORY})
    first, second = request.pop_pending_results()
    assert first["error"]["code"] == code
    assert (second["error"], second["written"]) == (None, 2)
    assert request.stage == Stage.ERROR


def test_a_whole_project(tag, labeled):
    request = tag(labeled, {"project_id": 1, "dataset_ids": [10], **CATEGORY})
    assert len(counts(request)) == 3
    assert (request.progress.current, request.progress.total) == (3, 3)


def test_a_stopped_run_is_cancelled_and_leaves_no_image_half_told(tag, labeled, manager):
    request = manager.create()

    def fault(ask):
        request.stop()
        return Failure("cancelled", "The caller left.")

    state = {"image_ids": [1, 2], "batch_size": 1, **CATEGORY}
    tag(labeled, state, Model(fault), request)
    assert request.stage == Stage.CANCELLED
    assert request.pop_pending_results() == []
    assert labeled.called("add_tags") == []


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"image_ids": [1]}, "task_prompt names"),
        ({"image_ids": [1], "task_prompt": "<OD>"}, "choose one of these"),
        ({"image_ids": [1], "task_prompt": "<REGION_TO_SEGMENTATION>"}, "choose one of these"),
        ({"image_ids": [1], "classes": "cat", **CATEGORY}, "list of names"),
        ({"image_ids": [1], "overwrite": "no", **CATEGORY}, "true or false"),
        ({**CATEGORY}, "project id"),
    ],
)
def test_a_wrong_request_is_refused(tag, labeled, state, words):
    request = tag(labeled, state)
    assert isinstance(request.exception, RequestError)
    assert words in str(request.exception)
    assert labeled.called("update_meta") == []

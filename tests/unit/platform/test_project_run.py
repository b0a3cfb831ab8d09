"""Runs over images by id or of a project: results, failures, waits, and what a stop leaves."""

import threading
import time
from types import SimpleNamespace

import pytest
from platform_fakes import (
    DAMAGED,
    CodedError,
    FakeModel,
    FakePlatform,
    FakePredictor,
    Stage,
    fails_for,
    failures_of,
    services,
    wait_until,
)
from requests.exceptions import ConnectionError as ConnectionFailed
from requests.exceptions import HTTPError, Timeout

from florence2.budget import Budget
from florence2.errors import FlorenceError, QueueFullError, RequestError
from florence2.records import Failure
from serve.platform import registry
from serve.platform.failures import PartialFailureError
from serve.platform.project_run import run_image_ids, run_project
from serve.predict import full_queue
from serve.predict.predictor import AHEAD_BYTES
from serve.settings import Reference, Settings

ALL = [1, 2, 3, 4, 5, 6]
ONE_BY_ONE = {"image_ids": ALL, "batch_size": 1}


def ids_of(entries):
    return [entry["image_id"] for entry in entries]


def codes_of(entries):
    """The code of each image's failure, None for one with an annotation."""
    assert all(("error" in entry) == (entry["annotation"] is None) for entry in entries)
    return [entry.get("error", {}).get("code") for entry in entries]


@pytest.fixture
def sleeps(monkeypatch):
    """What is called with the seconds instead of waiting; the test may set another."""
    instead = SimpleNamespace(sleep=lambda seconds: None)
    for module in (full_queue, registry):
        monkeypatch.setattr(module, "time", instead)
    return instead


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
    assert ids_of(entries) == asked
    assert {entry["image_id"]: entry["dataset_id"] for entry in entries}[4] == 11


def test_a_single_image_is_interactive_and_several_are_bulk(runner, platform):
    predict = FakePredictor()
    runner.ids(platform, {"image_id": 1}, predict)
    runner.ids(platform, {"image_ids": [1, 2, 3, 4, 5]}, predict)
    assert predict.batches[0] == (1, False)
    assert sorted(predict.batches[1:]) == [(1, True), (4, True)]


WRONG_IDS = [
    ({}, "at least one image id"),
    ({"image_ids": []}, "at least one image id"),
    ({"image_id": "abc"}, "whole numbers"),
    ({"image_id": True}, "whole numbers"),
    ({"image_ids": [1, None]}, "whole numbers"),
    ({"image_ids": [98, 99]}, "Image 98 does not exist"),
]
WRONG_PROJECTS = [
    ({}, "needs one project id"),
    ({"project_id": [1, 2]}, "needs one project id"),
    ({"project_id": 9}, "Project 9 does not exist"),
    ({"project_id": 2}, "Only projects of images"),
    ({"project_id": 1, "dataset_ids": [77]}, "no dataset 77"),
]
WRONG_BOTH = [
    ({"batch_size": "abc"}, "batch_size"),
    ({"batch_size": 0}, "batch_size"),
    ({"batch_size": 257}, "batch_size"),
    ({"upload_mode": "apend"}, "Did you mean 'append'"),
    ({"upload_mode": 5}, "upload_mode"),
    ({"output_project_id": "x"}, "output_project_id"),
    ({"settings": {"existing_objects_iou_thresh": "x"}}, "iou_thresh"),
    ({"iou_merge_threshold": 1.5}, "iou_thresh"),
    ({"model_prediction_suffix": 5}, "model_prediction_suffix"),
    ({"timeout_s": "soon"}, "timeout_s"),
]


@pytest.mark.parametrize(
    ("work", "state", "words"),
    [
        *[(run_image_ids, *case) for case in WRONG_IDS],
        *[(run_project, *case) for case in WRONG_PROJECTS],
        *[(run_image_ids, {"image_id": 1, **state}, words) for state, words in WRONG_BOTH],
        *[(run_project, {"project_id": 1, **state}, words) for state, words in WRONG_BOTH],
    ],
)
def test_a_wrong_request_is_refused_before_any_work(runner, platform, work, state, words):
    platform.add_project(2).type = "videos"
    request = runner.finish(platform, state, work=work)
    assert isinstance(request.exception, RequestError)
    assert words in str(request.exception)
    assert platform.called("download") == []


def test_without_a_platform_ids_are_refused(runner):
    with pytest.raises(RequestError, match="not connected to a platform"):
        runner.ids(None, {"image_id": 1})


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"project_id": 1}, [1, 2, 3, 4]),
        ({"projectId": 1, "dataset_ids": [11]}, [3, 4]),
        ({"projectId": 1, "datasetIds": [11]}, [3, 4]),
        ({"projectId": 1, "datasetIds": []}, []),
    ],
)
def test_a_project_run_goes_through_all_datasets_or_those_asked_for(runner, state, expected):
    platform = FakePlatform(ids=[1, 2], other_ids=[3, 4])
    request = runner.finish(platform, state, work=run_project)
    assert (request.stage, request.exception) == (Stage.FINISHED, None)
    assert ids_of(request.pop_pending_results()) == expected


def test_a_project_run_reports_failures_at_the_end(runner):
    platform = FakePlatform(ids=[1, 2], other_ids=[3, 4])
    platform.content[4] = DAMAGED
    request = runner.finish(platform, {"project_id": 1}, work=run_project)
    assert request.stage == Stage.ERROR
    assert isinstance(request.exception, PartialFailureError)
    assert "1 of 4 images failed and has no result (id 4)" in str(request.exception)
    assert codes_of(request.pop_pending_results()) == [None, None, None, "bad_image"]


def test_a_run_stops_once_more_images_fail_than_may(runner):
    platform = FakePlatform(ids=list(range(1, 9)))
    for image_id in (2, 3):
        platform.content[image_id] = DAMAGED
    state = {"project_id": 1, "batch_size": 1, "max_failures": 1}
    request = runner.finish(platform, state, work=run_project)
    assert isinstance(request.exception, PartialFailureError)
    said = str(request.exception)
    assert said.startswith("The run stopped after ")
    assert "2 of 3 images failed, and 1 may" in said
    assert len(request.pop_pending_results()) < 8
    refused = runner.finish(platform, {"project_id": 1, "max_failures": "few"}, work=run_project)
    assert "such as 5%" in str(refused.exception)


def test_an_image_that_cannot_be_done_fails_alone(runner, platform):
    platform.content[2] = DAMAGED
    platform.download_fault = fails_for(3, error=HTTPError)
    request = runner.finish(platform, {"image_ids": [1, 2, 3, 99]})
    assert request.stage == Stage.FINISHED
    assert codes_of(request.pop_pending_results()) == [
        None,
        "bad_image",
        "download_failed",
        "not_found",
    ]
    assert (request.progress.current, request.progress.total) == (4, 4)
    assert platform.called("download") == [[(1, 2, 3)], [(1,)], [(2,)], [(3,)]]


@pytest.mark.parametrize("kind", [ConnectionFailed, Timeout])
def test_without_a_platform_images_are_not_tried_one_by_one(runner, platform, away, kind):
    platform.download_fault = fails_for(2, error=kind)
    away(platform)
    entries = runner.ids(platform, {"image_ids": [1, 2, 3, 4], "batch_size": 2})
    assert codes_of(entries) == ["download_failed"] * 2 + [None] * 2
    assert set(map(tuple, platform.called("download"))) == {((1, 2),), ((3, 4),)}


@pytest.mark.parametrize("what", ["download", "upload"])
def test_a_run_that_is_stopped_without_a_platform_tries_no_image_by_itself(
    runner, platform, away, what
):
    request = runner.create()
    away(platform)

    def fault(ids):
        request.stop()
        raise ConnectionFailed("away")

    setattr(platform, f"{what}_fault", fault)
    state = {"image_ids": ALL, "batch_size": 6, "upload_mode": "append"}
    runner.finish(platform, state, request=request)
    assert platform.called(what) == [[tuple(ALL)]]
    assert (request.stage, request.exception) == (Stage.CANCELLED, None)
    assert failures_of(request) == {}


@pytest.mark.parametrize("what", ["download", "upload"])
def test_when_the_platform_goes_the_rest_of_a_batch_is_not_tried(runner, platform, away, what):
    def fault(ids):
        if len(ids) > 1:
            raise ValueError("Not together.")
        if ids[0] > 2:
            away(platform)
            raise ConnectionFailed("away")

    setattr(platform, f"{what}_fault", fault)
    state = {"image_ids": ALL, "batch_size": 6, "upload_mode": "append"}
    request = runner.finish(platform, state)
    assert {ids for [ids] in platform.called(what)} == {tuple(ALL), (1,), (2,), (3,)}
    assert sorted(failures_of(request)) == [3, 4, 5, 6]


def test_one_download_that_breaks_off_always_costs_only_itself(runner, platform, away):
    platform.download_fault = fails_for(2, error=ConnectionFailed)
    entries = runner.ids(platform, {"image_ids": [1, 2, 3, 4], "batch_size": 2})
    assert codes_of(entries) == [None, "download_failed", None, None]


def test_when_all_images_fail_the_request_fails_as_the_first(runner, platform):
    platform.content[2] = DAMAGED
    for ids, code in (([2], "bad_image"), ([2, 99], "bad_image"), ([98, 99], "not_found")):
        with pytest.raises(FlorenceError) as caught:
            runner.ids(platform, {"image_ids": ids})
        assert caught.value.code == code


def test_an_image_whose_dataset_is_gone_costs_only_itself(runner):
    platform = FakePlatform(ids=[1, 2], other_ids=[4])
    del platform.datasets[11]
    entries = runner.ids(platform, {"image_ids": [1, 4, 2]})
    assert codes_of(entries) == [None, "not_found", None]


def test_a_prediction_that_fails_is_tried_image_by_image(runner, platform):
    def before(images):
        if platform.content[2] in images:
            raise ZeroDivisionError("a fault of the model")

    predict = FakePredictor(before)
    entries = runner.ids(platform, {"image_ids": [1, 2, 3]}, predict)
    assert codes_of(entries) == [None, "internal_error", None]
    assert [size for size, _ in predict.batches] == [3, 1, 1, 1]


def test_a_result_for_each_image_is_insisted_on(runner, platform):
    def predict(images, settings, call):
        return FakePredictor()(images, settings, call)[:1]

    assert codes_of(runner.ids(platform, {"image_ids": [1, 2]}, predict)) == [None, None]


def test_a_reference_on_one_image_is_looked_at_once_for_all(runner, platform):
    def predict(images, settings, call):
        seen.append(settings.mapping)
        return FakePredictor()(images, settings, call)

    seen, model = [], FakeModel(word="car")
    settings = Settings(reference=Reference(image_id=5, box_xyxy=(7, 8, 20, 30), class_name=""))
    runner.finish(
        platform, {"image_ids": [1, 2], "batch_size": 1}, predict, ask=model, settings=settings
    )
    assert seen == [{"car 7": ("car 7",)}] * 2
    [[ask]] = model.calls
    assert ask.image == platform.content[5]


@pytest.mark.parametrize("code", ["bad_request", "device_lost", "not_deployed", "not_found"])
def test_what_fails_for_every_image_ends_the_run_at_once(runner, platform, code):
    def before(images):
        raise CodedError(code)

    predict = FakePredictor(before)
    with pytest.raises(CodedError) as caught:
        runner.ids(platform, {"image_ids": [1, 2, 3], "batch_size": 1}, predict)
    assert caught.value.code == code
    assert len(predict.batches) <= 2, "more was asked than what was in hand"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        pytest.param("not_deployed", [None, None], id="the model is gone"),
        pytest.param(
            "device_lost",
            [None, None, "device_lost", "device_lost"],
            id="a lost device, with the images it was lost with",
        ),
    ],
)
def test_a_run_that_ends_early_says_how_far_it_came_and_keeps_its_results(
    runner, platform, code, told
):
    def before(images):
        return Failure(code, "It is gone.") if platform.content[4] in images else None

    predict = FakePredictor(before)
    request = runner.finish(platform, {"image_ids": ALL, "batch_size": 2}, predict)
    assert request.stage == Stage.ERROR
    assert "stopped after 2 of 6 images" in str(request.exception)
    assert "It is gone." in str(request.exception)
    assert ("ids 3, 4" in str(request.exception)) == (len(told) == 4)
    assert codes_of(request.pop_pending_results()) == told


def test_the_next_batch_is_asked_about_while_the_model_is_at_one_and_held_until_answered(
    runner, platform
):
    is_next_asked = threading.Event()
    budget = Budget(10**9, "bytes")
    held = []

    def predict(images, settings, call):
        if images == [platform.content[2]]:
            is_next_asked.set()
        elif images == [platform.content[1]]:
            assert is_next_asked.wait(60)
            held.append(budget.held)
        return FakePredictor()(images, settings, call)

    state = {**ONE_BY_ONE, "upload_mode": "append"}
    runner.finish(platform, state, predict, budget=budget)
    assert list(platform.uploads) == ALL
    assert (held[0] >= 2 * AHEAD_BYTES, budget.held) == (True, 0)


def test_a_batch_that_was_lost_with_the_device_beside_another_is_asked_again(runner, platform):
    both = threading.Barrier(2)

    def predict(images, settings, call):
        asked.append(images)
        if images[0] in (platform.content[1], platform.content[3]) and len(asked) <= 2:
            both.wait(60)
            return [Failure("device_lost", "It is gone.")] * len(images)
        return FakePredictor()(images, settings, call)

    asked = []
    state = {"image_ids": ALL, "batch_size": 2, "upload_mode": "append"}
    request = runner.finish(platform, state, predict, model_of=lambda settings: {"name": "one"})
    assert failures_of(request) == {1: "device_lost", 2: "device_lost"}
    assert sorted(platform.uploads) == [3, 4, 5, 6]
    assert "2 of 6 images failed" in str(request.exception)


class Model:
    """One that fails once with ``code``, and is another, or the same, once it was loaded."""

    def __init__(self, code, then):
        self.code, self.name, self.then, self.steps = code, "one", then, 0
        self.is_time = lambda: True

    def before(self, images):
        if self.code is not None and images[-1] == self.fails_at:
            wait_until(self.is_time)
            failure, self.code, self.steps = Failure(self.code, "It is gone."), None, 3
            return failure
        return None

    def told(self, settings):
        if self.steps:
            raise CodedError("not_deployed")
        return {"name": self.name}

    def is_coming(self):
        self.steps = max(self.steps - 1, 0)
        self.name = self.name if self.steps else self.then
        return self.steps > 0


def test_what_the_device_has_no_part_in_is_told_as_it_is(runner, platform, sleeps):
    platform.download_fault = fails_for(3)
    model = Model("device_lost", "one")
    model.fails_at = platform.content[4]
    request = runner.finish(
        platform,
        {"image_ids": ALL, "batch_size": 2, "upload_mode": "append"},
        FakePredictor(model.before),
        model_of=model.told,
        is_model_coming=model.is_coming,
    )
    assert failures_of(request) == {3: "download_failed", 4: "device_lost"}
    assert sorted(platform.uploads) == [1, 2, 5, 6]


@pytest.mark.parametrize(
    ("code", "then", "failed", "said"),
    [
        pytest.param("not_deployed", "one", [], None, id="the same model"),
        pytest.param("device_lost", "one", [3, 4], "ids 3, 4", id="after its device failed"),
        pytest.param("not_deployed", "two", [], "began with one, and two was", id="another model"),
    ],
)
def test_a_run_that_writes_waits_for_its_model_and_takes_no_other(
    runner, platform, sleeps, code, then, failed, said
):
    model = Model(code, then)
    model.fails_at, model.is_time = platform.content[4], lambda: 2 in platform.uploads
    state = {"image_ids": ALL, "batch_size": 2, "upload_mode": "append"}
    request = runner.finish(
        platform,
        state,
        FakePredictor(model.before),
        model_of=model.told,
        is_model_coming=model.is_coming,
    )
    done = [1, 2] if then == "two" else [one for one in ALL if one not in failed]
    assert sorted(platform.uploads) == done
    assert (request.exception is None) == (said is None)
    assert said is None or said in str(request.exception)


@pytest.mark.parametrize("ids", [[1, 2], 1], ids=["bulk waits", "a single image does not"])
def test_a_full_queue(runner, platform, sleeps, ids):
    full = [CodedError("queue_full"), CodedError("queue_full")]

    def before(images):
        if full:
            raise full.pop()

    predict = FakePredictor(before)
    if ids == 1:
        with pytest.raises(CodedError):
            runner.ids(platform, {"image_id": ids}, predict)
    else:
        assert codes_of(runner.ids(platform, {"image_ids": ids}, predict)) == [None, None]
    assert len(predict.batches) == (1 if ids == 1 else 3)


def test_a_queue_that_stays_full_ends_the_wait(sleeps):
    calls = []

    def call():
        calls.append(1)
        raise QueueFullError("full", 0.1)

    with pytest.raises(QueueFullError):
        full_queue.when_queue_has_room(call, lambda: False, limit_s=0.35)
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("stop_with", "done"),
    [
        pytest.param(CodedError("cancelled"), [1], id="an error"),
        pytest.param(Failure("cancelled", "The caller left."), [1], id="a failure"),
        pytest.param(CodedError("queue_full"), [1], id="a full queue"),
        pytest.param(None, [1, 2], id="an answer"),
    ],
)
@pytest.mark.parametrize("mode", [None, "append"])
def test_a_stopped_run_is_cancelled_and_keeps_what_it_has(runner, platform, stop_with, done, mode):
    request = runner.create()

    def before(images):
        if images == [platform.content[1]]:
            return None
        if images != [platform.content[2]]:
            wait_until(request.is_stopped)
            return Failure("cancelled", "The caller left.")
        request.stop()
        if isinstance(stop_with, Exception):
            raise stop_with
        return stop_with

    predict = FakePredictor(before)
    runner.finish(platform, {**ONE_BY_ONE, "upload_mode": mode}, predict, request)
    assert (request.stage, request.exception) == (Stage.CANCELLED, None)
    assert ids_of(request.pop_pending_results()) == done
    assert list(platform.uploads) == ([] if mode is None else done)


ENDS = {
    "stopped": lambda manager, uuid: manager.get(uuid).stop(),
    "cleared": lambda manager, uuid: manager.remove_after(uuid, 60),
    "expired": lambda manager, uuid: manager.remove(uuid),
}


@pytest.mark.parametrize("mode", [None, "append"])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_run_ended_from_outside_really_ends(runner, end, mode):
    platform = FakePlatform(ids=range(1, 41))
    is_asked = threading.Event()
    answered = [platform.content[1], platform.content[3]]

    def predict(images, settings, call):
        if images[0] not in answered:
            is_asked.set()
            while not call.should_stop():
                time.sleep(0.01)
            return [Failure("cancelled", "The request was cancelled.")] * len(images)
        return FakePredictor()(images, settings, call)

    def work(api, state, inference_request):
        run_image_ids(api, state, inference_request, services(predict))

    state = {"image_ids": list(range(1, 41)), "batch_size": 2, "upload_mode": mode}
    request, future = runner.start(work, platform, state)
    assert is_asked.wait(60)
    end(runner.manager, request.uuid)
    assert future.result(60) is None
    assert request.exception is None
    assert ids_of(request.pop_pending_results()) == [1, 2, 3, 4]
    assert list(platform.uploads) == ([] if mode is None else [1, 2, 3, 4])
    assert len(platform.called("download")) <= 7
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("download", "predict", "upload"))]


def test_a_stop_while_the_queue_is_full_ends_the_wait(runner, platform, sleeps):
    request = runner.create()
    sleeps.sleep = lambda seconds: request.stop()

    def before(images):
        raise CodedError("queue_full")

    runner.finish(platform, {"image_ids": [1, 2]}, FakePredictor(before), request)
    assert request.stage == Stage.CANCELLED


@pytest.fixture
def pausing(runner, monkeypatch):
    """A request that is paused by its first result."""
    request = runner.create()
    monkeypatch.setattr(type(request), "PENDING_RESULTS_MAX_SIZE", 1)
    return request


def test_a_run_pauses_at_unfetched_results_until_they_are_fetched(
    runner, platform, pausing, sleeps
):
    fetched = []
    sleeps.sleep = lambda seconds: fetched.extend(pausing.pop_pending_results())
    runner.finish(platform, ONE_BY_ONE, request=pausing)
    assert fetched
    assert ids_of(fetched + pausing.pop_pending_results()) == ALL


def test_a_paused_run_can_be_stopped(runner, platform, pausing, sleeps):
    pausing.pause()
    sleeps.sleep = lambda seconds: pausing.stop()
    runner.finish(platform, ONE_BY_ONE, request=pausing)
    assert pausing.stage == Stage.CANCELLED


def test_results_that_nobody_fetches_end_the_run(runner, platform, pausing, monkeypatch):
    pausing.pause()
    monkeypatch.setattr(type(pausing), "PAUSE_SLEEP_MAX_WAIT", -1)
    runner.finish(platform, ONE_BY_ONE, request=pausing)
    assert pausing.stage == Stage.ERROR
    assert "nobody fetched" in str(pausing.exception)


def test_whoever_waits_for_all_results_or_for_uploads_is_never_paused(
    runner, platform, pausing, sleeps
):
    sleeps.sleep = lambda seconds: pytest.fail("it was paused")
    assert ids_of(runner.ids(platform, ONE_BY_ONE)) == ALL
    runner.finish(platform, {**ONE_BY_ONE, "upload_mode": "append"}, request=pausing)
    assert pausing.stage == Stage.FINISHED
    assert list(platform.uploads) == ALL

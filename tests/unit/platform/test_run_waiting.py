"""Runs that wait for the queue or for a client, and runs that are stopped."""

import threading
from types import SimpleNamespace

import pytest
from platform_fakes import CodedError, FakePlatform, FakePredictor, bound, services

from florence2.records import Failure
from serve.platform import pipeline as waiting
from serve.platform.project_run import run_image_ids
from serve.sdk import sly

Stage = sly.nn.inference.inference_request.InferenceRequest.Stage


def test_a_full_queue_makes_a_bulk_run_wait_and_not_fail(runner, platform, monkeypatch):
    slept = []
    monkeypatch.setattr(waiting, "time", SimpleNamespace(sleep=slept.append))
    full = [CodedError("queue_full"), CodedError("queue_full")]

    def before(images):
        if full:
            raise full.pop()

    entries = runner.ids(platform, {"image_ids": [1, 2]}, FakePredictor(before))
    assert all(entry["annotation"] for entry in entries)
    assert slept


def test_a_queue_that_stays_full_ends_the_run(monkeypatch):
    monkeypatch.setattr(waiting, "time", SimpleNamespace(sleep=lambda seconds: None))
    calls = []

    def call():
        calls.append(1)
        raise CodedError("queue_full")

    with pytest.raises(CodedError):
        waiting.when_queue_has_room(call, lambda: False, limit_s=0.35)
    assert len(calls) == 5


def test_a_single_image_is_told_at_once_that_the_queue_is_full(runner, platform):
    def before(images):
        raise CodedError("queue_full")

    predict = FakePredictor(before)
    with pytest.raises(CodedError):
        runner.ids(platform, {"image_id": 1}, predict)
    assert len(predict.batches) == 1


def test_a_stopped_run_is_cancelled_and_keeps_what_it_has(runner, platform):
    request = runner.create()

    def before(images):
        if len(predict.batches) == 2:
            request.stop()
            raise CodedError("cancelled")

    predict = FakePredictor(before)
    runner.finish(platform, {"image_ids": [1, 2, 3], "batch_size": 1}, predict, request)
    assert request.stage == Stage.CANCELLED
    assert request.exception is None
    assert [entry["image_id"] for entry in request.pop_pending_results()] == [1]
    assert request.context["failures"] == []


ENDS = {
    "stopped": lambda manager, uuid: manager.get(uuid).stop(),
    "cleared": lambda manager, uuid: manager.remove_after(uuid, 60),
    "expired": lambda manager, uuid: manager.remove(uuid),
}


@pytest.mark.parametrize("mode", [None, "append"])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_run_ended_from_outside_really_ends(runner, manager, end, mode):
    platform = FakePlatform(ids=range(1, 41))
    request = runner.create()
    is_asked = threading.Event()

    def predict(images, settings, *, api, is_bulk, should_stop):
        if len(predicted) == 2:
            is_asked.set()
            while not should_stop():
                request._stopped.wait(0.01)
            return [Failure("cancelled", "The request was cancelled.")] * len(images)
        predicted.append(images)
        return FakePredictor()(images, settings, api=api, is_bulk=is_bulk, should_stop=should_stop)

    predicted = []
    state = {"image_ids": list(range(1, 41)), "batch_size": 2, "upload_mode": mode}
    work = bound(run_image_ids, services(predict))
    _, future = manager.schedule_task(work, platform, state, inference_request=request)
    assert is_asked.wait(60)
    end(manager, request.uuid)
    assert future.result(60) is None
    assert request.exception is None
    assert [entry["image_id"] for entry in request.pop_pending_results()] == [1, 2, 3, 4]
    assert list(platform.uploads) == ([] if mode is None else [1, 2, 3, 4])
    assert len(platform.called("download")) <= 6
    assert not [
        thread.name
        for thread in threading.enumerate()
        if thread.name.startswith(("download", "upload"))
    ]


def test_a_stop_while_the_queue_is_full_ends_the_wait(runner, platform, monkeypatch):
    request = runner.create()
    monkeypatch.setattr(waiting, "time", SimpleNamespace(sleep=lambda seconds: request.stop()))

    def before(images):
        raise CodedError("queue_full")

    runner.finish(platform, {"image_ids": [1, 2]}, FakePredictor(before), request)
    assert request.stage == Stage.CANCELLED


def test_images_cancelled_by_the_model_are_no_failures_of_a_stopped_run(runner, platform):
    request = runner.create()

    def predict(images, settings, **call):
        request.stop()
        return [Failure("cancelled", "The caller left.")] * len(images)

    runner.finish(platform, {"image_ids": [1, 2]}, predict, request)
    assert request.stage == Stage.CANCELLED
    assert request.pop_pending_results() == []


def test_a_run_pauses_at_unfetched_results_until_they_are_fetched(runner, platform, monkeypatch):
    request = runner.create()
    monkeypatch.setattr(type(request), "PENDING_RESULTS_MAX_SIZE", 1)
    fetched = []
    paused = threading.Event()

    def sleep(seconds):
        paused.set()
        fetched.extend(request.pop_pending_results())

    monkeypatch.setattr(waiting, "time", SimpleNamespace(sleep=sleep))
    runner.finish(platform, {"image_ids": [1, 2, 3, 4, 5, 6], "batch_size": 1}, request=request)
    fetched += request.pop_pending_results()
    assert paused.is_set()
    assert [entry["image_id"] for entry in fetched] == [1, 2, 3, 4, 5, 6]


def test_a_paused_run_can_be_stopped(runner, platform, monkeypatch):
    request = runner.create()
    request.pause()
    monkeypatch.setattr(waiting, "time", SimpleNamespace(sleep=lambda seconds: request.stop()))
    runner.finish(platform, {"image_ids": [1, 2]}, request=request)
    assert request.stage == Stage.CANCELLED


def test_results_that_nobody_fetches_end_the_run(runner, platform, monkeypatch):
    request = runner.create()
    request.pause()
    monkeypatch.setattr(type(request), "PAUSE_SLEEP_MAX_WAIT", -1)
    runner.finish(platform, {"image_ids": [1, 2]}, request=request)
    assert request.stage == Stage.ERROR
    assert "nobody fetched" in str(request.exception)


def test_a_caller_that_waits_for_all_results_is_never_paused(runner, platform, monkeypatch):
    monkeypatch.setattr(type(runner.create()), "PENDING_RESULTS_MAX_SIZE", 1)
    monkeypatch.setattr(
        waiting, "time", SimpleNamespace(sleep=lambda seconds: pytest.fail("it was paused"))
    )
    assert len(runner.ids(platform, {"image_ids": [1, 2, 3, 4, 5, 6], "batch_size": 1})) == 6

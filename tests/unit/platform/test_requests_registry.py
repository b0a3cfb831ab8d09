"""The registry of requests: who waits for results, and how long a request is remembered."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from florence2.errors import QueueFullError
from serve.platform import registry
from serve.platform.registry import AWAITED, FORGET_AFTER_S
from serve.sdk import sly


def test_a_request_somebody_waits_for_says_so_and_is_soon_forgotten(manager, monkeypatch):
    def work(inference_request):
        assert inference_request.context[AWAITED]
        inference_request.add_results([{"image_id": 1}])

    request = manager.create()
    assert manager.run(work, inference_request=request) == [{"image_id": 1}]
    assert not request.is_expired()
    soon = time.monotonic() + FORGET_AFTER_S + 1
    with monkeypatch.context() as later:
        later.setattr(time, "monotonic", lambda: soon)
        assert request.is_expired()


def test_a_request_goes_on_from_its_acceptance_until_all_that_came_of_it_is_there(manager):
    gate, told = threading.Event(), []

    def work(inference_request):
        for stage in ("Preparing model for inference...", "Running inference...", "Postprocess..."):
            inference_request.set_stage(stage, 0, 1)
            told.append(inference_request.to_json()["is_inferring"])
        gate.wait(20)

    request, future = manager.schedule_task(work)
    assert request.is_inferring()
    gate.set()
    future.result(20)
    while not request.is_finished():
        time.sleep(0.01)
    assert (told, request.is_inferring()) == ([True] * 3, False)


def test_a_run_that_counts_nothing_done_for_an_hour_goes_on_and_one_that_ended_is_forgotten(
    manager, monkeypatch
):
    gate = threading.Event()
    request, future = manager.schedule_task(lambda inference_request: gate.wait(20))
    hours = {"running": time.monotonic() + 4000, "ended": time.monotonic() + 8000}
    with monkeypatch.context() as later:
        later.setattr(time, "monotonic", lambda: hours["running"])
        assert not request.is_expired()
    gate.set()
    future.result(20)
    while not request.is_finished():
        time.sleep(0.01)
    with monkeypatch.context() as later:
        later.setattr(time, "monotonic", lambda: hours["ended"])
        assert request.is_expired()


def test_a_scheduled_request_is_not_awaited(manager):
    request, future = manager.schedule_task(lambda inference_request: None)
    future.result()
    assert AWAITED not in request.context


def test_only_so_many_are_taken_on_and_one_that_is_done_leaves_its_place(monkeypatch):
    monkeypatch.setattr(registry, "MAX_SCHEDULED", 2)
    manager, gate = registry.RequestsManager(ThreadPoolExecutor(1)), threading.Event()

    def work(inference_request):
        gate.wait(20)

    taken = [manager.schedule_task(work) for _ in range(2)]
    with pytest.raises(QueueFullError, match="At most 2 runs"):
        manager.schedule_task(work)
    assert len(manager._inference_requests) == 2
    gate.set()
    for _, future in taken:
        future.result(20)
    request, future = manager.schedule_task(lambda inference_request: 1 / 0)
    future.result(20)
    assert isinstance(request.exception, ZeroDivisionError)


def test_the_error_of_the_work_is_the_callers(manager):
    def work(inference_request):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        manager.run(work)


def test_requests_of_one_moment_have_names_of_their_own(manager, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.0)
    assert len({manager.create().uuid for _ in range(5)}) == 5
    assert manager.create("given").uuid == "given"


def test_a_failed_request_keeps_its_error_and_not_what_it_worked_on(manager, monkeypatch):
    class Image:
        pass

    images = []
    # The test's own log keeps tracebacks.
    monkeypatch.setattr(sly.logger, "error", lambda *words, **options: None)

    def work(inference_request):
        image = Image()
        images.append(weakref.ref(image))
        try:
            raise KeyError("the cause")
        except KeyError as error:
            raise ValueError("no") from error

    gc.disable()
    try:
        request, future = manager.schedule_task(work)
        future.result()
        assert images[0]() is None
    finally:
        gc.enable()
    described = request.exception_json()
    assert (described["type"], described["message"]) == ("ValueError", "no")
    assert "the cause" in described["traceback"]

"""Requests of many callers share batches and come back in order, as if each had been alone."""

from __future__ import annotations

import logging
import threading

import pytest
from scheduler_tools import PATIENCE_S, assert_same, captions, held, picture, wait_until

import florence2.engine.work_queue
from florence2 import Ask, Failure, Result
from florence2.engine.scheduler import Priority
from florence2.pixels import ImageProcessor
from florence2.tasks import TASKS, TaskInput

REGION = (20.0, 30.0, 150.0, 170.0)


def ask(seed: int, number: int) -> Ask:
    task = TASKS[number % len(TASKS)]
    text = "a red car" if task.takes is TaskInput.TEXT else None
    region = REGION if task.takes is TaskInput.REGION else None
    return Ask(picture(seed), task.token, text, region, max_new_tokens=24)


def test_two_requests_that_arrive_together_are_one_batch(scheduler, send, reports):
    with held(scheduler):
        one, other = send(captions(1)), send(captions(2))
        wait_until(lambda: scheduler.queue_depth == 2)
    one.result(PATIENCE_S), other.result(PATIENCE_S)
    assert reports[0].together == 2
    assert sum(report.requests for report in reports) == 2


def test_64_threads_with_different_tasks_get_the_serial_answers(model, scheduler, send, reports):
    asks = [ask(number % 5, number) for number in range(64)]
    futures = [send([one], priority=Priority(number % 2)) for number, one in enumerate(asks)]
    for one, future in zip(asks, futures, strict=True):
        [answer] = future.result(PATIENCE_S)
        [alone] = model.run_many([one])
        assert_same(answer, alone)
    assert sum(report.prompts for report in reports) == 64
    assert len(reports) < 64


def test_a_large_request_is_cut_into_pieces_and_comes_back_in_order(model, start, reports):
    asks = [ask(number % 3, number) for number in range(11)]
    answers = start(max_batch=4).run(asks)
    assert sum(report.prompts for report in reports) == 11
    assert reports[0].together == 4
    assert all(report.together <= 4 for report in reports)
    for answer, alone in zip(answers, model.run_many(asks), strict=True):
        assert_same(answer, alone)


def test_a_request_joins_the_batch_in_hand_and_may_be_answered_first(
    model, scheduler, runtime, send
):
    joined: list[object] = []

    def join_once() -> None:
        if len(runtime.passes) == 4 and not joined:
            joined.append(send(captions(2, max_new_tokens=3)))
            wait_until(lambda: scheduler.queue_depth == 1)

    runtime.before_pass = join_once
    first = send(captions(1))
    [answer] = first.result(PATIENCE_S)
    [short] = joined[0].result(PATIENCE_S)
    # A pass of its own to begin with; all others are those of the batch it joined.
    assert runtime.passes.count(2) == 1, runtime.passes
    assert_same(answer, model.run_many(captions(1))[0])
    assert_same(short, model.run_many(captions(2, max_new_tokens=3))[0])


def test_what_is_answered_does_not_wait_for_the_rest_of_its_batch(scheduler, runtime, send):
    with held(scheduler):
        short, long = send(captions(2, max_new_tokens=3)), send(captions(1))
        wait_until(lambda: scheduler.queue_depth == 2)
        runtime.before_pass = lambda: short.result(PATIENCE_S) if len(runtime.passes) == 8 else None
    assert long.result(PATIENCE_S)
    assert len(runtime.passes) > 8


def test_after_a_shared_batch_a_request_waits_for_company(scheduler, send, reports, monkeypatch):
    monkeypatch.setattr(florence2.engine.work_queue, "GATHER_S", PATIENCE_S)
    for _ in range(2):
        first = send(captions(1))
        if not reports:
            first.result(PATIENCE_S)
            with held(scheduler):
                first = send(captions(1))
                second = send(captions(2))
                wait_until(lambda: scheduler.queue_depth == 2)
        else:
            wait_until(lambda: scheduler.queue_depth == 1)
            second = send(captions(2))
        first.result(PATIENCE_S), second.result(PATIENCE_S)
        scheduler.call(lambda: None)  # Until then a request would join the batch in hand.
    assert [report.together for report in reports] == [1, 2, 1, 2, 1]


def test_after_a_request_that_was_alone_nothing_is_waited_for(scheduler, monkeypatch, reports):
    monkeypatch.setattr(florence2.engine.work_queue, "GATHER_S", threading.TIMEOUT_MAX)
    for _ in range(3):
        scheduler.run(captions(1))
    assert [report.requests for report in reports] == [1, 1, 1]


def test_a_report_counts_what_was_answered(scheduler, send, reports):
    with held(scheduler):
        good = send([*captions(1, 1), Ask("nowhere.jpg", "<CAPTION>")], priority=Priority.BULK)
        wait_until(lambda: scheduler.queue_depth == 3)
    results = good.result(PATIENCE_S)
    failed, answered = reports
    assert (failed.priority, failed.prompts, failed.images) == (Priority.BULK, 1, 1)
    assert (failed.failures, failed.tokens, failed.together) == (1, 0, 3)
    assert (answered.prompts, answered.images, answered.together) == (2, 1, 2)
    assert (answered.failures, answered.requests, answered.queue_depth) == (0, 1, 0)
    assert answered.tokens == 2 * len(results[0].token_ids)
    assert all(report.seconds > 0 and report.waited_s > 0 for report in reports)


def test_an_observer_that_fails_is_logged_and_changes_nothing(start, caplog):
    def broken(report):
        raise ValueError("a broken observer")

    scheduler = start(observer=broken)
    with caplog.at_level(logging.ERROR):
        assert [type(result).__name__ for result in scheduler.run(captions(1))] == ["Result"]
        assert [type(result).__name__ for result in scheduler.run(captions(1))] == ["Result"]
    assert "a broken observer" in caplog.text


def test_a_bad_ask_fails_alone(scheduler):
    first, bad, odd, last = scheduler.run(
        [*captions(1), Ask("nowhere.jpg", "<CAPTION>"), None, *captions(2)]
    )
    assert_same(first, scheduler.run(captions(1))[0])
    assert_same(last, scheduler.run(captions(2))[0])
    assert isinstance(bad, Failure)
    assert (bad.code, bad.image) == ("bad_image", "nowhere.jpg")
    assert odd.code == "bad_request"


def test_no_asks_need_no_batch(scheduler, reports):
    assert scheduler.run([]) == []
    assert reports == []


@pytest.mark.parametrize("priority", Priority)
def test_a_fault_fails_its_own_batch_in_a_sentence_and_the_next_is_answered(
    scheduler, runtime, caplog, priority
):
    def broken():
        raise ZeroDivisionError("a fault of the network")

    runtime.before_pass = broken
    with caplog.at_level(logging.ERROR):
        failures = scheduler.run(captions(1, 2), priority=priority)
    assert [failure.code for failure in failures] == ["internal_error"] * 2
    assert "a fault of the network" not in failures[0].message
    assert "a fault of the network" in caplog.text
    runtime.before_pass = lambda: None
    [answer] = scheduler.run(captions(1), priority=priority)
    assert not isinstance(answer, Failure)


@pytest.mark.parametrize("priority", Priority)
def test_a_fault_of_one_ask_is_not_that_of_its_batch(model, scheduler, send, caplog, priority):
    faulty = Ask(picture(1), "<CAPTION>", stop=lambda: 1 / 0)
    with held(scheduler), caplog.at_level(logging.ERROR):
        one = send([faulty, *captions(1)], priority=priority)
        other = send(captions(2), priority=priority)
        wait_until(lambda: scheduler.queue_depth == 3)
    failure, beside = one.result(PATIENCE_S)
    assert failure.code == "internal_error"
    assert_same(beside, model.run_many(captions(1))[0])
    assert_same(other.result(PATIENCE_S)[0], model.run_many(captions(2))[0])


def test_while_the_model_is_busy_its_next_images_are_opened_and_scaled(
    scheduler, send, monkeypatch, tmp_path
):
    paths = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(paths):
        picture(seed).save(path)
    threads: list[str] = []
    resize = ImageProcessor.resize

    def noted(*arguments):
        threads.append(threading.current_thread().name)
        return resize(*arguments)

    monkeypatch.setattr(ImageProcessor, "resize", noted)
    with held(scheduler):
        bulk = [Ask(path, "<CAPTION>", max_new_tokens=3) for path in paths]
        answers = send(bulk, priority=Priority.BULK)
        wait_until(lambda: len(threads) == 3)
    assert all(isinstance(answer, Result) for answer in answers.result(PATIENCE_S))
    assert len(threads) == 3
    assert "florence2-model" not in threads

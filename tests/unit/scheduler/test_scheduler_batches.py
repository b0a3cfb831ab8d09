"""Requests of many callers share batches and come back in order, as if each had been alone."""

from __future__ import annotations

import logging
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from engine_tools import ask, assert_all_close, captions, codes, picture
from scheduler_tools import PATIENCE_S, held, wait_until

import florence2.engine.work_queue
from florence2 import Ask, Result
from florence2.engine.scheduler import Priority
from florence2.errors import QueueFullError, StoppedError
from florence2.pixels import ImageProcessor
from florence2.tasks import TASKS


def each_task(count, num_pictures):
    """One ask after another, of all tasks and some pictures."""
    return [
        ask(picture(number % num_pictures), TASKS[number % len(TASKS)].token, max_new_tokens=12)
        for number in range(count)
    ]


def test_two_requests_that_arrive_together_are_one_batch(scheduler, send, reports):
    with held(scheduler):
        sent = [send.queued(captions(seed)) for seed in (1, 2)]
    assert codes([*sent[0].get(), *sent[1].get()]) == [None, None]
    assert reports[0].together == 2
    assert sum(report.requests for report in reports) == 2


def test_64_threads_with_different_tasks_get_the_serial_answers(model, scheduler, send, reports):
    asks = each_task(64, 5)
    sent = [send([one], priority=Priority(number % 2)) for number, one in enumerate(asks)]
    assert_all_close([one.get()[0] for one in sent], [model.run_many([one])[0] for one in asks])
    assert sum(report.prompts for report in reports) == 64
    assert len(reports) < 64


def test_a_large_request_is_answered_in_parts_and_comes_back_in_order(model, start, reports):
    asks = each_task(11, 3)
    assert_all_close(start(max_batch=4).run(asks), model.run_many(asks))
    assert sum(report.prompts for report in reports) == 11
    assert reports[0].together == max(report.together for report in reports) == 4


def test_a_request_joins_the_batch_in_hand_and_may_be_answered_first(
    model, scheduler, runtime, send
):
    joined = []

    def join_once():
        if len(runtime.passes) == 4 and not joined:
            joined.append(send.queued(captions(2, max_new_tokens=3)))

    runtime.before_pass = join_once
    answers = scheduler.run(captions(1)) + joined[0].get()
    # A pass of its own to begin with; all others are those of the batch it joined.
    assert runtime.passes.count(2) == 1, runtime.passes
    assert_all_close(answers, model.run_many([*captions(1), *captions(2, max_new_tokens=3)]))


def test_what_is_answered_does_not_wait_for_the_rest_of_its_batch(scheduler, runtime, send):
    with held(scheduler):
        short, long = send.queued(captions(2, max_new_tokens=3)), send.queued(captions(1))
        runtime.before_pass = lambda: short.get() if len(runtime.passes) == 8 else None
    assert long.get()
    assert len(runtime.passes) > 8


def test_after_a_shared_batch_a_request_waits_for_company(scheduler, send, reports, monkeypatch):
    monkeypatch.setattr(florence2.engine.work_queue, "GATHER_S", PATIENCE_S)
    scheduler.run(captions(1))
    with held(scheduler):
        sent = [send.queued(captions(1)), send.queued(captions(2))]
    sent[0].get(), sent[1].get()
    scheduler.call(lambda: None)  # Until then a request would join the batch in hand.
    sent = [send.queued(captions(1)), send(captions(2))]
    sent[0].get(), sent[1].get()
    assert [report.together for report in reports] == [1, 2, 1, 2, 1]


def test_after_a_request_that_was_alone_nothing_is_waited_for(scheduler, monkeypatch, reports):
    monkeypatch.setattr(florence2.engine.work_queue, "GATHER_S", threading.TIMEOUT_MAX)
    for _ in range(3):
        scheduler.run(captions(1))
    assert [report.requests for report in reports] == [1, 1, 1]


def test_a_report_counts_what_was_answered(scheduler, send, reports):
    with held(scheduler):
        asks = [*captions(1, 1), Ask("nowhere.jpg", "<CAPTION>")]
        sent = send.queued(asks, priority=Priority.BULK)
    results = sent.get()
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
        assert codes(scheduler.run(captions(1)) + scheduler.run(captions(1))) == [None, None]
    assert "a broken observer" in caplog.text


def test_a_bad_ask_fails_alone(scheduler, model):
    asks = [*captions(1), Ask("nowhere.jpg", "<CAPTION>"), None, *captions(2)]
    answers = scheduler.run(asks)
    assert codes(answers) == [None, "bad_image", "bad_request", None]
    assert answers[1].image == "nowhere.jpg"
    assert_all_close(answers[::3], model.run_many(captions(1, 2)))


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
    assert codes(failures) == ["internal_error"] * 2
    assert "a fault of the network" not in failures[0].message
    assert "a fault of the network" in caplog.text
    runtime.before_pass = lambda: None
    assert codes(scheduler.run(captions(1), priority=priority)) == [None]


@pytest.mark.parametrize("priority", Priority)
def test_a_fault_of_one_ask_is_not_that_of_its_batch(model, scheduler, send, caplog, priority):
    faulty = captions(1, stop=lambda: 1 / 0)
    with held(scheduler), caplog.at_level(logging.ERROR):
        one = send.queued([*faulty, *captions(1)], priority=priority)
        other = send.queued(captions(2), priority=priority)
    # All of them first: beside the scheduler nobody else may use its runtime.
    failure, *beside = [*one.get(), *other.get()]
    assert failure.code == "internal_error"
    assert_all_close(beside, model.run_many(captions(1, 2)))


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
        sent = send(bulk, priority=Priority.BULK)
        wait_until(lambda: len(threads) == 3)
    assert codes(sent.get()) == [None] * 3
    assert len(threads) == 3
    assert "florence2-model" not in threads


NUM_CALLERS = 64
CROWDS_TASKS = [
    "<CAPTION>",
    "<OD>",
    "<OCR>",
    "<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>",
    "<NO_TASK>",
]
REFUSED = (QueueFullError, StoppedError)


class Caller:
    """One request of a kind drawn by its number, and a check of what came of it."""

    def __init__(self, number):
        draw = random.Random(number)
        self.asks = [
            Ask(
                draw.choice([picture(number % 4), picture(5), "nowhere.jpg"]),
                draw.choice(CROWDS_TASKS),
                num_beams=draw.choice([1, 2]),
                max_new_tokens=draw.choice([3, 8]),
            )
            for _ in range(draw.choice([0, 1, 1, 2, 6]))
        ]
        self.priority = draw.choice(list(Priority))
        self.deadline_s = draw.choice([None, None, 0.0, 0.3])
        self.looks_left = draw.choice([None, None, 0, 1, 3])

    def should_stop(self):
        self.looks_left -= 1
        return self.looks_left < 0

    def run(self, run):
        """What is wrong with the answers, if anything is."""
        is_patient = self.looks_left is None
        try:
            answers = run(
                self.asks,
                priority=self.priority,
                deadline_s=self.deadline_s,
                should_stop=None if is_patient else self.should_stop,
            )
        except REFUSED:
            return None
        if len(answers) != len(self.asks):
            return f"{len(answers)} answers to {len(self.asks)} asks"
        allowed = {
            "bad_image": lambda ask: ask.image == "nowhere.jpg",
            "bad_request": lambda ask: ask.task == "<NO_TASK>",
            "deadline": lambda ask: self.deadline_s is not None,
            "cancelled": lambda ask: not is_patient,
        }
        for one, answer in zip(self.asks, answers, strict=True):
            if isinstance(answer, Result):
                if answer.task != one.task:
                    return f"{one.task} was answered with {answer.task}"
            elif not allowed.get(answer.code, lambda ask: False)(one):
                return f"{one} failed with {answer}"
        return None


@pytest.mark.parametrize("is_closed_upon", [False, True])
@pytest.mark.parametrize("sessions_with_room", [1, 100])
def test_everyone_in_a_crowd_gets_the_own_answers_or_the_right_error(
    start, runtime, is_closed_upon, sessions_with_room
):
    threads_before = set(threading.enumerate())
    runtime.has_room_for = sessions_with_room
    scheduler = start(max_batch=4, max_queued=60)
    with ThreadPoolExecutor(NUM_CALLERS) as threads:
        crowd = [
            threads.submit(Caller(number).run, scheduler.run) for number in range(2 * NUM_CALLERS)
        ]
        if is_closed_upon:
            wait_until(lambda: len(runtime.passes) > 10)
            scheduler.close()
        wrong = [one.result(PATIENCE_S) for one in crowd]
    assert [one for one in wrong if one is not None] == []
    assert scheduler.queue_depth == 0
    scheduler.close()
    left = set(threading.enumerate()) - threads_before
    # The engine's helpers that open images stay as long as the engine does.
    assert [thread for thread in left if not thread.name.startswith("florence2-images")] == []
    assert runtime.open_sessions == 0

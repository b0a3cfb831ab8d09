"""Nobody waits longer than they said, a full queue says so, and no fault leaves anybody waiting."""

from __future__ import annotations

import logging
import threading

import pytest
from engine_tools import assert_all_close, captions, codes, picture
from scheduler_tools import PATIENCE_S, at_pass, held, wait_until

from florence2 import Ask
from florence2.engine.scheduler import Priority
from florence2.errors import QueueFullError, RequestError, StoppedError
from florence2.pixels import ImageProcessor


@pytest.fixture
def is_cancelled():
    return threading.Event()


def give_up_at(number, runtime, is_cancelled, sent):
    """Cancels when that pass is about to begin; returns once the caller has been told so."""

    def give_up():
        is_cancelled.set()
        wait_until(sent[0].done)

    at_pass(runtime, number, give_up)


def test_a_request_cancelled_while_it_waits_is_answered_at_once(
    scheduler, send, runtime, is_cancelled
):
    with held(scheduler):
        cancelled = send.queued(captions(1, 2), should_stop=is_cancelled.is_set)
        is_cancelled.set()
        # The model's thread is still held.
        assert codes(cancelled.get()) == ["cancelled"] * 2
        assert scheduler.queue_depth == 0
    assert scheduler.call(lambda: runtime.passes) == []


def test_a_request_whose_time_is_over_while_it_waits_is_answered_at_once(scheduler, send, runtime):
    with held(scheduler):
        [failure] = send(captions(1), deadline_s=0.05).get()
        assert scheduler.queue_depth == 0
    assert failure.code == "deadline"
    assert "50 ms" in failure.message
    assert scheduler.call(lambda: runtime.passes) == []


def test_a_deadline_may_be_far_away_but_must_be_a_number(scheduler):
    assert codes(scheduler.run(captions(1), deadline_s=float("inf"))) == [None]
    with pytest.raises(RequestError, match="number of seconds"):
        scheduler.run(captions(1), deadline_s=float("nan"))


@pytest.mark.parametrize("priority", Priority)
@pytest.mark.parametrize("code", ["cancelled", "deadline"])
def test_a_request_given_up_between_two_steps_leaves_the_batch_to_the_others(
    model, scheduler, send, runtime, is_cancelled, priority, code
):
    how = {"deadline_s": 0.5} if code == "deadline" else {"should_stop": is_cancelled.is_set}
    with held(scheduler):
        sent = [
            send.queued(captions(1, 2), priority=priority, **how),
            send.queued(captions(3), priority=priority),
        ]
        give_up_at(4, runtime, is_cancelled, sent)
    assert codes(sent[0].get()) == [code] * 2
    assert_all_close(sent[1].get(), model.run_many(captions(3)))


def test_once_the_only_request_is_given_up_its_batch_ends(scheduler, send, runtime, is_cancelled):
    with held(scheduler):
        sent = [send(captions(1), should_stop=is_cancelled.is_set)]
        give_up_at(4, runtime, is_cancelled, sent)
    sent[0].get()
    assert len(scheduler.call(lambda: runtime.passes)) == 5


def test_what_was_answered_before_a_request_was_given_up_stays(start, runtime, is_cancelled):
    scheduler = start(max_batch=1, observer=lambda report: is_cancelled.set())
    runtime.before_pass = lambda: (
        is_cancelled.is_set() and wait_until(lambda: scheduler.queue_depth == 0)
    )
    results = scheduler.run(captions(1, 2, 3), should_stop=is_cancelled.is_set)
    assert codes(results) == [None, "cancelled", "cancelled"]


def test_a_should_stop_that_fails_fails_its_own_request(scheduler, caplog):
    def broken():
        raise ValueError("a broken callback")

    with caplog.at_level(logging.ERROR):
        assert codes(scheduler.run(captions(1), should_stop=broken)) == ["internal_error"]
    assert "a broken callback" in caplog.text
    assert codes(scheduler.run(captions(1))) == [None]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(start, send_to):
    scheduler = start(max_queued=3)
    send = send_to(scheduler)
    with held(scheduler):
        # There is room for one, so a larger request is let in.
        sent = [send.queued(captions(1, 2)), send.queued(captions(3, 4, 5))]
        with pytest.raises(QueueFullError, match="At most 3 prompts") as caught:
            scheduler.run(captions(6))
        assert caught.value.code == "queue_full"
        assert 1 <= caught.value.retry_after_s <= 60
    assert codes([*sent[0].get(), *sent[1].get()]) == [None] * 5
    assert codes(scheduler.run(captions(6))) == [None]


def test_a_click_is_let_in_although_a_run_fills_the_queue(start, send_to):
    scheduler = start(max_queued=3)
    send = send_to(scheduler)
    with held(scheduler):
        bulk = send.queued(captions(1, 2, 3, 4), priority=Priority.BULK)
        click = send.queued(captions(5))
        with pytest.raises(QueueFullError, match="and 4 do"):
            scheduler.run(captions(6), priority=Priority.BULK)
    assert codes([*bulk.get(), *click.get()]) == [None] * 5


def test_closing_stops_those_who_wait_and_the_batch_in_hand(start, send_to, runtime):
    scheduler = start(max_batch=1)
    send, is_running = send_to(scheduler), threading.Event()

    def before_pass():
        if len(runtime.passes) == 4:
            is_running.set()
            wait_until(lambda: scheduler.is_closed)

    with held(scheduler):
        sent = [send.queued(captions(1, 2), priority=priority) for priority in Priority]
        runtime.before_pass = before_pass
    assert is_running.wait(PATIENCE_S)
    scheduler.close()
    for answers in sent:
        with pytest.raises(StoppedError) as stopped:
            answers.get()
        assert stopped.value.code == "not_deployed"
    # The pass in hand was the last one.
    assert len(runtime.passes) == 5
    scheduler.close()
    for use in (lambda: scheduler.run(captions(1)), lambda: scheduler.call(lambda: None)):
        with pytest.raises(StoppedError):
            use()


def test_an_action_gives_its_value_and_its_error_and_may_call_again(scheduler):
    assert scheduler.call(lambda: 7) == 7
    assert scheduler.call(lambda: scheduler.call(lambda: 8)) == 8
    with pytest.raises(ZeroDivisionError):
        scheduler.call(lambda: 1 / 0)
    assert codes(scheduler.run(captions(1))) == [None]


def test_an_action_cannot_wait_for_its_own_thread(scheduler):
    with pytest.raises(RuntimeError, match="use the engine there"):
        scheduler.call(lambda: scheduler.run(captions(1)))


def test_an_action_may_close_the_scheduler(scheduler):
    scheduler.call(scheduler.close)
    assert scheduler.is_closed
    scheduler.close()


def test_a_parked_engine_answers_as_before(scheduler, engine):
    before = scheduler.run(captions(1))
    scheduler.call(engine.park)
    assert engine.is_parked
    assert engine.cache.num_bytes == 0
    assert_all_close(scheduler.run(captions(1)), before)
    assert not engine.is_parked


ASSERT = "CUDA error: device-side assert triggered"


@pytest.mark.parametrize("priority", Priority)
@pytest.mark.parametrize("number", [0, 1, 4], ids=["images", "first", "later"])
def test_requests_in_hand_and_those_that_wait_get_the_devices_error(
    start, send_to, runtime, priority, number
):
    told: list[str] = []
    scheduler = start(on_lost=lambda: told.append(threading.current_thread().name))
    send = send_to(scheduler)
    at_pass(runtime, number, lambda: setattr(runtime, "lost", ASSERT))
    with held(scheduler):
        one = send.queued(captions(1, 2), priority=priority)
        other = send.queued(captions(*range(3, 12)), priority=priority)
    outcomes = [*one.get(), *other.get()]
    assert codes(outcomes) == ["device_lost"] * 11
    assert ASSERT in outcomes[0].message
    assert codes(scheduler.run(captions(1))) == ["device_lost"]
    assert told == ["florence2-model"]


def test_a_click_that_meets_the_error_leaves_none_of_the_bulk_batch_unanswered(
    scheduler, runtime, send
):
    clicks = []

    def before_pass():
        if len(runtime.passes) == 5 and not clicks:
            clicks.append(send.queued(captions(9)))
        elif len(runtime.passes) == 6:
            runtime.lost = ASSERT

    runtime.before_pass = before_pass
    bulk = scheduler.run(captions(1, 2, 3), priority=Priority.BULK)
    assert codes(bulk + clicks[0].get()) == ["device_lost"] * 4


def test_a_device_that_works_is_not_reported(start):
    told: list[None] = []
    scheduler = start(on_lost=lambda: told.append(None))
    assert codes(scheduler.run(captions(1))) == [None]
    scheduler.call(lambda: None)
    assert told == []


def test_a_lack_of_memory_of_the_program_is_a_fault_and_not_a_loop(scheduler):
    def short():
        raise MemoryError("no room in the program")

    failures = scheduler.run(captions(1, 2, stop=short), priority=Priority.BULK)
    assert codes(failures) == ["internal_error"] * 2
    assert codes(scheduler.run(captions(1), priority=Priority.BULK)) == [None]


@pytest.mark.parametrize("at_look_up", [0, 3], ids=["first batch", "later"])
def test_a_click_drops_nothing_that_was_prepared_for_bulk(
    scheduler, engine, send, monkeypatch, at_look_up
):
    """Every image is scaled once, and the bulk's next ones are there when their turn comes."""
    scaled: list[tuple[int, int]] = []
    resize = ImageProcessor.resize

    def noted(self, image, helpers=None):
        scaled.append(image.size)
        return resize(self, image, helpers)

    monkeypatch.setattr(ImageProcessor, "resize", noted)
    bulk = [
        Ask(picture(seed).resize((90 + seed, 80)), "<CAPTION>", max_new_tokens=3)
        for seed in range(8)
    ]
    clicks = []
    take = engine.preparer.take

    def taken(image):
        prepared = take(image)
        if image.size[0] == 90 + at_look_up:
            # All that follow are ready; the click is answered before the next one is taken.
            wait_until(lambda: len(scaled) == 8)
            clicks.append(send.queued(captions(9, max_new_tokens=3)))
        return prepared

    engine.preparer.take = taken
    answers = scheduler.run(bulk, priority=Priority.BULK)
    assert codes(answers + clicks[0].get()) == [None] * 9
    assert len(scaled) == len(set(scaled)) == 9


def test_a_click_waits_for_one_short_pass_on_a_slow_device(scheduler, runtime):
    """Two images took a second, so from then on one is run at a time."""
    runtime.item_s = 0.5
    scheduler.run(captions(1, 2, 3, 4, 5), priority=Priority.BULK)
    assert runtime.image_batches == [2, 1, 1, 1]

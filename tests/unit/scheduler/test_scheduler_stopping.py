"""Nobody waits longer than they said, a full queue says so, and closing leaves nobody waiting."""

from __future__ import annotations

import logging
import threading

import pytest
from engine_tools import assert_all_close, captions, codes
from scheduler_tools import PATIENCE_S, at_pass, held, wait_until

from florence2.engine.scheduler import Priority
from florence2.errors import QueueFullError, RequestError, StoppedError


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

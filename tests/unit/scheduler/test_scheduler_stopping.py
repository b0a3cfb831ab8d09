"""Nobody waits longer than they said, a full queue says so, and closing leaves nobody waiting."""

from __future__ import annotations

import logging
import threading

import pytest
from scheduler_tools import PATIENCE_S, assert_same, captions, held, wait_until

from florence2 import Result
from florence2.engine.scheduler import Priority
from florence2.errors import QueueFullError, RequestError, StoppedError


def test_a_request_cancelled_while_it_waits_is_answered_at_once(scheduler, send, runtime):
    is_cancelled = threading.Event()
    with held(scheduler):
        cancelled = send(captions(1, 2), should_stop=is_cancelled.is_set)
        wait_until(lambda: scheduler.queue_depth == 2)
        is_cancelled.set()
        # The model's thread is still held.
        failures = cancelled.result(PATIENCE_S)
        assert scheduler.queue_depth == 0
    assert [failure.code for failure in failures] == ["cancelled"] * 2
    assert scheduler.call(lambda: runtime.passes) == []


def test_a_request_whose_time_is_over_while_it_waits_is_answered_at_once(scheduler, send, runtime):
    with held(scheduler):
        [failure] = send(captions(1), deadline_s=0.05).result(PATIENCE_S)
        assert scheduler.queue_depth == 0
    assert failure.code == "deadline"
    assert "50 ms" in failure.message
    assert scheduler.call(lambda: runtime.passes) == []


def test_a_deadline_may_be_far_away_but_must_be_a_number(scheduler):
    assert isinstance(scheduler.run(captions(1), deadline_s=float("inf"))[0], Result)
    with pytest.raises(RequestError, match="number of seconds"):
        scheduler.run(captions(1), deadline_s=float("nan"))


@pytest.mark.parametrize("priority", Priority)
@pytest.mark.parametrize("code", ["cancelled", "deadline"])
def test_a_request_given_up_between_two_steps_leaves_the_batch_to_the_others(
    model, scheduler, send, runtime, priority, code
):
    is_cancelled = threading.Event()
    given_up = []

    def before_pass():
        if len(runtime.passes) == 4 and given_up:
            is_cancelled.set()
            wait_until(given_up[0].done)

    how = {"deadline_s": 0.5} if code == "deadline" else {"should_stop": is_cancelled.is_set}
    with held(scheduler):
        given_up.append(send(captions(1, 2), priority=priority, **how))
        wait_until(lambda: scheduler.queue_depth == 2)
        other = send(captions(3), priority=priority)
        wait_until(lambda: scheduler.queue_depth == 3)
        runtime.before_pass = before_pass
    assert [failure.code for failure in given_up[0].result(PATIENCE_S)] == [code] * 2
    assert_same(other.result(PATIENCE_S)[0], model.run_many(captions(3))[0])


def test_once_the_only_request_is_given_up_its_batch_ends(scheduler, send, runtime):
    is_cancelled = threading.Event()
    given_up = []

    def before_pass():
        if len(runtime.passes) == 4:
            is_cancelled.set()
            wait_until(given_up[0].done)

    with held(scheduler):
        given_up.append(send(captions(1), should_stop=is_cancelled.is_set))
        runtime.before_pass = before_pass
    given_up[0].result(PATIENCE_S)
    assert len(scheduler.call(lambda: runtime.passes)) == 5


def test_what_was_answered_before_a_request_was_given_up_stays(start, runtime):
    is_cancelled = threading.Event()
    scheduler = start(max_batch=1, observer=lambda report: is_cancelled.set())
    runtime.before_pass = lambda: (
        is_cancelled.is_set() and wait_until(lambda: scheduler.queue_depth == 0)
    )
    results = scheduler.run(captions(1, 2, 3), should_stop=is_cancelled.is_set)
    assert isinstance(results[0], Result)
    assert [failure.code for failure in results[1:]] == ["cancelled"] * 2


def test_a_should_stop_that_fails_fails_its_own_request(scheduler, caplog):
    def broken():
        raise ValueError("a broken callback")

    with caplog.at_level(logging.ERROR):
        [failure] = scheduler.run(captions(1), should_stop=broken)
    assert failure.code == "internal_error"
    assert "a broken callback" in caplog.text
    assert isinstance(scheduler.run(captions(1))[0], Result)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(start):
    scheduler = start(max_queued=3)
    threads = []

    def request(asks):
        threads.append(threading.Thread(target=scheduler.run, args=(asks,)))
        threads[-1].start()

    with held(scheduler):
        request(captions(1, 2))
        wait_until(lambda: scheduler.queue_depth == 2)
        # There is room for one, so a larger request is let in.
        request(captions(3, 4, 5))
        wait_until(lambda: scheduler.queue_depth == 5)
        with pytest.raises(QueueFullError, match="At most 3 prompts") as caught:
            scheduler.run(captions(6))
        assert caught.value.code == "queue_full"
        assert 1 <= caught.value.retry_after_s <= 60
    for thread in threads:
        thread.join()
    assert isinstance(scheduler.run(captions(6))[0], Result)


def test_a_click_is_let_in_although_a_run_fills_the_queue(start, send_to):
    scheduler = start(max_queued=3)
    with held(scheduler):
        bulk = send_to(scheduler, captions(1, 2, 3, 4), priority=Priority.BULK)
        wait_until(lambda: scheduler.queue_depth == 4)
        click = send_to(scheduler, captions(5))
        wait_until(lambda: scheduler.queue_depth == 5)
        with pytest.raises(QueueFullError, match="and 4 do"):
            scheduler.run(captions(6), priority=Priority.BULK)
    assert isinstance(click.result(PATIENCE_S)[0], Result)
    assert all(isinstance(result, Result) for result in bulk.result(PATIENCE_S))


def test_closing_stops_those_who_wait_and_the_batch_in_hand(start, runtime):
    scheduler = start(max_batch=1)
    caught: list[Exception] = []

    def request(priority):
        with pytest.raises(StoppedError) as stopped:
            scheduler.run(captions(1, 2), priority=priority)
        caught.append(stopped.value)

    def before_pass():
        if len(runtime.passes) == 4:
            is_running.set()
            wait_until(lambda: scheduler.is_closed)

    is_running = threading.Event()
    with held(scheduler):
        threads = [threading.Thread(target=request, args=(priority,)) for priority in Priority]
        for thread in threads:
            thread.start()
        wait_until(lambda: scheduler.queue_depth == 4)
        runtime.before_pass = before_pass
    assert is_running.wait(PATIENCE_S)
    scheduler.close()
    for thread in threads:
        thread.join()
    assert [error.code for error in caught] == ["not_deployed"] * 2
    # The pass in hand was the last one.
    assert len(runtime.passes) == 5
    scheduler.close()
    with pytest.raises(StoppedError):
        scheduler.run(captions(1))
    with pytest.raises(StoppedError):
        scheduler.call(lambda: None)


def test_an_action_gives_its_value_and_its_error_and_may_call_again(scheduler):
    assert scheduler.call(lambda: 7) == 7
    assert scheduler.call(lambda: scheduler.call(lambda: 8)) == 8
    with pytest.raises(ZeroDivisionError):
        scheduler.call(lambda: 1 / 0)
    assert isinstance(scheduler.run(captions(1))[0], Result)


def test_an_action_cannot_wait_for_its_own_thread(scheduler):
    with pytest.raises(RuntimeError, match="use the engine there"):
        scheduler.call(lambda: scheduler.run(captions(1)))


def test_an_action_may_close_the_scheduler(scheduler):
    scheduler.call(scheduler.close)
    assert scheduler.is_closed
    scheduler.close()


def test_a_parked_engine_answers_as_before(scheduler, engine):
    [before] = scheduler.run(captions(1))
    scheduler.call(engine.park)
    assert engine.is_parked
    assert engine.cache.num_bytes == 0
    [after] = scheduler.run(captions(1))
    assert not engine.is_parked
    assert_same(after, before)

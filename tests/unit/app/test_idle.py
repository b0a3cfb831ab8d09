"""Something happens once nothing has happened for a while."""

from __future__ import annotations

import threading

from serve.model_service import IdleTimer


def test_it_acts_once_when_nothing_happens():
    acted = threading.Semaphore(0)
    timer = IdleTimer(acted.release)
    timer.touch(0.05)
    assert acted.acquire(timeout=10)
    assert not acted.acquire(timeout=0.2)


def test_it_acts_again_after_the_next_touch():
    acted = threading.Semaphore(0)
    timer = IdleTimer(acted.release)
    for _ in range(2):
        timer.touch(0.05)
        assert acted.acquire(timeout=10)


def test_many_threads_share_one_timer():
    timer = IdleTimer(lambda: None)
    before = threading.active_count()
    callers = [threading.Thread(target=timer.touch, args=(60.0,)) for _ in range(50)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert threading.active_count() <= before + 1
    timer.cancel()


def test_a_cancelled_timer_does_not_act():
    acted = threading.Event()
    timer = IdleTimer(acted.set)
    timer.touch(0.2)
    timer.cancel()
    assert not acted.wait(0.5)


def test_an_action_that_fails_does_not_end_the_timer():
    acted = threading.Semaphore(0)

    def fail() -> None:
        acted.release()
        raise OSError("no device")

    timer = IdleTimer(fail)
    for _ in range(2):
        timer.touch(0.01)
        assert acted.acquire(timeout=10)

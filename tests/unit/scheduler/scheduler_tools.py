"""What the scheduler's tests share: a runtime that tells of its passes, waiting, a held model."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from engine_tools import CountingRuntime

PATIENCE_S = 60.0
"""Long enough for any machine; a test that waits so long has failed."""


def wait_until(is_so):
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end, "what the test waits for does not come"
        time.sleep(0.001)


@contextlib.contextmanager
def held(scheduler):
    """Keeps the model's thread busy, so that what is sent meanwhile waits together."""
    is_held, release = threading.Event(), threading.Event()

    def hold():
        is_held.set()
        assert release.wait(PATIENCE_S)

    thread = threading.Thread(target=scheduler.call, args=(hold,))
    thread.start()
    assert is_held.wait(PATIENCE_S)
    try:
        yield
    finally:
        release.set()
        thread.join()


class Sender:
    """Sends requests to a scheduler, each on a thread of its own: the future of its answers."""

    def __init__(self, scheduler, threads):
        self._scheduler, self._threads = scheduler, threads

    def __call__(self, asks, **how):
        return Answers(self._threads.submit(self._scheduler.run, asks, **how))

    def queued(self, asks, **how):
        """As a call, once they wait; for when the model is held, or by its own thread."""
        num_waiting = self._scheduler.queue_depth + len(asks)
        answers = self(asks, **how)
        wait_until(lambda: self._scheduler.queue_depth >= num_waiting)
        return answers


class Answers:
    """What a request that was sent comes to."""

    def __init__(self, future):
        self._future = future
        self.done = future.done

    def get(self):
        return self._future.result(PATIENCE_S)


def at_pass(runtime, number, act):
    """Acts once, when the pass of that number is about to begin; what came of it."""
    acted: list[object] = []

    def before_pass():
        if len(runtime.passes) == number and not acted:
            acted.append(None)
            acted[0] = act()

    runtime.before_pass = before_pass
    return acted


class WatchedRuntime(CountingRuntime):
    """``passes`` names every pass, and ``before_pass`` is called ahead of it.

    A pass is "images", or the number of its decoding session, counted from 1 in each test.
    """

    def __init__(self, runtime):
        super().__init__(runtime)
        self.passes: list[str | int] = []
        self.before_pass: Callable[[], None] = lambda: None
        self.open_sessions = 0
        self.has_room_for = 100

    def note(self, name):
        self.before_pass()
        self.check_device()
        self.passes.append(name)

    def encode_bytes(self, images, table):
        self.note("images")
        return super().encode_bytes(images, table)

    def start(self, *arguments):
        if self.open_sessions >= self.has_room_for:
            raise self.no_memory()
        session = super().start(*arguments)
        return WatchedSession(session, self, len(self.batches))


class WatchedSession:
    """A session that counts as open for as long as anything holds it."""

    def __init__(self, session, runtime, number):
        self._session, self._runtime, self._number = session, runtime, number
        runtime.open_sessions += 1

    def __getattr__(self, name):
        return getattr(self._session, name)

    def __del__(self):
        self._runtime.open_sessions -= 1

    def prefill(self, *arguments):
        self._runtime.note(self._number)
        return self._session.prefill(*arguments)

    def step(self, *arguments):
        self._runtime.note(self._number)
        return self._session.step(*arguments)

"""What the scheduler's tests share: pictures, a runtime that tells of its passes, waiting."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from PIL import Image

from florence2 import Ask, Failure, Result
from florence2.engine.scheduler import Scheduler
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene

PATIENCE_S = 60.0
"""Long enough for any machine; a test that waits so long has failed."""


@functools.cache
def picture(seed: int) -> Image.Image:
    return draw_scene(make_scene(seed))


def captions(*seeds: int, **options: object) -> list[Ask]:
    return [Ask(picture(seed), "<CAPTION>", **options) for seed in seeds]


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end, "what the test waits for does not come"
        time.sleep(0.001)


@contextlib.contextmanager
def held(scheduler: Scheduler) -> Iterator[None]:
    """Keeps the model's thread busy, so that what is sent meanwhile waits together."""
    is_held, release = threading.Event(), threading.Event()

    def hold() -> None:
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


def assert_same(one: Result | Failure, other: Result | Failure) -> None:
    """Equal but for the rounding of scores, which depends on the batch's shape."""
    assert isinstance(one, Result)
    assert isinstance(other, Result)
    assert (one.task, one.token_ids, one.text) == (other.task, other.token_ids, other.text)
    for mine, its in zip(one.objects, other.objects, strict=True):
        assert mine.score == pytest.approx(its.score, abs=1e-4)
        assert replace(mine, score=0.0) == replace(its, score=0.0)


class Timeless:
    """A mark of a device whose passes take ``pass_s``, however fast this machine is."""

    def __init__(self, pass_s: float = 0.0):
        self._pass_s = pass_s

    def seconds_since(self, earlier):
        return self._pass_s


class WatchedRuntime:
    """The real runtime; ``passes`` names every pass, and ``before_pass`` is called ahead of it.

    A pass is "images", or the number of its decoding session, counted from 1 in each test.
    """

    def __init__(self, runtime):
        self._runtime = runtime
        self.passes: list[str | int] = []
        self.before_pass: Callable[[], None] = lambda: None
        self.num_sessions = 0
        self.open_sessions = 0
        self.has_room_for = 100
        self.pass_s = 0.0
        self.lost: str | None = None

    def __getattr__(self, name):
        return getattr(self._runtime, name)

    def mark(self):
        return Timeless(self.pass_s)

    def is_lost(self, error):
        return self.lost is not None

    def note(self, name: str | int) -> None:
        self.before_pass()
        if self.lost is not None:
            raise RuntimeError(self.lost)
        self.passes.append(name)

    def encode_bytes(self, images, table):
        self.note("images")
        return self._runtime.encode_bytes(images, table)

    def start(self, features, *arguments):
        if self.open_sessions >= self.has_room_for:
            raise torch.OutOfMemoryError("no memory left")
        self.num_sessions += 1
        return WatchedSession(self._runtime.start(features, *arguments), self, self.num_sessions)


class WatchedSession:
    """A session that counts as open for as long as anything holds it."""

    def __init__(self, session, runtime: WatchedRuntime, number: int):
        self._session, self._runtime, self._number = session, runtime, number
        runtime.open_sessions += 1

    def __getattr__(self, name):
        return getattr(self._session, name)

    def __del__(self):
        self._runtime.open_sessions -= 1

    def prefill(self, prefix_ids):
        self._runtime.note(self._number)
        return self._session.prefill(prefix_ids)

    def step(self, token_ids):
        self._runtime.note(self._number)
        return self._session.step(token_ids)

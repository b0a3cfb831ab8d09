"""What the engine's tests share: pictures, questions, comparison, a counting runtime."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from florence2 import Ask, Result
from florence2.engine.answering import answer
from florence2.engine.engine import Caller
from florence2.tasks import TASKS, TaskInput
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene

REGION = (20.0, 30.0, 150.0, 170.0)


def picture(seed: int) -> Image.Image:
    return draw_scene(make_scene(seed))


def ask(image: object, task: str, **search: object) -> Ask:
    takes = next(known.takes for known in TASKS if known.token == task)
    text = "a red car" if takes is TaskInput.TEXT else None
    region = REGION if takes is TaskInput.REGION else None
    return Ask(image, task, text, region, **({"max_new_tokens": 16} | search))


def essence(result: Result) -> tuple[object, ...]:
    return (result.task, result.token_ids, result.objects, result.text, result.truncated)


def assert_close(one: Result, other: Result) -> None:
    """Equal but for the rounding of scores, which depends on the batch's shape."""
    assert one.token_ids == other.token_ids
    assert (one.task, one.text, one.size_wh) == (other.task, other.text, other.size_wh)
    for mine, its in zip(one.objects, other.objects, strict=True):
        assert mine.score == pytest.approx(its.score, abs=1e-4)
        assert replace(mine, score=0.0) == replace(its, score=0.0)


class Busy(Caller):
    """One who has something done before every pass, and others who wait for its end."""

    is_awaited = True

    def __init__(self, before_pass, asks=()):
        self.before_pass = before_pass
        self._asks = list(asks)
        self.outcomes = {}

    def next_asks(self, room):
        asks, self._asks = self._asks, []
        return list(enumerate(asks))

    def settle(self, key, outcome):
        self.outcomes[key] = outcome


def answer_between(engine, asks, before_pass):
    """The outcomes of asks, in order; ``before_pass`` is called before every pass."""
    caller = Busy(before_pass, asks)
    answer(engine, caller)
    return [caller.outcomes[number] for number in range(len(asks))]


class CountingRuntime:
    """The real runtime, counting images through the tower and prompts through the decoder.

    What it is to fail at is set by the tests: batches above a size, prompts of ``misfit`` tokens,
    or everything, once ``lost`` says with which error. A pass takes ``item_s`` per item.
    """

    def __init__(self, runtime):
        self._runtime = runtime
        self.num_images = 0
        self.batches: list[int] = []
        self.fail_above: int | None = None
        self.tried: list[int] = []
        self.image_batches: list[int] = []
        self.images_tried: list[int] = []
        self.misfit: int | None = None
        self.images_fail_above: int | None = None
        self.item_s = 0.0
        self.items_run = 0
        self.lost: str | None = None

    def __getattr__(self, name):
        return getattr(self._runtime, name)

    def mark(self):
        return _Mark(self)

    def is_lost(self, error):
        return self.lost is not None

    def check_device(self):
        if self.lost is not None:
            raise RuntimeError(self.lost)

    def encode_bytes(self, images, table):
        self.check_device()
        self.images_tried.append(len(images))
        if self.images_fail_above is not None and len(images) > self.images_fail_above:
            raise torch.OutOfMemoryError("no memory left")
        self.image_batches.append(len(images))
        self.num_images += len(images)
        self.items_run += len(images)
        return self._runtime.encode_bytes(images, table)

    def start(self, features, prompt_ids, num_beams, max_new_tokens):
        self.check_device()
        self.tried.append(len(features))
        is_short = self.fail_above is not None and len(features) > self.fail_above
        if is_short or any(len(ids) == self.misfit for ids in prompt_ids):
            raise torch.OutOfMemoryError("no memory left")
        self.batches.append(len(features))
        self.items_run += len(features)
        return self._runtime.start(features, prompt_ids, num_beams, max_new_tokens)


class _Mark:
    """A device's clock that stands still but for ``item_s`` per item of a pass."""

    def __init__(self, runtime: CountingRuntime):
        self._at_s = runtime.items_run * runtime.item_s

    def seconds_since(self, earlier):
        return self._at_s - earlier._at_s

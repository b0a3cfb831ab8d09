"""What tests of the engine and of the scheduler share: pictures, questions, callers, a runtime."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from florence2 import Ask, Result
from florence2.engine.answering import answer
from florence2.engine.engine import Asker, Engine
from florence2.tasks import TASKS, TaskInput
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene

TORCH_ONLY = pytest.mark.parametrize("runtime_name", ["torch"], indirect=True)
"""For what is torch's own, and for what comes before a runtime is asked."""

REGION = (20.0, 30.0, 150.0, 170.0)


@functools.cache
def picture(seed):
    return draw_scene(make_scene(seed))


def ask(image, task, **search):
    takes = next(known.takes for known in TASKS if known.token == task)
    text = "a red car" if takes is TaskInput.TEXT else None
    region = REGION if takes is TaskInput.REGION else None
    return Ask(image, task, text, region, **({"max_new_tokens": 16} | search))


def captions(*seeds, **options):
    return [Ask(picture(seed), "<CAPTION>", **options) for seed in seeds]


def codes(outcomes):
    """The code of each failure or error, None for a result."""
    return [getattr(outcome, "code", None) for outcome in outcomes]


def essence(result):
    return (result.task, result.token_ids, result.objects, result.text, result.truncated)


def assert_close(one, other):
    """Equal but for the rounding of scores, which depends on the batch's shape."""
    assert isinstance(one, Result)
    assert isinstance(other, Result)
    assert (one.task, one.token_ids, one.text) == (other.task, other.token_ids, other.text)
    assert one.size_wh == other.size_wh
    for mine, its in zip(one.objects, other.objects, strict=True):
        assert mine.score == pytest.approx(its.score, abs=1e-4)
        assert replace(mine, score=0.0) == replace(its, score=0.0)


def assert_all_close(some, others):
    for one, other in zip(some, others, strict=True):
        assert_close(one, other)


class Busy(Asker):
    """One who has something done before every pass, and others who wait for its end."""

    is_awaited = True

    def __init__(self, before_pass=lambda: None, asks=()):
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
    asker = Busy(before_pass, asks)
    answer(engine, asker)
    return [asker.outcomes[number] for number in range(len(asks))]


def engine_on(model, runtime, images=2, prompts=8, cache_bytes=2**24):
    """An engine of a loaded checkpoint, on another runtime."""
    return Engine(
        model.engine.checkpoint,
        runtime,
        image_batch=images,
        prompt_batch=prompts,
        cache_bytes=cache_bytes,
    )


class CountingRuntime:
    """The real runtime, counting images through the tower and prompts through the decoder.

    What it is to fail at is set by the tests: batches above a size, prompts of ``misfit`` tokens,
    or everything, once ``lost`` says with which error. A pass takes ``item_s`` per item.
    """

    def __init__(self, runtime):
        self._runtime = runtime
        self.images_tried: list[int] = []
        self.image_batches: list[int] = []
        self.images_fail_above = self.fail_above = 1000
        self.tried: list[int] = []
        self.batches: list[int] = []
        self.misfit: int | None = None
        self.item_s = 0.0
        self.lost: str | None = None

    def __getattr__(self, name):
        return getattr(self._runtime, name)

    def no_memory(self):
        """As the runtime's libraries say it."""
        return (torch.OutOfMemoryError if self.name == "torch" else MemoryError)("no memory left")

    @property
    def num_images(self):
        return sum(self.image_batches)

    def mark(self):
        items = self.num_images + sum(self.batches)
        return Mark(items * self.item_s)

    def is_lost(self, error):
        return self.lost is not None

    def check_device(self):
        if self.lost is not None:
            raise RuntimeError(self.lost)

    def encode_bytes(self, images, table):
        self.check_device()
        self.images_tried.append(len(images))
        if len(images) > self.images_fail_above:
            raise self.no_memory()
        self.image_batches.append(len(images))
        return self._runtime.encode_bytes(images, table)

    def start(self, features, prompt_ids, num_beams, max_new_tokens):
        self.check_device()
        self.tried.append(len(features))
        if len(features) > self.fail_above or self.misfit in map(len, prompt_ids):
            raise self.no_memory()
        self.batches.append(len(features))
        return self._runtime.start(features, prompt_ids, num_beams, max_new_tokens)


class Mark:
    """A moment of a device's clock, which stands still but for its passes."""

    def __init__(self, at_s):
        self._at_s = at_s

    def seconds_since(self, earlier):
        return self._at_s - earlier._at_s

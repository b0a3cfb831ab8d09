"""What the engine's tests share: pictures, questions, comparison, a counting runtime."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from florence2 import Ask, Result
from florence2.tasks import TASKS, TaskInput
from florence2.training.draw import draw_scene
from florence2.training.scene import make_scene

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


class CountingRuntime:
    """The real runtime, counting images through the tower and prompts through the decoder."""

    def __init__(self, runtime):
        self._runtime = runtime
        self.num_images = 0
        self.batches: list[int] = []
        self.fail_above: int | None = None

    def __getattr__(self, name):
        return getattr(self._runtime, name)

    def encode_bytes(self, images, table):
        self.num_images += len(images)
        return self._runtime.encode_bytes(images, table)

    def start(self, features, prompt_ids, num_beams, max_new_tokens):
        if self.fail_above is not None and len(features) > self.fail_above:
            raise torch.OutOfMemoryError("no memory left")
        self.batches.append(len(features))
        return self._runtime.start(features, prompt_ids, num_beams, max_new_tokens)

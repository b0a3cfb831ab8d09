"""Our side of the comparison: the engine that ``Florence2.load`` gives."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from florence2.api import Florence2
from florence2.benchmark.case import TASK, Case, Timing, case_images, case_texts
from florence2.errors import FlorenceError
from florence2.images import open_image
from florence2.records import GenerationSettings
from florence2.tasks import find_task

Value = TypeVar("Value")


class OurSide:
    """Encode, prepare, answer, with the batches that the engine itself makes."""

    def __init__(self, folder: Path, device: str, runtime: str, precision: str) -> None:
        self.engine = Florence2.load(
            folder, device=device, runtime=runtime, precision=precision
        ).engine
        self.device = torch.device(device)
        self._spent = {"vision": 0.0, "prompt": 0.0}
        loaded = self.engine.runtime
        loaded.encode_bytes = self._timed("vision", loaded.encode_bytes)  # type: ignore[method-assign]
        loaded.start = self._timed("prompt", loaded.start)  # type: ignore[method-assign]

    def _timed(self, stage: str, call: Callable[..., Value]) -> Callable[..., Value]:
        def timed(*values: object, **named: object) -> Value:
            began = time.perf_counter()
            found = call(*values, **named)
            settle(self.device)
            self._spent[stage] += time.perf_counter() - began
            return found

        return timed

    def run(self, case: Case, round_index: int, limit_s: float) -> Timing:
        """All prompts of all images at once, from pictures in memory to parsed results.

        ``limit_s`` is for the sides that answer one call after another; this one is always whole.
        """
        images = case_images(case, round_index)
        settings = GenerationSettings(num_beams=case.beams, max_new_tokens=case.tokens)
        task, texts = find_task(TASK), case_texts(case)
        self.engine.cache.clear()
        self._spent = dict.fromkeys(self._spent, 0.0)
        began = time.perf_counter()
        encoded = [_value(one) for one in self.engine.encode([open_image(one) for one in images])]
        prompts = [
            self.engine.prepare(task, image, text, None, settings)
            for image in encoded
            for text in texts
        ]
        prepared = time.perf_counter()
        results = [_value(one) for one in self.engine.answer(prompts)]
        settle(self.device)
        answered = time.perf_counter()
        vision_s, prompt_s = self._spent["vision"], self._spent["prompt"]
        stages_s = {
            "preprocess_s": prepared - began - vision_s,
            "vision_s": vision_s,
            "prompt_s": prompt_s,
            "decode_s": answered - prepared - prompt_s,
        }
        return Timing(stages_s, tuple(result.token_ids for result in results))


def settle(device: torch.device) -> None:
    """Waits for the work that a GPU has been given, so that the clock has seen it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _value(outcome: Value | FlorenceError) -> Value:
    if isinstance(outcome, FlorenceError):
        raise outcome
    return outcome

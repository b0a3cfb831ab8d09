"""Held-out scenes, and what is asked about each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from florence2.errors import RequestError
from florence2_demo.examples import applies, example
from florence2_demo.placing import FractionBox
from florence2_demo.scene import Scene, make_scene
from florence2_demo.truth import TASK_BY_TOKEN, Truth, ground_truth

HELD_OUT_SEEDS: Final = range(400_000)
"""Nothing else draws scenes from these: tokenizer, demo pictures and training begin above."""
_TASK_NUMBERS: Final = {token: number for number, token in enumerate(TASK_BY_TOKEN)}


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt about one scene, and the right answer; places are in fractions of the image."""

    scene: Scene
    task: str
    text: str | None
    region_xyxy: FractionBox | None
    truth: Truth

    @property
    def region_px(self) -> FractionBox | None:
        """The region in pixels of the scene's own size."""
        if self.region_xyxy is None:
            return None
        x1, y1, x2, y2 = self.region_xyxy
        width, height = self.scene.size_wh
        return x1 * width, y1 * height, x2 * width, y2 * height


def check_seeds(seed: int, num_scenes: int) -> range:
    """The seeds of the scenes; RequestError unless all of them are held out."""
    last = HELD_OUT_SEEDS[-1]
    if num_scenes < 1:
        raise RequestError(f"At least one scene is needed, and {num_scenes} were asked for.")
    if seed < 0 or seed + num_scenes - 1 > last:
        raise RequestError(
            f"Held-out scenes have the seeds 0 to {last}, and {num_scenes} from {seed} on were "
            "asked for; choose a lower seed or fewer scenes."
        )
    return range(seed, seed + num_scenes)


def questions_about(seed: int, tasks: Sequence[str]) -> list[Question]:
    """One question per task that applies to the scene of a seed.

    A task's question does not depend on which others are asked.
    """
    scene = make_scene(seed)
    return [_question(scene, task) for task in tasks if applies(scene, task)]


def _question(scene: Scene, task: str) -> Question:
    rng = np.random.default_rng([scene.seed, _TASK_NUMBERS[task], 0xE7A1])
    made = example(scene, task, rng)
    truth = ground_truth(scene, task, made.text, made.region_xyxy)
    return Question(scene, task, made.text, made.region_xyxy, truth)


def in_chunks(seeds: range, size: int) -> Iterator[range]:
    """``seeds`` in stretches of at most ``size``."""
    for start in range(0, len(seeds), size):
        yield seeds[start : start + size]

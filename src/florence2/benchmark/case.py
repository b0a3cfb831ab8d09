"""What is measured: one row of the table, and its images and questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from florence2.records import SizeWh

TASK: Final = "<CAPTION_TO_PHRASE_GROUNDING>"
IMAGE_SIZE_WH: Final[SizeWh] = (1280, 720)
STAGES: Final = ("preprocess_s", "vision_s", "prompt_s", "decode_s")

_COLOURS: Final = ("red", "green", "blue", "white", "black")
_THINGS: Final = ("car", "tree", "house", "dog", "boat", "star", "bird", "lamp", "sign", "door")


@dataclass(frozen=True, slots=True)
class Case:
    """``batch`` images with ``prompts`` prompts each, every answer ``tokens`` tokens long."""

    batch: int
    prompts: int
    beams: int
    tokens: int

    @property
    def asks(self) -> int:
        """Answers of the whole case."""
        return self.batch * self.prompts


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one run of a case, by stage, and the tokens of its answers.

    The answers are in the order of the images, and within an image of its prompts. An answer that
    was not measured, because the run reached its limit, is None there.
    """

    stages_s: Mapping[str, float]
    token_ids: tuple[tuple[int, ...] | None, ...]

    @property
    def measured_asks(self) -> int:
        """Answers that the seconds are for."""
        return sum(ids is not None for ids in self.token_ids)

    @property
    def whole_s(self) -> float:
        """Seconds of all asks; those that were not measured count as the mean of the others."""
        return sum(self.stages_s.values()) * len(self.token_ids) / self.measured_asks


def case_images(case: Case, round_index: int) -> list[Image.Image]:
    """The RGB images, ``case.batch`` of them: noise, the same on all sides.

    Every round has images of its own, so that nothing kept from an earlier round can help.
    """
    generator = np.random.default_rng([5, round_index])
    width, height = IMAGE_SIZE_WH
    return [
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for _ in range(case.batch)
    ]


def case_texts(case: Case) -> list[str]:
    """What the prompts ask for, ``case.prompts`` texts; a prompt with one has 13 tokens."""
    return [
        f"a {_COLOURS[place % len(_COLOURS)]} {_THINGS[place % len(_THINGS)]}"
        for place in range(case.prompts)
    ]


def all_texts() -> list[str]:
    """Every text that a case can ask for, for the tokenizer to know their words."""
    return [f"a {colour} {thing}" for colour in _COLOURS for thing in _THINGS]

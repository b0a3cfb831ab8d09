"""What is measured: one row of the table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from florence2.tokens import BOS_ID, EOS_ID

IMAGE_SIDE_PX = 768
NUM_VISUAL_TOKENS = 577
PROMPT_TOKENS = 13


@dataclass(frozen=True, slots=True)
class Case:
    """``batch`` images with ``prompts`` prompts each, every answer ``tokens`` tokens long."""

    batch: int
    prompts: int
    beams: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one run of a case, by stage, and the tokens that came out of it."""

    vision_s: float
    prompt_s: float
    decode_s: float
    token_ids: tuple[tuple[int, ...], ...]


def case_pixels(case: Case) -> npt.NDArray[np.float32]:
    """The images [B, 3, 768, 768]: noise, the same on both sides."""
    generator = np.random.default_rng(5)
    shape = (case.batch, 3, IMAGE_SIDE_PX, IMAGE_SIDE_PX)
    return generator.standard_normal(shape, dtype=np.float32)


def case_prompts(case: Case) -> list[list[int]]:
    """The prompts' ids, ``case.prompts`` of the usual length."""
    generator = np.random.default_rng(6)
    return [
        [BOS_ID, *generator.integers(10, 50_000, PROMPT_TOKENS - 2).tolist(), EOS_ID]
        for _ in range(case.prompts)
    ]

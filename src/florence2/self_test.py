"""Whether a checkpoint that was loaded really answers, and in the precision it was loaded in."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from florence2.beams import NotFiniteError
from florence2.engine import Engine
from florence2.errors import CheckpointError, FlorenceError
from florence2.images import open_image
from florence2.tasks import find_task


class PrecisionError(CheckpointError):
    """The checkpoint gives NaN or infinity in reduced precision; in float32 it may answer."""


def self_test(engine: Engine) -> float:
    """One short generation, and its seconds; CheckpointError when it is no real answer.

    Catches weights that load and yet are useless: NaN, nothing at all, or ``<s>`` for ever.
    Numbers that are not finite are a PrecisionError where the precision may be why.
    """
    began = time.perf_counter()
    encoded = engine.encode([open_image(probe_picture())])[0]
    if isinstance(encoded, FlorenceError):
        raise encoded
    if not bool(torch.isfinite(encoded.features).all()):
        raise _not_finite(engine, "its visual features are not finite numbers")
    settings = replace(engine.checkpoint.generation, num_beams=1, max_new_tokens=8)
    prompt = engine.prepare(find_task("<CAPTION>"), encoded, None, None, settings)
    result = engine.answer([prompt])[0]
    if isinstance(result, NotFiniteError):
        raise _not_finite(engine, "its answer to <CAPTION> is not made of finite numbers")
    if isinstance(result, FlorenceError):
        raise result
    if not result.token_ids:
        raise CheckpointError(_useless(engine, "its answer to <CAPTION> is empty"))
    return time.perf_counter() - began


def probe_picture() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A small picture [64, 64, 3] of two gradients: no two parts of it are alike."""
    gradient = np.linspace(0, 255, 64, dtype=np.uint8)
    return np.stack(np.broadcast_arrays(gradient[:, None], gradient[None], np.uint8(96)), 2)


def _not_finite(engine: Engine, why: str) -> CheckpointError:
    kind = CheckpointError if engine.runtime.precision == "fp32" else PrecisionError
    return kind(_useless(engine, why))


def _useless(engine: Engine, why: str) -> str:
    advice = "download it again"
    if engine.runtime.precision != "fp32":
        advice += " or use precision fp32"
    return (
        f"Checkpoint {engine.checkpoint.name} loads but does not answer in "
        f"{engine.runtime.precision}: {why}; {advice}."
    )

"""Whether a checkpoint that was loaded really answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from florence2.beams import NotFiniteError
from florence2.engine import Engine
from florence2.errors import CheckpointError, FlorenceError
from florence2.images import open_image
from florence2.tasks import find_task


def self_test(engine: Engine) -> None:
    """One short generation; CheckpointError when the checkpoint cannot really answer.

    Catches weights that load and yet are useless: NaN, nothing at all, or ``<s>`` for ever.
    """
    gradient = np.linspace(0, 255, 64, dtype=np.uint8)
    picture = np.stack(np.broadcast_arrays(gradient[:, None], gradient[None], np.uint8(96)), 2)
    encoded = engine.encode([open_image(picture)])[0]
    if isinstance(encoded, FlorenceError):
        raise encoded
    if not bool(torch.isfinite(encoded.features).all()):
        raise _useless(engine, "its visual features are not finite numbers")
    settings = replace(engine.checkpoint.generation, num_beams=1, max_new_tokens=8)
    prompt = engine.prepare(find_task("<CAPTION>"), encoded, None, None, settings)
    result = engine.answer([prompt])[0]
    if isinstance(result, NotFiniteError):
        raise _useless(engine, "its answer to <CAPTION> is not made of finite numbers")
    if isinstance(result, FlorenceError):
        raise result
    if not result.token_ids:
        raise _useless(engine, "its answer to <CAPTION> is empty")


def _useless(engine: Engine, why: str) -> CheckpointError:
    return CheckpointError(
        f"Checkpoint {engine.checkpoint.name} loads but does not answer: {why}; "
        "download it again or use another precision."
    )

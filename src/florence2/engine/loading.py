"""Whether a checkpoint that was loaded really answers, and in the precision it was loaded in."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from florence2.engine.engine import Engine, Prompt
from florence2.engine.feature_cache import EncodedImage
from florence2.errors import CheckpointError, FlorenceError
from florence2.generation.beam_search import NotFiniteError
from florence2.images import open_image
from florence2.records import GenerationSettings, Result
from florence2.runtimes.cuda_graphs import GraphRunner
from florence2.tasks import find_task

_ROUNDS: Final = 3
"""Steps of a shape are recorded once it has come up a few times, and then replayed."""


_TOKENS: Final = 24


_JOIN_AFTER: Final = 3


_BEAMS: Final = (1, 3)


_TASKS: Final = ("<CAPTION>", "<OD>")


class PrecisionError(CheckpointError):
    """The checkpoint gives NaN or infinity in reduced precision; in float32 it may answer."""


def self_test(engine: Engine) -> float:
    """One short generation, and its seconds; CheckpointError when it is no real answer.

    Catches weights that load and yet are useless: NaN, nothing at all, or ``<s>`` for ever.
    Numbers that are not finite are a PrecisionError where the precision may be why.
    """
    began = time.perf_counter()
    encoded = _encoded(engine, probe_picture())
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


def check_recordings(engine: Engine, graphs: GraphRunner) -> None:
    """Turns recording off unless recorded work gives the tokens of the same work unrecorded.

    Captions and boxes of two pictures, greedy and with beams, of prompts that start together and of
    others that join them. A recording that fails turns recording off by itself.
    """
    if not graphs.is_enabled:
        return
    try:
        recorded = [_answers(engine) for _ in range(_ROUNDS)][-1]
    except RuntimeError as error:
        graphs.give_up(f"recorded work failed: {error}")
        return
    with graphs.plainly():
        expected = _answers(engine)
    if recorded != expected:
        graphs.give_up("recorded work gave other tokens than the same work unrecorded")


def _answers(engine: Engine) -> list[tuple[int, ...] | str]:
    """The tokens of each prompt, or why it has none."""
    # One after the other, and of two pictures: a recording that does nothing would go unseen
    # where it is asked for what it was recorded with.
    engine.cache.clear()
    pictures = [_encoded(engine, picture) for picture in (probe_picture(), 255 - probe_picture())]
    found: list[tuple[int, ...] | str] = []
    for beams in _BEAMS:
        settings = replace(engine.checkpoint.generation, num_beams=beams, max_new_tokens=_TOKENS)
        feed = _JoiningFeed(
            _prompts(engine, _TASKS, pictures, settings),
            _prompts(engine, _TASKS, pictures[::-1], settings),
        )
        engine.answer_feed(feed, feed.count_pass)
        found += feed.answers()
    return found


def _encoded(engine: Engine, picture: np.ndarray[Any, np.dtype[np.uint8]]) -> EncodedImage:
    [encoded] = engine.encode([open_image(picture)])
    if isinstance(encoded, FlorenceError):
        raise encoded
    return encoded


def _prompts(
    engine: Engine,
    tasks: Sequence[str],
    images: Sequence[EncodedImage],
    settings: GenerationSettings,
) -> list[Prompt]:
    return [
        engine.prepare(find_task(task), image, None, None, settings)
        for task, image in zip(tasks, images, strict=True)
    ]


class _JoiningFeed:
    """Prompts of like settings, of which some come when the others have made a few passes."""

    def __init__(self, first: Sequence[Prompt], later: Sequence[Prompt]) -> None:
        self._prompts = [*first, *later]
        self._waiting = [list(first), list(later)]
        self._num_passes = 0
        self._outcomes: dict[Prompt, Result | FlorenceError] = {}

    def count_pass(self) -> None:
        self._num_passes += 1

    def next_settings(self) -> GenerationSettings | None:
        return self._prompts[0].settings if self._waiting else None

    def take(self, room: int, settings: GenerationSettings) -> Sequence[Prompt]:
        is_early = len(self._waiting) == 1 and self._num_passes < _JOIN_AFTER
        if not self._waiting or is_early:
            return []
        taken, left = self._waiting[0][:room], self._waiting[0][room:]
        self._waiting = [left, *self._waiting[1:]] if left else self._waiting[1:]
        return taken

    def settle(self, prompt: Prompt, outcome: Result | FlorenceError) -> None:
        self._outcomes[prompt] = outcome

    def answers(self) -> list[tuple[int, ...] | str]:
        outcomes = [self._outcomes[prompt] for prompt in self._prompts]
        return [
            str(outcome) if isinstance(outcome, FlorenceError) else outcome.token_ids
            for outcome in outcomes
        ]


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

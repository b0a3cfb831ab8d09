"""Answers on their way from the device: read while it goes on with its next step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from florence2.errors import FlorenceError
from florence2.records import Answer
from florence2.tokens import BOS_ID


class NotFiniteError(FlorenceError):
    """The network gave no finite numbers for one prompt, so there is no answer to it."""

    code = "not_finite"
    token_ids: tuple[int, ...] = ()  # as an Answer of nothing


class HostCopies:
    """Copies of some tensors of one device; the host goes on while they are made."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        device = tensors[0].device
        if device.type != "cuda":
            self._copies = [tensor.clone() for tensor in tensors]
            return
        self._copies = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors
        ]
        for copied, tensor in zip(self._copies, tensors, strict=True):
            copied.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> list[Tensor]:
        """The copies, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


class Readout:
    """The best finished hypotheses of B rows, copied as the search stands when it is made."""

    def __init__(
        self,
        best: tuple[Tensor, Tensor],
        entries: tuple[Tensor, Tensor, Tensor],
        limits: Sequence[int],
        *,
        has_nearby: bool,
    ) -> None:
        """What ``BeamSearch`` has of these rows.

        ``best`` are the score and the packed end of each, [B]; ``entries`` tokens, parents
        [B, steps, beams] and log-probabilities [B, steps, beams, 2].
        """
        self._copies = HostCopies([*best, *entries])
        self._limits = limits
        self._beams = entries[0].shape[2]
        self._has_nearby = has_nearby

    def answers(self) -> list[Answer | NotFiniteError]:
        """One per row, in order; waits until they are copied."""
        scores, ends, *entries = self._copies.wait()
        return [
            self._answer(limit, score, end, row)
            for limit, score, end, *row in zip(
                self._limits, scores.tolist(), ends.tolist(), *entries, strict=True
            )
        ]

    def _answer(
        self, limit: int, score: float, end: int, row: list[Tensor]
    ) -> Answer | NotFiniteError:
        if limit == 1:
            return Answer((), (), 0.0, truncated=True)
        if end < 0 or not math.isfinite(score):
            return NotFiniteError(
                "The network must return finite numbers, and it did not for this image and "
                "prompt; use precision fp32, or another image."
            )
        step, beam = divmod(end // 2, self._beams)
        ids, logs = _trace(row, step, beam)
        first = next((at for at, token in enumerate(ids) if token != BOS_ID), len(ids))
        own, near = zip(*logs[first:], strict=True) if logs[first:] else ((), ())
        shown = near if self._has_nearby else ()
        return Answer(tuple(ids[first:]), own, score, bool(end % 2), shown)


def _trace(row: list[Tensor], step: int, beam: int) -> tuple[list[int], list[list[float]]]:
    """Token ids and pairs of log-probs of what ended at ``step`` after ``beam``."""
    tokens: list[list[int]]
    parents: list[list[int]]
    log_probs: list[list[list[float]]]
    tokens, parents, log_probs = (table[:step].tolist() for table in row)
    ids: list[int] = []
    logs: list[list[float]] = []
    for at in range(step - 1, -1, -1):
        ids.append(tokens[at][beam])
        logs.append(log_probs[at][beam])
        beam = parents[at][beam]
    return ids[::-1], logs[::-1]

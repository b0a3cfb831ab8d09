"""What the beams of a search have said, from which an answer is read once it has ended."""

from __future__ import annotations

import copy
from typing import Final

import torch
from torch import Tensor

from florence2.rows import put_rows, widened
from florence2.tokens import BOS_ID, DECODER_START_ID

PREFIX: Final = (DECODER_START_ID, BOS_ID)

_NOTHING: Final = -1


class Hypotheses:
    """The tokens of B rows with their parents: one entry per step and beam, never moved.

    Entry t of a row belongs to that row's own step t: rows may have begun at different times.
    ``with_history`` also keeps every beam's tokens in a line, which the n-gram ban reads.
    """

    def __init__(
        self, num_rows: int, beams: int, capacity: int, device: torch.device, with_history: bool
    ) -> None:
        """``capacity`` counts steps."""
        shape = (num_rows, capacity, beams)
        self._tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self._parents = torch.zeros_like(self._tokens)
        # For every token its own log-probability, and that of it and its neighbours.
        self._log_probs = torch.zeros((*shape, 2), device=device)
        self._history: Tensor | None = None
        if with_history:
            line = (num_rows, beams, len(PREFIX) + capacity)
            self._history = torch.full(line, _NOTHING, dtype=torch.long, device=device)
            for place, token in enumerate(PREFIX):
                self._history[..., place] = token

    @property
    def capacity(self) -> int:
        """Steps there is room for."""
        return self._tokens.shape[1]

    def history(self, rows_per_item: int, length: int) -> Tensor | None:
        """The first ``length`` tokens of every line, the prefix included: [B * R, length].

        What a line has not reached yet is -1.
        """
        if self._history is None:
            return None
        return self._history[:, :rows_per_item, :length].flatten(0, 1)

    def add(self, steps: Tensor, tokens: Tensor, parents: Tensor, log_probs: Tensor) -> None:
        """Enters ``tokens`` [B, beams] and what they continue as entry ``steps`` [B] of each row.

        ``log_probs`` [B, beams, 2].
        """
        entry = steps.view(-1, 1, 1).expand(-1, 1, tokens.shape[1])
        self._tokens.scatter_(1, entry, tokens.unsqueeze(1))
        self._parents.scatter_(1, entry, parents.unsqueeze(1))
        self._log_probs.scatter_(
            1, entry.unsqueeze(3).expand(-1, -1, -1, 2), log_probs.unsqueeze(1)
        )

    def extend_history(self, steps: Tensor, tokens: Tensor, parents: Tensor, length: int) -> None:
        """Brings the lines, so far at most ``length`` long, up to the beams just chosen."""
        if self._history is None:
            return
        lines = self._history[:, :, :length]
        lines.copy_(lines.gather(1, parents.unsqueeze(2).expand(lines.shape)))
        place = (steps + len(PREFIX)).view(-1, 1, 1).expand(-1, tokens.shape[1], 1)
        self._history.scatter_(2, place, tokens.unsqueeze(2))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows [B'] only, in this order."""
        self._tokens = self._tokens[rows]
        self._parents = self._parents[rows]
        self._log_probs = self._log_probs[rows]
        if self._history is not None:
            self._history = self._history[rows]

    def reserve(self, capacity: int) -> None:
        """Makes room for so many steps."""
        self._tokens = widened(self._tokens, 1, capacity, 0)
        self._parents = widened(self._parents, 1, capacity, 0)
        self._log_probs = widened(self._log_probs, 1, capacity, 0.0)
        if self._history is not None:
            self._history = widened(self._history, 2, len(PREFIX) + capacity, _NOTHING)

    def put(self, rows: Tensor, other: Hypotheses, chosen: Tensor | None = None) -> None:
        """Gives these rows [B'] to those of ``other``, which needs no more room.

        To all of its rows, or to those ``chosen`` [B'].
        """
        put_rows(self._tokens, rows, other._tokens, 0, chosen)
        put_rows(self._parents, rows, other._parents, 0, chosen)
        put_rows(self._log_probs, rows, other._log_probs, 0.0, chosen)
        if self._history is not None and other._history is not None:
            put_rows(self._history, rows, other._history, _NOTHING, chosen)

    def window(self, num_rows: int, steps: int) -> Hypotheses:
        """The first rows and steps, in the same memory."""
        part = copy.copy(self)
        part._tokens = self._tokens[:num_rows, :steps]
        part._parents = self._parents[:num_rows, :steps]
        part._log_probs = self._log_probs[:num_rows, :steps]
        if self._history is not None:
            part._history = self._history[:num_rows, :, : len(PREFIX) + steps]
        return part

    @property
    def state(self) -> list[Tensor]:
        """What a step both reads and writes."""
        return [] if self._history is None else [self._history]

    def entries(self, rows: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, parents and log-probabilities of the first ``steps`` entries of these rows."""
        return (
            self._tokens[rows, :steps],
            self._parents[rows, :steps],
            self._log_probs[rows, :steps],
        )

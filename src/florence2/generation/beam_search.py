"""The bookkeeping of beam search: which hypotheses go on, which are finished, when to stop.

It knows nothing of the network: ``BeamSearch.advance`` takes the logits of one step and leaves
the next tokens and the beams they continue. The rules are those of transformers 5.23,
``GenerationMixin._beam_search``, stated per item instead of per batch, so that an item can leave
the batch as soon as its own result is settled, and another can take its row. Shapes: B items, R
rows per item (1 for the first step, then the number of beams), V vocabulary, K = 2 * beams
candidates.

One beam is the reference's greedy search: the best candidate is always taken, and the first
``</s>`` ends the item.

The search ranks by log-probabilities after bans and forced tokens, as the reference does. What it
tells about a token, its own log-probability and that of its neighbourhood, is from before them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from florence2.bans import NEVER, ban_bos, ban_repeated_ngrams, top_candidates
from florence2.hypotheses import PREFIX, Hypotheses
from florence2.nearby import Nearby
from florence2.readout import NotFiniteError, Readout
from florence2.records import Answer, GenerationSettings
from florence2.rows import put_rows, row_numbers, to_device
from florence2.tokens import BOS_ID, EOS_ID

__all__ = ["BeamSearch", "NotFiniteError"]


_OUT: Final = -1.0e9


_STATE: Final = (
    "_counts",
    "_scores",
    "_finished_scores",
    "_finished",
    "tokens",
    "parents",
    "is_open",
)


class BeamSearch:
    """The state of a beam search over one batch, after the fixed prefix ``</s><s>``.

    The forced ``<s>`` scores 0 and counts as a generated token, as in the reference, and so does
    the closing ``</s>``. ``tokens`` and ``parents`` [B, beams] are what ``advance`` decided;
    ``is_open`` [B] tells which items can still change.

    Rows may have begun at different times. A finished hypothesis is the number of its step and of
    the beam that ended, so finishing copies nothing. With ``is_static`` no shape and no branch of
    ``advance_on_device`` depends on how far the rows are, so it can be recorded and replayed.
    """

    def __init__(
        self,
        limits: Sequence[int],
        settings: GenerationSettings,
        device: torch.device,
        nearby: Nearby | None = None,
        *,
        is_static: bool = False,
    ) -> None:
        """``limits`` has the most tokens of every row, ``<s>`` and ``</s>`` among them."""
        batch, beams = len(limits), settings.num_beams
        self._settings = settings
        self._nearby = nearby
        self._beams = beams
        self._is_static = is_static
        self._limit_of = list(limits)
        self._count_of = [1] * batch
        self._limits = to_device(self._limit_of, torch.long, device)
        self._counts = torch.ones_like(self._limits)
        capacity = max(1, max(limits) - 1)
        with_history = settings.no_repeat_ngram_size > 0
        self._said = Hypotheses(batch, beams, capacity, device, with_history)
        self._norms = self._length_norms(capacity)
        self._scores = torch.zeros((batch, beams), device=device)
        self._finished_scores = torch.full((batch, beams), _OUT, device=device)
        self._finished = torch.full((batch, beams), -1, dtype=torch.long, device=device)
        self.tokens = torch.full((batch, beams), BOS_ID, dtype=torch.long, device=device)
        self.parents = torch.zeros((batch, beams), dtype=torch.long, device=device)
        self.is_open = self._limits > 1

    @property
    def capacity(self) -> int:
        """Steps there is room for."""
        return self._said.capacity

    def reached_limit(self, row: int) -> bool:
        """Whether this row has all the tokens it may have; known without asking the device."""
        return self._limit_of[row] <= self._count_of[row]

    def advance(self, logits: Tensor) -> None:
        """Take one step: ``logits`` [B, R, V] of any float type, for the tokens chosen last."""
        self.count_pass()
        self.advance_on_device(logits)

    def count_pass(self) -> None:
        """What the host notes of a step; ``advance_on_device`` is the rest."""
        self._count_of = [count + 1 for count in self._count_of]

    def advance_on_device(self, logits: Tensor) -> None:
        """What the device does of a step."""
        batch, rows, _ = logits.shape
        log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        # Bans steer the search, and do not change how probable a token is.
        allowed = log_probs.flatten(0, 1).clone()
        history = self._said.history(rows, self._length())
        if history is not None:
            ban_repeated_ngrams(
                allowed, history, self._settings.no_repeat_ngram_size, self._lengths(rows)
            )
        else:
            ban_bos(allowed)
        values, ids = top_candidates(allowed, 2 * self._beams)
        self._counts += 1
        self._select(values.view(batch, rows, -1), ids.view(batch, rows, -1))
        own = log_probs.flatten(1).gather(1, self.parents * log_probs.shape[2] + self.tokens)
        near = own
        if self._nearby is not None:
            near = self._nearby.log_probs(log_probs, self.parents, self.tokens, own)
        self._said.add(self._steps(), self.tokens, self.parents, torch.stack((own, near), dim=-1))

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows of the batch only, in this order; a row may be named twice."""
        kept = row_numbers(rows, self.tokens.device)
        self._limit_of = [self._limit_of[row] for row in rows]
        self._count_of = [self._count_of[row] for row in rows]
        self._limits, self._counts = self._limits[kept], self._counts[kept]
        self._said.keep(kept)
        self._scores = self._scores[kept]
        self._finished_scores = self._finished_scores[kept]
        self._finished = self._finished[kept]
        self.tokens, self.parents = self.tokens[kept], self.parents[kept]
        self.is_open = self.is_open[kept]

    def put(self, rows: list[int], other: BeamSearch, chosen: list[int] | None = None) -> None:
        """Gives these rows to the items of ``other``, in order: same settings, any step.

        To all of them, or to those ``chosen``, which may be rows of this search itself.
        """
        if other.capacity > self.capacity:
            self._said.reserve(other.capacity)
            self._norms = self._length_norms(other.capacity)
        numbers = range(len(other._limit_of)) if chosen is None else chosen
        known = [(other._limit_of[number], other._count_of[number]) for number in numbers]
        for row, (limit, count) in zip(rows, known, strict=True):
            self._limit_of[row], self._count_of[row] = limit, count
        device = self.tokens.device
        into = row_numbers(rows, device)
        picked = None if chosen is None else row_numbers(chosen, device)
        self._said.put(into, other._said, picked)
        for name in ("_limits", *_STATE):
            put_rows(getattr(self, name), into, getattr(other, name), 0, picked)

    def window(self, num_rows: int, steps: int) -> BeamSearch:
        """The first rows and steps, in the same memory; for the device's part of a step.

        The steps are those after the first one, which a row has made elsewhere. Rows that anybody
        waits for do not need more.
        """
        part = copy.copy(self)
        for name in ("_limits", *_STATE):
            setattr(part, name, getattr(self, name)[:num_rows])
        part._said = self._said.window(num_rows, 1 + steps)
        return part

    @property
    def state(self) -> list[Tensor]:
        """The tensors that ``advance_on_device`` both reads and writes."""
        return [*(getattr(self, name) for name in _STATE), *self._said.state]

    def read(self, rows: Sequence[int]) -> Readout:
        """The best finished hypothesis of each of these rows; later steps do not change it."""
        chosen = row_numbers(list(rows), self.tokens.device)
        # No answer has more entries than its row has tokens.
        steps = max((self._count_of[row] for row in rows), default=0)
        return Readout(
            (self._finished_scores[chosen, 0], self._finished[chosen, 0]),
            self._said.entries(chosen, steps),
            [self._limit_of[row] for row in rows],
            has_nearby=self._nearby is not None,
        )

    def answers(self, rows: Sequence[int]) -> list[Answer | NotFiniteError]:
        """What ``read`` finds, at once: an answer of each of these rows, or why it has none."""
        return self.read(rows).answers()

    def _length_norms(self, capacity: int) -> Tensor:
        """What a score is divided by, for every count of tokens; as exact as the reference's."""
        penalty = self._settings.length_penalty
        norms = [max(count, 1) ** penalty for count in range(capacity + 2)]
        return to_device(norms, torch.float32, self._limits.device)

    def _steps(self) -> Tensor:
        """The number [B] of each row's step in hand; rows that nobody waits for may be beyond."""
        return (self._counts - len(PREFIX)).clamp(max=self.capacity - 1)

    def _length(self) -> int:
        """The length of the longest history before the step in hand, or what there is room for."""
        if self._is_static:
            return len(PREFIX) + self.capacity
        return min(max(self._count_of), 1 + self.capacity)

    def _lengths(self, rows: int) -> Tensor | None:
        """The length [B * R] of every history before the step in hand; None if all are equal."""
        if not self._is_static and len(set(self._count_of)) == 1:
            return None
        return (self._counts + 1).repeat_interleave(rows)

    def _norm(self, counts: Tensor) -> Tensor:
        return self._norms[counts.clamp(max=len(self._norms) - 1)].unsqueeze(1)

    def _select(self, values: Tensor, ids: Tensor) -> None:
        """Choose the next beams from each row's candidates: log-probs and ids, both [B, R, K]."""
        batch, rows, count = ids.shape
        ending, cut = None, None
        if self._is_static or any(map(self._is_last, range(batch))):
            ending = (self._limits == self._counts).view(batch, 1)
            cut = ending & (ids[..., 0] != EOS_ID)
            values, ids = _force_eos(values, ids, ending)
        totals = (values + self._scores[:, :rows].unsqueeze(2)).view(batch, -1)
        top, places = torch.topk(totals, count)
        beams = places // count
        tokens = ids.view(batch, -1).gather(1, places)
        ended = tokens == EOS_ID
        if ending is not None:
            ended = ended | ending
        self._finish(top, ended, beams, cut)

        scores, kept = torch.topk(torch.where(ended, top + _OUT, top), self._beams)
        self._scores.copy_(scores)
        self.tokens.copy_(tokens.gather(1, kept))
        self.parents.copy_(beams.gather(1, kept))
        self._said.extend_history(self._steps(), self.tokens, self.parents, self._length())
        self._close(ending)

    def _is_last(self, row: int) -> bool:
        return self._limit_of[row] == self._count_of[row]

    def _finish(self, top: Tensor, ended: Tensor, beams: Tensor, cut: Tensor | None) -> None:
        """Let candidates that ended into the finished ones: all arguments [B, K], best first.

        Only the first half may enter, and nothing may once the item is closed; ``cut`` [B, R] is
        set where the token limit ended a row that would have gone on.
        """
        width = self._beams
        enters = ended[:, :width] & self.is_open.unsqueeze(1)
        scores = top[:, :width] / self._norm(self._counts)
        packed = (beams[:, :width] + self._steps().unsqueeze(1) * width) * 2
        if cut is not None:
            packed = packed + cut.gather(1, beams[:, :width])
        merged = torch.cat((self._finished_scores, torch.where(enters, scores, _OUT)), dim=1)
        packed = torch.cat((self._finished, torch.where(enters, packed, -1)), dim=1)
        best, places = torch.topk(merged, width)
        self._finished_scores.copy_(best)
        self._finished.copy_(packed.gather(1, places))

    def _close(self, ending: Tensor | None) -> None:
        """Close the items whose result is settled; a closed item stays closed.

        An item with a free place among its finished ones is never settled. With early stopping
        or a single beam a full item is; otherwise once its best running beam can no longer beat
        the worst finished one, by the reference's estimate of the length it may still reach.
        """
        settings = self._settings
        settled = (self._finished >= 0).all(dim=1)
        if settings.early_stopping is not True and self._beams > 1:
            reachable = self._counts
            if settings.early_stopping == "never" and settings.length_penalty > 0:
                reachable = self._limits
            best = self._scores[:, 0] / self._norm(reachable).squeeze(1)
            settled = settled & (best <= self._finished_scores.amin(dim=1))
        if ending is not None:
            settled = settled | ending.view(-1)
        self.is_open &= ~settled


def _force_eos(values: Tensor, ids: Tensor, ending: Tensor) -> tuple[Tensor, Tensor]:
    """Leave only ``</s>``, at log-probability 0, to the items in ``ending`` [B, 1]."""
    here = ending.unsqueeze(2)
    first = torch.arange(ids.shape[2], device=ids.device) == 0
    forced = torch.where(first, 0.0, NEVER)
    return torch.where(here, forced, values), torch.where(here, EOS_ID, ids)

"""Beam search: which hypotheses go on, which are finished, when to stop, and what was said."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from florence2.errors import NotFiniteError
from florence2.generation.kv_cache import put_rows, row_numbers, to_device, widened
from florence2.network.linear import top_candidates
from florence2.records import Answer, GenerationSettings
from florence2.tokens import BOS_ID, DECODER_START_ID, EOS_ID, NUM_LOCATION_BINS

__all__ = ["BeamSearch", "NotFiniteError"]


NEVER: Final = float("-inf")


def ban_repeated_ngrams(
    log_probs: Tensor, history: Tensor, ngram_size: int, lengths: Tensor | None = None
) -> None:
    """Ban every token that would repeat an n-gram of its row.

    ``history`` is ``[rows, length]``: all tokens of each row so far, the decoder's start token
    and ``<s>`` included, because the reference counts them too. Where rows differ, ``lengths``
    [rows] says how many of them each has; the others are -1.
    """
    length = history.shape[1]
    if length < ngram_size:
        return
    windows = history.unfold(1, ngram_size, 1)
    repeats = (windows[..., :-1] == _suffix(history, ngram_size - 1, lengths)).all(dim=-1)
    last = windows[..., -1]
    if lengths is not None:
        repeats = repeats & (last >= 0)
    # What bans nothing adds 0, each to a column of its own: a GPU adds to one column in turn.
    columns = torch.arange(last.shape[1], device=history.device) % log_probs.shape[1]
    penalty = torch.zeros(repeats.shape, dtype=log_probs.dtype, device=log_probs.device)
    log_probs.scatter_add_(
        1, torch.where(repeats, last, columns), penalty.masked_fill_(repeats, NEVER)
    )


def _suffix(history: Tensor, size: int, lengths: Tensor | None) -> Tensor:
    """The last ``size`` tokens of each row: [rows, 1, size]."""
    if lengths is None:
        return history[:, history.shape[1] - size :].unsqueeze(1)
    back = torch.arange(-size, 0, device=history.device)
    # A shorter row has no n-gram to repeat, and one that nobody waits for may be beyond the end.
    places = (lengths.unsqueeze(1) + back).clamp(0, history.shape[1] - 1)
    return history.gather(1, places).unsqueeze(1)


def ban_bos(log_probs: Tensor) -> None:
    """Ban ``<s>``, which the large checkpoints otherwise repeat without end."""
    log_probs.select(1, BOS_ID).fill_(NEVER)


@dataclass(frozen=True, slots=True)
class Nearby:
    """Which token ids are locations, and how many bins away a location still is the same place.

    Neighbouring bins are a thousandth of the image apart, so a network that knows a place well
    spreads its probability over several of them; the chosen token's own share says little.
    """

    first_location_id: int
    radius_bins: int

    def log_probs(self, log_probs: Tensor, parents: Tensor, tokens: Tensor, own: Tensor) -> Tensor:
        """Logarithms [B, beams] of the probability of ``tokens`` [B, beams] or a neighbour.

        ``log_probs`` [B, R, V] by row, without bans: a banned neighbour is as near. ``parents``
        [B, beams] says from which row each token was chosen; ``own`` [B, beams] are the tokens'
        own, kept where a token is no location.
        """
        batch, rows, vocab = log_probs.shape
        first, last = self.first_location_id, self.first_location_id + NUM_LOCATION_BINS - 1
        reach = torch.arange(-self.radius_bins, self.radius_bins + 1, device=tokens.device)
        neighbours = tokens.unsqueeze(2) + reach
        offsets = torch.arange(batch, device=tokens.device).unsqueeze(1) * rows
        places = (parents + offsets).unsqueeze(2) * vocab + neighbours.clamp(first, last)
        found = log_probs.reshape(-1).gather(0, places.view(-1)).view(places.shape)
        found = torch.where((neighbours >= first) & (neighbours <= last), found, -torch.inf)
        is_location = (tokens >= first) & (tokens <= last)
        return torch.where(is_location, found.logsumexp(2).clamp(max=0.0), own)


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

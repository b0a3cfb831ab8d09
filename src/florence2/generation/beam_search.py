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
from florence2.generation.kv_cache import PREFIX_LENGTH, RowTensors, row_index, to_device
from florence2.network.florence import top_candidates
from florence2.records import Answer, GenerationSettings
from florence2.tokens import ANSWER_PREFIX, BOS_ID, EOS_ID, NUM_LOCATION_BINS

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
    ngrams = history.unfold(1, ngram_size, 1)
    repeats = (ngrams[..., :-1] == _suffix(history, ngram_size - 1, lengths)).all(dim=-1)
    last = ngrams[..., -1]
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
class LocationProbability:
    """The probability of a location: that of its bin and of those up to ``radius_bins`` away.

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


class HostCopy:
    """A copy of some tensors of one device; the host goes on while it is made."""

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
        """The copied tensors, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


class PendingAnswers:
    """The best finished hypotheses of B rows, as the search stands, on their way to the host."""

    def __init__(
        self, tensors: Sequence[Tensor], limits: Sequence[int], *, has_location_probs: bool
    ) -> None:
        """``tensors``: score and packed end of each row, [B]; tokens and parents
        [B, steps, beams], log-probabilities [B, steps, beams, 2].
        """
        self._copy = HostCopy(tensors)
        self._limits = limits
        self._has_location_probs = has_location_probs

    def wait(self) -> list[Answer | NotFiniteError]:
        """One per row, in order, or why it has none."""
        scores, ends, *hypotheses = self._copy.wait()
        return [
            self._answer(limit, score, end, row)
            for limit, score, end, *row in zip(
                self._limits, scores.tolist(), ends.tolist(), *hypotheses, strict=True
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
        step, beam = divmod(end // 2, row[0].shape[1])
        ids, logs = _trace(row, step, beam)
        first = next((at for at, token in enumerate(ids) if token != BOS_ID), len(ids))
        own, near = zip(*logs[first:], strict=True) if logs[first:] else ((), ())
        shown = near if self._has_location_probs else ()
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


_OUT: Final = -1.0e9

_NOTHING: Final = -1

_HYPOTHESES: Final = ("said_tokens", "said_parents", "said_log_probs")


class BeamSearch:
    """The state of a beam search over one batch, after the fixed prefix ``</s><s>``.

    The forced ``<s>`` scores 0 and counts as a generated token, as in the reference, and so does
    the closing ``</s>``. ``tokens`` and ``parents`` [B, beams] are what ``advance`` decided;
    ``is_open`` [B] tells which items can still change.

    Rows may have begun at different times. Hypotheses are tokens with their parents, an entry per
    step of the row and beam, which never move: entry t of a row belongs to that row's own step t.
    A finished one is the number of its step and of the beam that ended, so finishing copies
    nothing. Only the n-gram ban has every beam's tokens in a line, ``history``.

    With ``is_static`` no shape and no branch of ``advance_on_device`` depends on how far the rows
    are, so it can be recorded and replayed.
    """

    def __init__(
        self,
        limits: Sequence[int],
        settings: GenerationSettings,
        device: torch.device,
        location_probability: LocationProbability | None = None,
        *,
        is_static: bool = False,
    ) -> None:
        """``limits`` has the most tokens of every row, ``<s>`` and ``</s>`` among them."""
        batch, beams = len(limits), settings.num_beams
        self._settings = settings
        self._location_probability = location_probability
        self._beams = beams
        self._is_static = is_static
        self._limit_of = list(limits)
        self._count_of = [1] * batch
        capacity = max(1, max(limits) - 1)
        self._norms = self._length_norms(capacity, device)
        self._rows = rows = RowTensors()
        limit = to_device(self._limit_of, torch.long, device)
        each = torch.zeros((batch, beams), device=device)
        number = torch.zeros((batch, beams), dtype=torch.long, device=device)
        rows.add("limits", limit)
        rows.add("counts", torch.ones_like(limit))
        rows.add("scores", each)
        rows.add("finished_scores", torch.full_like(each, _OUT))
        rows.add("finished", torch.full_like(number, -1))
        rows.add("tokens", torch.full_like(number, BOS_ID))
        rows.add("parents", number)
        rows.add("is_open", limit > 1)
        said = torch.zeros((batch, capacity, beams), dtype=torch.long, device=device)
        rows.add("said_tokens", said, steps=1)
        rows.add("said_parents", torch.zeros_like(said), steps=1)
        # For every token its own log-probability, and that of it and its neighbours.
        log_probs = torch.zeros((batch, capacity, beams, 2), device=device)
        rows.add("said_log_probs", log_probs, steps=1)
        if settings.no_repeat_ngram_size > 0:
            shape = (batch, beams, PREFIX_LENGTH + capacity)
            history = torch.full(shape, _NOTHING, dtype=torch.long, device=device)
            for place, token in enumerate(ANSWER_PREFIX):
                history[..., place] = token
            rows.add("history", history, _NOTHING, history=2)

    @property
    def tokens(self) -> Tensor:
        """The tokens [B, beams] that were chosen last."""
        return self._rows["tokens"]

    @property
    def parents(self) -> Tensor:
        """The beams [B, beams] that the last tokens continue."""
        return self._rows["parents"]

    @property
    def is_open(self) -> Tensor:
        """Which rows [B] can still change."""
        return self._rows["is_open"]

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
        batch, rows, vocab = logits.shape
        log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        # Bans steer the search, and do not change how probable a token is.
        allowed = log_probs.flatten(0, 1).clone()
        if "history" in self._rows:
            history = self._rows["history"][:, :rows, : self._length()].flatten(0, 1)
            ngram_size = self._settings.no_repeat_ngram_size
            ban_repeated_ngrams(allowed, history, ngram_size, self._lengths(rows))
        else:
            ban_bos(allowed)
        values, ids = top_candidates(allowed, 2 * self._beams)
        self._rows["counts"] += 1
        self._select(values.view(batch, rows, -1), ids.view(batch, rows, -1))
        tokens, parents = self._rows["tokens"], self._rows["parents"]
        own = near = log_probs.flatten(1).gather(1, parents * vocab + tokens)
        if self._location_probability is not None:
            near = self._location_probability.log_probs(log_probs, parents, tokens, own)
        entry = self._steps().view(-1, 1, 1).expand(-1, 1, self._beams)
        said = (tokens, parents, torch.stack((own, near), dim=-1))
        for name, values in zip(_HYPOTHESES, said, strict=True):
            index = entry if values.dim() == 2 else entry.unsqueeze(3).expand(-1, -1, -1, 2)
            self._rows[name].scatter_(1, index, values.unsqueeze(1))

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows of the batch only, in this order; a row may be named twice."""
        self._limit_of = [self._limit_of[row] for row in rows]
        self._count_of = [self._count_of[row] for row in rows]
        self._rows.keep(row_index(rows, self.tokens.device))

    def put(self, rows: list[int], other: BeamSearch, chosen: list[int] | None = None) -> None:
        """Gives these rows to the items of ``other``, in order: same settings, any step.

        To all of them, or to those ``chosen``, which may be rows of this search itself.
        """
        device = self.tokens.device
        if other._capacity > self._capacity:
            self._rows.enlarge(steps=other._capacity, history=PREFIX_LENGTH + other._capacity)
            self._norms = self._length_norms(other._capacity, device)
        numbers = range(len(other._limit_of)) if chosen is None else chosen
        known = [(other._limit_of[number], other._count_of[number]) for number in numbers]
        for row, (limit, count) in zip(rows, known, strict=True):
            self._limit_of[row], self._count_of[row] = limit, count
        picked = None if chosen is None else row_index(chosen, device)
        self._rows.put(row_index(rows, device), other._rows, picked)

    def view(self, num_rows: int, steps: int) -> BeamSearch:
        """The first rows and steps, in the same memory; for the device's part of a step.

        The steps are those after the first one, which a row has made elsewhere. Rows that anybody
        waits for do not need more.
        """
        part = copy.copy(self)
        part._rows = self._rows.first(
            rows=num_rows, steps=1 + steps, history=PREFIX_LENGTH + 1 + steps
        )
        return part

    @property
    def state(self) -> list[Tensor]:
        """The tensors that ``advance_on_device`` both reads and writes."""
        written = {"limits", *_HYPOTHESES}
        return [tensor for name, tensor in self._rows.items() if name not in written]

    def read(self, rows: Sequence[int]) -> PendingAnswers:
        """The best finished hypothesis of each of these rows; later steps do not change it."""
        chosen = row_index(rows, self.tokens.device)
        # No answer has more entries than its row has tokens.
        steps = max((self._count_of[row] for row in rows), default=0)
        best = [self._rows[name][chosen, 0] for name in ("finished_scores", "finished")]
        said = [self._rows[name][chosen, :steps] for name in _HYPOTHESES]
        return PendingAnswers(
            [*best, *said],
            [self._limit_of[row] for row in rows],
            has_location_probs=self._location_probability is not None,
        )

    @property
    def _capacity(self) -> int:
        """Steps there is room for."""
        return self._rows["said_tokens"].shape[1]

    def _length_norms(self, capacity: int, device: torch.device) -> Tensor:
        """What a score is divided by, for every count of tokens; as exact as the reference's."""
        penalty = self._settings.length_penalty
        norms = [max(count, 1) ** penalty for count in range(capacity + 2)]
        return to_device(norms, torch.float32, device)

    def _steps(self) -> Tensor:
        """The number [B] of each row's step in hand; rows that nobody waits for may be beyond."""
        return (self._rows["counts"] - PREFIX_LENGTH).clamp(max=self._capacity - 1)

    def _length(self) -> int:
        """The length of the longest history before the step in hand, or what there is room for."""
        if self._is_static:
            return PREFIX_LENGTH + self._capacity
        return min(max(self._count_of), 1 + self._capacity)

    def _lengths(self, rows: int) -> Tensor | None:
        """The length [B * R] of every history before the step in hand; None if all are equal."""
        if not self._is_static and len(set(self._count_of)) == 1:
            return None
        return (self._rows["counts"] + 1).repeat_interleave(rows)

    def _norm(self, counts: Tensor) -> Tensor:
        return self._norms[counts.clamp(max=len(self._norms) - 1)].unsqueeze(1)

    def _select(self, values: Tensor, ids: Tensor) -> None:
        """Choose the next beams from each row's candidates: log-probs and ids, both [B, R, K]."""
        state = self._rows
        batch, rows, count = ids.shape
        ending, cut = None, None
        if self._is_static or self._limit_is_reached():
            ending = (state["limits"] == state["counts"]).view(batch, 1)
            cut = ending & (ids[..., 0] != EOS_ID)
            values, ids = _force_eos(values, ids, ending)
        totals = (values + state["scores"][:, :rows].unsqueeze(2)).view(batch, -1)
        top, places = torch.topk(totals, count)
        beams = places // count
        tokens = ids.view(batch, -1).gather(1, places)
        ended = tokens == EOS_ID
        if ending is not None:
            ended = ended | ending
        self._finish(top, ended, beams, cut)

        scores, kept = torch.topk(torch.where(ended, top + _OUT, top), self._beams)
        state["scores"].copy_(scores)
        state["tokens"].copy_(tokens.gather(1, kept))
        state["parents"].copy_(beams.gather(1, kept))
        if "history" in state:
            lines = state["history"][:, :, : self._length()]
            lines.copy_(lines.gather(1, state["parents"].unsqueeze(2).expand(lines.shape)))
            place = (self._steps() + PREFIX_LENGTH).view(-1, 1, 1).expand(-1, self._beams, 1)
            state["history"].scatter_(2, place, state["tokens"].unsqueeze(2))
        self._close(ending)

    def _limit_is_reached(self) -> bool:
        """Whether the step in hand is the last that some row may make."""
        known = zip(self._limit_of, self._count_of, strict=True)
        return any(limit == count for limit, count in known)

    def _finish(self, top: Tensor, ended: Tensor, beams: Tensor, cut: Tensor | None) -> None:
        """Let candidates that ended into the finished ones: all arguments [B, K], best first.

        Only the first half may enter, and nothing may once the item is closed; ``cut`` [B, R] is
        set where the token limit ended a row that would have gone on.
        """
        state, width = self._rows, self._beams
        enters = ended[:, :width] & state["is_open"].unsqueeze(1)
        scores = top[:, :width] / self._norm(state["counts"])
        packed = (beams[:, :width] + self._steps().unsqueeze(1) * width) * 2
        if cut is not None:
            packed = packed + cut.gather(1, beams[:, :width])
        merged = torch.cat((state["finished_scores"], torch.where(enters, scores, _OUT)), dim=1)
        packed = torch.cat((state["finished"], torch.where(enters, packed, -1)), dim=1)
        best, places = torch.topk(merged, width)
        state["finished_scores"].copy_(best)
        state["finished"].copy_(packed.gather(1, places))

    def _close(self, ending: Tensor | None) -> None:
        """Close the items whose result is settled; a closed item stays closed.

        An item with a free place among its finished ones is never settled. With early stopping
        or a single beam a full item is; otherwise once its best running beam can no longer beat
        the worst finished one, by the reference's estimate of the length it may still reach.
        """
        settings, state = self._settings, self._rows
        settled = (state["finished"] >= 0).all(dim=1)
        if settings.early_stopping is not True and self._beams > 1:
            reachable = state["counts"]
            if settings.early_stopping == "never" and settings.length_penalty > 0:
                reachable = state["limits"]
            best = state["scores"][:, 0] / self._norm(reachable).squeeze(1)
            settled = settled & (best <= state["finished_scores"].amin(dim=1))
        if ending is not None:
            settled = settled | ending.view(-1)
        state["is_open"] &= ~settled


def _force_eos(values: Tensor, ids: Tensor, ending: Tensor) -> tuple[Tensor, Tensor]:
    """Leave only ``</s>``, at log-probability 0, to the items in ``ending`` [B, 1]."""
    here = ending.unsqueeze(2)
    first = torch.arange(ids.shape[2], device=ids.device) == 0
    forced = torch.where(first, 0.0, NEVER)
    return torch.where(here, forced, values), torch.where(here, EOS_ID, ids)

"""The bookkeeping of beam search: which hypotheses go on, which are finished, when to stop.

It knows nothing of the network: ``BeamSearch.advance`` takes the logits of one step and leaves
the next tokens and the beams they continue. The rules are those of transformers 5.23,
``GenerationMixin._beam_search``, stated per item instead of per batch, so that an item can leave
the batch as soon as its own result is settled. Shapes: B items, R rows per item (1 for the first
step, then the number of beams), V vocabulary, K = 2 * beams candidates.

One beam is the reference's greedy search: the best candidate is always taken, and the first
``</s>`` ends the item.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from florence2.bans import NEVER, ban_bos, ban_repeated_ngrams, top_candidates
from florence2.errors import FlorenceError
from florence2.nearby import Nearby
from florence2.records import Answer, GenerationSettings
from florence2.tokens import BOS_ID, DECODER_START_ID, EOS_ID

PREFIX: Final = (DECODER_START_ID, BOS_ID)

_OUT: Final = -1.0e9


class NotFiniteError(FlorenceError):
    """The network gave no finite numbers for one prompt, so there is no answer to it."""

    code = "not_finite"
    token_ids: tuple[int, ...] = ()  # as an Answer of nothing


class BeamSearch:
    """The state of a beam search over one batch, after the fixed prefix ``</s><s>``.

    The forced ``<s>`` scores 0 and counts as a generated token, as in the reference, and so does
    the closing ``</s>``. ``tokens`` and ``parents`` [B, beams] are what ``advance`` decided;
    ``is_open`` [B] tells which items can still change.

    Hypotheses are stored as back-pointers, one entry per step and beam; a finished one is the
    number of its step and of the beam that ended, so finishing copies nothing.
    """

    def __init__(
        self,
        limits: Sequence[int],
        settings: GenerationSettings,
        device: torch.device,
        nearby: Nearby | None = None,
    ) -> None:
        batch, beams = len(limits), settings.num_beams
        self._settings = settings
        self._nearby = nearby
        self._beams = beams
        self._limits = list(limits)
        self._limits_tensor = torch.tensor(self._limits, device=device)
        self._generated = 1
        self._steps = 0
        capacity = max(1, max(limits) - 1)
        self._tokens = torch.empty((capacity, batch, beams), dtype=torch.long, device=device)
        self._parents = torch.empty_like(self._tokens)
        # For every token its own log-probability, and that of it and its neighbours.
        self._log_probs = torch.empty((capacity, batch, beams, 2), device=device)
        self._history = torch.tensor(PREFIX, device=device).repeat(batch, 1)
        self._scores = torch.zeros((batch, 1), device=device)
        self._finished_scores = torch.full((batch, beams), _OUT, device=device)
        self._finished = torch.full((batch, beams), -1, dtype=torch.long, device=device)
        self.tokens = torch.full((batch, 1), BOS_ID, dtype=torch.long, device=device)
        self.parents = torch.zeros((batch, 1), dtype=torch.long, device=device)
        self.is_open = self._limits_tensor > 1

    def reached_limit(self, row: int) -> bool:
        """Whether this row has all the tokens it may have; known without asking the device."""
        return self._limits[row] <= self._generated

    def advance(self, logits: Tensor) -> None:
        """Take one step: ``logits`` [B, R, V] of any float type, for the tokens chosen last."""
        batch, rows, _ = logits.shape
        log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32).flatten(0, 1)
        if self._settings.no_repeat_ngram_size:
            ban_repeated_ngrams(log_probs, self._history, self._settings.no_repeat_ngram_size)
        else:
            ban_bos(log_probs)
        values, ids = top_candidates(log_probs, 2 * self._beams)
        self._generated += 1
        own = self._select(values.view(batch, rows, -1), ids.view(batch, rows, -1))
        near = own
        if self._nearby is not None:
            near = self._nearby.log_probs(
                log_probs.view(batch, rows, -1), self.parents, self.tokens, own
            )
        self._log_probs[self._steps] = torch.stack((own, near), dim=-1)
        self._steps += 1

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only: ``rows`` [B'] of row numbers."""
        self._limits = [self._limits[row] for row in rows.tolist()]
        self._limits_tensor = self._limits_tensor[rows]
        self._tokens = self._tokens[:, rows]
        self._parents = self._parents[:, rows]
        self._log_probs = self._log_probs[:, rows]
        if self._settings.no_repeat_ngram_size:
            grouped = self._history.view(len(self.tokens), self._beams, -1)
            self._history = grouped[rows].flatten(0, 1)
        self._scores = self._scores[rows]
        self._finished_scores = self._finished_scores[rows]
        self._finished = self._finished[rows]
        self.tokens = self.tokens[rows]
        self.parents = self.parents[rows]
        self.is_open = self.is_open[rows]

    def answers(self, rows: Sequence[int]) -> list[Answer | NotFiniteError]:
        """The best finished hypothesis of each of these rows, or why a row has none."""
        chosen = torch.tensor(rows, dtype=torch.long, device=self._tokens.device)
        tokens = self._tokens[: self._steps, chosen].cpu().unbind(1)
        parents = self._parents[: self._steps, chosen].cpu().unbind(1)
        log_probs = self._log_probs[: self._steps, chosen].cpu().unbind(1)
        scores = self._finished_scores[chosen, 0].tolist()
        finished = self._finished[chosen, 0].tolist()
        answers: list[Answer | NotFiniteError] = []
        for place, row in enumerate(rows):
            if self._limits[row] == 1:
                answers.append(Answer((), (), 0.0, truncated=True))
                continue
            if finished[place] < 0 or not math.isfinite(scores[place]):
                answers.append(
                    NotFiniteError(
                        "The network must return finite numbers, and it did not for this image "
                        "and prompt; use precision fp32, or another image."
                    )
                )
                continue
            step, beam, truncated = self._unpack(finished[place])
            ids, logs = _trace(tokens[place], parents[place], log_probs[place], step, beam)
            first = next((at for at, token in enumerate(ids) if token != BOS_ID), len(ids))
            own, near = zip(*logs[first:], strict=True) if logs[first:] else ((), ())
            if self._nearby is None:
                near = ()
            answers.append(Answer(tuple(ids[first:]), own, scores[place], truncated, near))
        return answers

    def _select(self, values: Tensor, ids: Tensor) -> Tensor:
        """Choose the next beams from each row's candidates: log-probs and ids, both [B, R, K].

        Gives the log-probabilities [B, beams] of the tokens chosen.
        """
        batch, rows, count = ids.shape
        ending, cut = None, None
        if self._generated in self._limits:
            ending = (self._limits_tensor == self._generated).view(batch, 1)
            cut = ending & (ids[..., 0] != EOS_ID)
            values, ids = _force_eos(values, ids, ending)
        totals = (values + self._scores.unsqueeze(2)).view(batch, -1)
        top, places = torch.topk(totals, count)
        beams = places // count
        tokens = ids.view(batch, -1).gather(1, places)
        ended = tokens == EOS_ID
        if ending is not None:
            ended = ended | ending
        self._finish(top, ended, beams, cut)

        running = torch.where(ended, top + _OUT, top)
        self._scores, kept = torch.topk(running, self._beams)
        self.tokens = tokens.gather(1, kept)
        self.parents = beams.gather(1, kept)
        self._tokens[self._steps] = self.tokens
        self._parents[self._steps] = self.parents
        self._remember(rows)
        self._close(ending)
        return values.view(batch, -1).gather(1, places.gather(1, kept))

    def _finish(self, top: Tensor, ended: Tensor, beams: Tensor, cut: Tensor | None) -> None:
        """Let candidates that ended into the finished ones: all arguments [B, K], best first.

        Only the first half may enter, and nothing may once the item is closed; ``cut`` [B, R] is
        set where the token limit ended a row that would have gone on.
        """
        width = self._beams
        enters = ended[:, :width] & self.is_open.unsqueeze(1)
        scores = top[:, :width] / self._generated**self._settings.length_penalty
        packed = (beams[:, :width] + self._steps * width) * 2
        if cut is not None:
            packed = packed + cut.gather(1, beams[:, :width])
        scores = torch.where(enters, scores, _OUT)
        packed = torch.where(enters, packed, -1)
        merged = torch.cat((self._finished_scores, scores), dim=1)
        self._finished_scores, places = torch.topk(merged, width)
        self._finished = torch.cat((self._finished, packed), dim=1).gather(1, places)

    def _unpack(self, packed: int) -> tuple[int, int, bool]:
        """Step, beam and whether it was cut, of a finished hypothesis."""
        step, beam = divmod(packed // 2, self._beams)
        return step, beam, bool(packed % 2)

    def _remember(self, rows: int) -> None:
        """Bring the n-gram history [B * R, length] up to the beams just chosen."""
        if not self._settings.no_repeat_ngram_size:
            return
        offsets = torch.arange(len(self.parents), device=self.parents.device).unsqueeze(1) * rows
        kept = self._history.index_select(0, (self.parents + offsets).view(-1))
        self._history = torch.cat((kept, self.tokens.view(-1, 1)), dim=1)

    def _close(self, ending: Tensor | None) -> None:
        """Close the items whose result is settled; a closed item stays closed.

        An item with a free place among its finished ones is never settled. With early stopping
        or a single beam a full item is; otherwise once its best running beam can no longer beat
        the worst finished one, by the reference's estimate of the length it may still reach.
        """
        settings = self._settings
        full = (self._finished >= 0).all(dim=1)
        if settings.early_stopping is True or self._beams == 1:
            settled = full
        else:
            reachable: int | Tensor = self._generated
            if settings.early_stopping == "never" and settings.length_penalty > 0:
                reachable = self._limits_tensor
            best = self._scores[:, 0] / reachable**settings.length_penalty
            settled = full & (best <= self._finished_scores.amin(dim=1))
        if ending is not None:
            settled = settled | ending.view(-1)
        self.is_open = self.is_open & ~settled


def _force_eos(values: Tensor, ids: Tensor, ending: Tensor) -> tuple[Tensor, Tensor]:
    """Leave only ``</s>``, at log-probability 0, to the items in ``ending`` [B, 1]."""
    here = ending.unsqueeze(2)
    first = torch.arange(ids.shape[2], device=ids.device) == 0
    forced = torch.where(first, 0.0, NEVER)
    return torch.where(here, forced, values), torch.where(here, EOS_ID, ids)


def _trace(
    tokens: Tensor, parents: Tensor, log_probs: Tensor, step: int, beam: int
) -> tuple[list[int], list[list[float]]]:
    """Token ids and pairs of log-probs of one hypothesis, from back-pointers of one item."""
    token_rows: list[list[int]] = tokens[:step].tolist()
    parent_rows: list[list[int]] = parents[:step].tolist()
    log_prob_rows: list[list[list[float]]] = log_probs[:step].tolist()
    ids: list[int] = []
    logs: list[list[float]] = []
    for at in range(step - 1, -1, -1):
        ids.append(token_rows[at][beam])
        logs.append(log_prob_rows[at][beam])
        beam = parent_rows[at][beam]
    return ids[::-1], logs[::-1]

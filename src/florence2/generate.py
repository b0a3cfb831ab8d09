"""The one decode loop: greedy and beam search over any decoder session.

Same tokens as ``generate()`` of transformers 5.23 in float32, with the settings published with
Florence-2: the first token is forced to ``<s>``, the last one at the token limit to ``</s>``, and
bans act after the softmax. Beyond the reference it returns a log-probability for every token,
lets each prompt of a batch have its own token limit, and drops a prompt's rows once its own
result is settled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from florence2.beams import PREFIX, BeamSearch
from florence2.errors import FlorenceError
from florence2.generation_rules import check_batch, check_vocabulary
from florence2.nearby import Nearby
from florence2.records import Answer, GenerationSettings
from florence2.stopping import Watch

COMPACT_AT: Final = 0.75
"""Rows are dropped once at most this share of them is live.

The rows copied over a whole batch then stay below four times its size.
"""


class Session(Protocol):
    """What the loop needs of a network that holds the encoded prompts of B items.

    Logits may be of any float type and on any device; the loop only reads them, and is done with
    them when it calls the session again, so a session may reuse their memory.
    """

    def prefill(self, prefix_ids: list[int]) -> Tensor:
        """Decode the same prefix for every item: logits [B, V] after its last token."""

    def step(self, token_ids: Tensor) -> Tensor:
        """Append one token to every beam: ids [B, beams] to logits [B, beams, V]."""

    def reorder(self, beam_indices: Tensor) -> None:
        """New beam j of item i continues its old beam ``beam_indices[i, j]`` ([B, beams]).

        Called before every step; all zeros before the first, when an item has one row only.
        """

    def keep(self, item_indices: Tensor) -> None:
        """Go on with these items only, in this order ([B']); may come before the first step."""


def generate(
    session: Session,
    num_items: int,
    settings: GenerationSettings | Sequence[GenerationSettings],
    max_new_tokens: Sequence[int],
    *,
    before_pass: Watch | None = None,
    nearby: Nearby | None = None,
) -> list[Answer | FlorenceError]:
    """Answer every item of the session, in order.

    An item for which the network gives NaN or infinity is a NotFiniteError, which is returned in
    its place: the other items of the batch have their answers.

    ``before_pass`` is called before every pass of the network and may name items to give up: each
    has the error named for it in its place, and the others' answers stay what they are. Once
    every item is settled or given up there is no further pass. Whatever ``before_pass`` raises
    comes through.

    ``max_new_tokens`` has one limit per item, counted as in the reference: the forced ``<s>`` and
    the closing ``</s>`` are among them. It stands for ``settings.max_new_tokens``, which is not
    looked at; all other settings must be the same for the whole batch.

    An item's answer does not depend on what else is in the batch, up to the rounding of the
    network. ``beam_score`` is the reference's ``sequences_scores``: the sum of log-probabilities
    after bans, forced tokens counting 0, over the number of generated tokens to the power of
    ``length_penalty``; for one beam, where the reference has none, the same formula.
    ``truncated`` is set if the limit forced the answer's ``</s>`` although the search itself,
    bans included, ranked another token first for that beam. A limit of 1 leaves room for no
    token at all, which counts as truncated. ``nearby`` asks for ``Answer.near_log_probs``.
    """
    shared = check_batch(num_items, settings, max_new_tokens)
    if num_items == 0:
        return []
    with torch.inference_mode():
        return _Loop(session, shared, max_new_tokens, before_pass, nearby).run()


class _Loop:
    """One run over one batch; ``_items`` says which item each row of the batch belongs to."""

    def __init__(
        self,
        session: Session,
        settings: GenerationSettings,
        limits: Sequence[int],
        before_pass: Watch | None,
        nearby: Nearby | None,
    ) -> None:
        self._session = session
        self._nearby = nearby
        self._settings = settings
        self._limits = list(limits)
        self._before_pass = before_pass
        self._items = list(range(len(limits)))
        self._done: set[int] = set()
        self._answers: dict[int, Answer | FlorenceError] = {}

    def run(self) -> list[Answer | FlorenceError]:
        if self._rows_to_go_on():
            self._search()
        return [self._answers[item] for item in range(len(self._limits))]

    def _search(self) -> None:
        logits = self._session.prefill(list(PREFIX)).unsqueeze(1)
        check_vocabulary(logits.shape[-1], self._settings.num_beams)
        search = BeamSearch(self._limits, self._settings, logits.device, self._nearby)
        flags = _OpenFlags(lag=0 if logits.device.type == "cpu" else 1)
        while True:
            search.advance(logits)
            self._done.update(flags.closed(self._items, search.is_open))
            self._done.update(
                item for row, item in enumerate(self._items) if search.reached_limit(row)
            )
            live = self._rows_to_go_on()
            if not live:
                break
            if len(live) <= COMPACT_AT * len(self._items):
                self._compact(search, live)
            self._session.reorder(search.parents)
            logits = self._session.step(search.tokens)
        self._collect(search, range(len(self._items)))

    def _rows_to_go_on(self) -> list[int]:
        """The rows that need another pass, once ``before_pass`` has had its say about it."""
        live = self._live_rows()
        if not live or self._before_pass is None:
            return live
        for item, reason in self._before_pass().items():
            if item not in self._done:
                self._answers[item] = reason
                self._done.add(item)
        return self._live_rows()

    def _live_rows(self) -> list[int]:
        return [row for row, item in enumerate(self._items) if item not in self._done]

    def _compact(self, search: BeamSearch, live: list[int]) -> None:
        """Take the answers of the other rows and drop these rows everywhere."""
        staying = set(live)
        self._collect(search, [row for row in range(len(self._items)) if row not in staying])
        kept = torch.tensor(live, device=search.tokens.device)
        self._session.keep(kept)
        search.keep(kept)
        self._items = [self._items[row] for row in live]

    def _collect(self, search: BeamSearch, rows: Sequence[int]) -> None:
        for row, answer in zip(rows, search.answers(list(rows)), strict=True):
            # What was given up keeps its reason.
            self._answers.setdefault(self._items[row], answer)


class _OpenFlags:
    """Brings "is this item settled" to the host, ``lag`` steps late.

    On an accelerator reading it at once would leave the device idle while the host prepares the
    next step. Late news cost at most ``lag`` useless steps and change nothing: a closed item
    takes no further hypotheses, and token limits are known to the host without asking.
    """

    def __init__(self, lag: int) -> None:
        self._lag = lag
        self._waiting: deque[tuple[list[int], Tensor, torch.cuda.Event | None]] = deque()

    def closed(self, items: list[int], is_open: Tensor) -> list[int]:
        """Hand in the flags of this step, get the items that were settled ``lag`` steps ago."""
        event: torch.cuda.Event | None = None
        if is_open.device.type == "cuda":
            host = torch.empty(is_open.shape, dtype=torch.bool, pin_memory=True)
            host.copy_(is_open, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(is_open.device))
        else:
            host = is_open
        self._waiting.append((items, host, event))
        if len(self._waiting) <= self._lag:
            return []
        earlier, flags, copied = self._waiting.popleft()
        if copied is not None:
            copied.synchronize()
        return [item for item, still in zip(earlier, flags.tolist(), strict=True) if not still]

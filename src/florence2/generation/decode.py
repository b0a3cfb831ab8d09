"""The one decode loop: items come and go while the rows of a batch are searched.

What a batch of one asks for and what a busy server asks for are the same loop: it takes items from
a source, and gives a row whose answer is settled to the next. That changes no answer, because the
rules of the search are stated per item (``florence2.generation.beam_search``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from florence2.errors import FlorenceError
from florence2.generation.beam_search import (
    BeamSearch,
    HostCopy,
    LocationProbability,
    PendingAnswers,
)
from florence2.records import Answer, GenerationSettings, check_vocabulary


class Session(Protocol):
    """What the loop needs of a network that holds the encoded prompts of B items.

    Logits may be of any float type and on any device; the loop only reads them, and is done with
    them when it calls the session again, so a session may reuse their memory.
    """

    def prefill(self) -> Tensor:
        """Decode ``ANSWER_PREFIX`` for every item: logits [B, V] after its last token."""

    def step(self, token_ids: Tensor) -> Tensor:
        """Append one token to every beam: ids [B, beams] to logits [B, beams, V]."""

    def reorder(self, beam_indices: Tensor) -> None:
        """New beam j of item i continues its old beam ``beam_indices[i, j]`` ([B, beams]).

        Called before every step; all zeros before an item's first, when it has one row only.
        """

    def keep(self, items: list[int]) -> None:
        """Go on with these items only, in this order; an item may be named twice."""

    def put(self, items: list[int], other: Self) -> None:
        """Give the places of these items to those of ``other``, a session of the same kind."""


class DecodeBatch:
    """The rows that are searched together: a session of the network and a search over it.

    All have the same ``settings``, of which ``max_new_tokens`` is not looked at: every row has its
    own limit. This one has as many rows as there are items and runs every operation as it comes;
    a runtime may have one that does better.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        location_probability: LocationProbability | None = None,
    ) -> None:
        """``location_probability`` asks for ``Answer.near_log_probs``."""
        self.settings = settings
        self.location_probability = location_probability
        self._joined: tuple[Session, BeamSearch] | None = None
        self._num_rows = 0

    @property
    def search(self) -> BeamSearch:
        """The search of all rows; RuntimeError before something has joined."""
        return self._session_and_search()[1]

    def join(self, session: Session, search: BeamSearch, free: list[int]) -> list[int]:
        """Takes items in that have made their first step; gives their row numbers.

        ``free`` are the rows that nobody needs any longer; more are made where they are too few.
        """
        count = len(search.tokens)
        if self._joined is None:
            self._joined, self._num_rows = (session, search), count
            return list(range(count))
        missing = max(0, count - len(free))
        rows = list(range(self._num_rows))
        if missing:
            # Any row will do in the new places: they are overwritten at once.
            self.keep(rows + [0] * missing)
        places = (free + list(range(len(rows), self._num_rows)))[:count]
        mine, found = self._joined
        mine.put(places, session)
        found.put(places, search)
        return places

    def advance(self) -> None:
        """One pass over all rows."""
        session, search = self._session_and_search()
        session.reorder(search.parents)
        search.advance(session.step(search.tokens))

    def keep(self, rows: list[int]) -> None:
        """Drops the other rows; the kept ones have the numbers 0, 1, ... afterwards."""
        session, search = self._session_and_search()
        session.keep(rows)
        search.keep(rows)
        self._num_rows = len(rows)

    def clear(self) -> None:
        """Drops all rows."""
        self._joined, self._num_rows = None, 0

    def close(self) -> None:
        """Called once a run of the loop has ended, however it did."""
        self.clear()

    def _session_and_search(self) -> tuple[Session, BeamSearch]:
        if self._joined is None:
            raise RuntimeError("Nothing has joined yet.")
        return self._joined


COMPACT_AT: Final = 0.75
"""Rows are dropped once at most this share of them is live.

The rows copied over a whole batch then stay below four times its size.
"""

Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True, slots=True)
class EncodedItems(Generic[Item]):
    """Items whose prompts are encoded: a session that holds them, in order, before its prefill.

    ``max_new_tokens`` has one limit per item, counted as in the reference: the forced ``<s>`` and
    the closing ``</s>`` are among them.
    """

    items: Sequence[Item]
    session: Session
    max_new_tokens: Sequence[int]


class Source(Protocol[Item]):
    """Where the loop takes items from, and where their answers go."""

    def given_up(self) -> Mapping[Item, FlorenceError]:
        """The items not settled yet that nobody waits for any longer, and why.

        Asked before every pass. May name items that have not been started.
        """

    def start(self, room: int) -> EncodedItems[Item] | None:
        """Up to ``room`` more items; None when there are none now."""

    def settle(self, item: Item, answer: Answer | FlorenceError) -> None:
        """Takes an item's answer, or why it has none. Called once for every item."""


class DecodeLoop(Generic[Item]):
    """Searches until the source has no more items and every item is settled.

    At most ``max_rows`` are searched at a time; while others are, new ones wait until
    ``least_room`` of the rows are free, so that a device which likes large batches encodes several
    at once. An item's answer does not depend on what else is in the batch, up to the rounding of
    the network; one for which the network gives NaN or infinity is a NotFiniteError.

    ``flags_lag`` is how many passes late the host learns that an item is settled, by default 1 on
    an accelerator: reading it at once would leave the device idle while the host prepares the next
    step. Late news cost at most so many useless steps and change nothing: a closed item takes no
    further hypotheses, and token limits are known to the host without asking.
    """

    def __init__(
        self,
        source: Source[Item],
        batch: DecodeBatch,
        *,
        max_rows: int,
        least_room: int = 1,
        flags_lag: int | None = None,
    ) -> None:
        self._source = source
        self._batch = batch
        self._max_rows = max_rows
        self._least_room = least_room
        self._flags_lag = flags_lag
        # Whose each row is; a run may last for days, so what is settled is nowhere remembered.
        self._items: list[Item | None] = []
        # Which items are open, with whose each row was, on the way to the host.
        self._flags: deque[tuple[list[Item | None], HostCopy]] = deque()
        # Answers on their way to the host, and which of them nobody waits for any longer.
        self._arriving: deque[tuple[list[Item], PendingAnswers]] = deque()
        self._gone: set[Item] = set()

    @torch.inference_mode()
    def run(self) -> None:
        """Returns once everything is settled. What the source raises comes through."""
        try:
            while self._admit() or self._advance():
                pass
        finally:
            self._batch.close()

    def _advance(self) -> bool:
        """One pass; False once nobody waits for one."""
        live = self._live_rows()
        if not live:
            return False
        if len(live) <= COMPACT_AT * len(self._items):
            self._batch.keep(live)
            self._items = [self._items[row] for row in live]
        self._batch.advance()
        # While the device is busy with the next pass.
        self._hand_out()
        self._notice()
        return True

    def _give_up(self) -> None:
        given_up = self._source.given_up()
        if not given_up:
            return
        for row, item in enumerate(self._items):
            if item is not None and item in given_up:
                self._items[row] = None
        for item, reason in given_up.items():
            self._source.settle(item, reason)
        if self._arriving:
            self._gone.update(given_up)

    def _admit(self) -> bool:
        """Takes new items in as far as there is room; whether some of them came."""
        self._give_up()
        live = self._live_rows()
        room = self._max_rows - len(live)
        if room < 1 or (live and room < self._least_room):
            return False
        if not live:
            # What nobody needs any longer must not take the memory of what comes.
            self._batch.clear()
            self._items = []
            self._hand_out()
        started = self._source.start(room)
        # While the device is busy with the new prompts.
        self._hand_out()
        if started is None:
            return False
        batch = self._batch
        logits = started.session.prefill().unsqueeze(1)
        check_vocabulary(logits.shape[-1], batch.settings.num_beams)
        search = BeamSearch(
            started.max_new_tokens, batch.settings, logits.device, batch.location_probability
        )
        search.advance(logits)
        free = [row for row, item in enumerate(self._items) if item is None]
        places = batch.join(started.session, search, free)
        self._items += [None] * (max(places) + 1 - len(self._items))
        for place, item in zip(places, started.items, strict=True):
            self._items[place] = item
        self._notice()
        return True

    def _notice(self) -> None:
        """Learns which items are settled, and hands their answers out."""
        search = self._batch.search
        is_open = search.is_open
        if self._flags_lag is None:
            self._flags_lag = 0 if is_open.device.type == "cpu" else 1
        self._flags.append((list(self._items), HostCopy([is_open])))
        closed: set[Item | None] = set()
        if len(self._flags) > self._flags_lag:
            items, flags = self._flags.popleft()
            stay_open = flags.wait()[0].tolist()
            closed = {item for item, still in zip(items, stay_open, strict=False) if not still}
        ready = [
            (row, item)
            for row, item in enumerate(self._items)
            if item is not None and (item in closed or search.reached_limit(row))
        ]
        if ready:
            answers = search.read([row for row, _ in ready])
            self._arriving.append(([item for _, item in ready], answers))
        for row, _ in ready:
            self._items[row] = None
        if not self._flags_lag or not self._live_rows():
            self._hand_out()

    def _hand_out(self) -> None:
        """Settles what has been read."""
        while self._arriving:
            items, answers = self._arriving.popleft()
            for item, answer in zip(items, answers.wait(), strict=True):
                if item not in self._gone:
                    self._source.settle(item, answer)
        self._gone.clear()

    def _live_rows(self) -> list[int]:
        return [row for row, item in enumerate(self._items) if item is not None]


class _OneSession:
    """A source of the items of one session, which are all there from the start."""

    def __init__(self, session: Session, max_new_tokens: Sequence[int]) -> None:
        numbers = range(len(max_new_tokens))
        self._left: EncodedItems[int] | None = EncodedItems(numbers, session, max_new_tokens)
        self.answers: dict[int, Answer | FlorenceError] = {}

    def given_up(self) -> Mapping[int, FlorenceError]:
        return {}

    def start(self, room: int) -> EncodedItems[int] | None:
        started, self._left = self._left, None
        return started

    def settle(self, item: int, answer: Answer | FlorenceError) -> None:
        self.answers[item] = answer


def generate(
    session: Session,
    batch: DecodeBatch,
    max_new_tokens: Sequence[int],
    *,
    flags_lag: int | None = None,
) -> list[Answer | FlorenceError]:
    """Answer every item of the session, in order, which have a limit each.

    ``beam_score`` is the reference's ``sequences_scores``: the sum of log-probabilities
    after bans, forced tokens counting 0, over the number of generated tokens to the power of
    ``length_penalty``; for one beam, where the reference has none, the same formula.
    ``truncated`` is set if the limit forced the answer's ``</s>`` although the search itself,
    bans included, ranked another token first for that beam. A limit of 1 leaves room for no
    token at all, which counts as truncated.
    """
    source = _OneSession(session, max_new_tokens)
    num_items = len(max_new_tokens)
    DecodeLoop(source, batch, max_rows=num_items, flags_lag=flags_lag).run()
    return [source.answers[item] for item in range(num_items)]

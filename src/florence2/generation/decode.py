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
from florence2.generation.beam_search import PREFIX, BeamSearch, HostCopies, Nearby, Readout
from florence2.generation.settings import check_batch, check_vocabulary
from florence2.records import Answer, GenerationSettings
from florence2.stopping import Watch


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

        Called before every step; all zeros before an item's first, when it has one row only.
        """

    def keep(self, items: list[int]) -> None:
        """Go on with these items only, in this order; an item may be named twice."""

    def put(self, items: list[int], other: Self) -> None:
        """Give the places of these items to those of ``other``, a session of the same kind."""


class Space(Protocol):
    """Where items are searched. ``search`` may be asked for once something has joined."""

    @property
    def search(self) -> BeamSearch:
        """The search of all rows."""

    def join(self, session: Session, search: BeamSearch, free: list[int]) -> list[int]:
        """Takes items in that have made their first step; gives their row numbers.

        ``free`` are the rows that nobody needs any longer; more are made where they are too few.
        """

    def advance(self) -> None:
        """One pass over all rows."""

    def keep(self, rows: list[int]) -> None:
        """Drops the other rows; the kept ones have the numbers 0, 1, ... afterwards."""

    def clear(self) -> None:
        """Drops all rows; also called once a run has ended, however it did."""


class PlainSpace:
    """As many rows as there are items; every operation is run as it comes."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._search: BeamSearch | None = None
        self._num_rows = 0

    @property
    def search(self) -> BeamSearch:
        """The search of all rows; RuntimeError before something has joined."""
        return self._joined()[1]

    def join(self, session: Session, search: BeamSearch, free: list[int]) -> list[int]:
        """See ``Space``."""
        count = len(search.tokens)
        if self._session is None:
            self._session, self._search, self._num_rows = session, search, count
            return list(range(count))
        missing = max(0, count - len(free))
        rows = list(range(self._num_rows))
        if missing:
            # Any row will do in the new places: they are overwritten at once.
            self.keep(rows + [0] * missing)
        places = (free + list(range(len(rows), self._num_rows)))[:count]
        mine, found = self._joined()
        mine.put(places, session)
        found.put(places, search)
        return places

    def advance(self) -> None:
        """See ``Space``."""
        session, search = self._joined()
        session.reorder(search.parents)
        search.advance(session.step(search.tokens))

    def keep(self, rows: list[int]) -> None:
        """See ``Space``."""
        session, search = self._joined()
        session.keep(rows)
        search.keep(rows)
        self._num_rows = len(rows)

    def clear(self) -> None:
        """See ``Space``."""
        self._session, self._search, self._num_rows = None, None, 0

    def _joined(self) -> tuple[Session, BeamSearch]:
        if self._session is None or self._search is None:
            raise RuntimeError("Nothing has joined yet.")
        return self._session, self._search


COMPACT_AT: Final = 0.75
"""Rows are dropped once at most this share of them is live.

The rows copied over a whole batch then stay below four times its size.
"""


Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Started(Generic[Item]):
    """Items whose prompts are encoded: a session that holds them, in order, before its prefill.

    None stands for an item that was given up meanwhile.
    ``max_new_tokens`` has one limit per item, counted as in the reference: the forced ``<s>`` and
    the closing ``</s>`` are among them.
    """

    items: Sequence[Item | None]
    session: Session
    max_new_tokens: Sequence[int]


class Source(Protocol[Item]):
    """Where the loop takes items from, and where their answers go."""

    def given_up(self) -> Mapping[Item, FlorenceError]:
        """The items not settled yet that nobody waits for any longer, and why.

        Asked before every pass. May name items that have not been started.
        """

    def start(self, room: int) -> Started[Item] | None:
        """Up to ``room`` more items; None when there are none now."""

    def settle(self, item: Item, answer: Answer | FlorenceError) -> None:
        """Takes an item's answer, or why it has none. Called once for every item."""


class DecodeLoop(Generic[Item]):
    """Searches until the source has no more items and every item is settled.

    All items have the same ``settings``, of which ``max_new_tokens`` is not looked at. At most
    ``max_rows`` are searched at a time; while others are, new ones wait until ``least_room`` of
    the rows are free, so that a device which likes large batches encodes several at once.
    """

    def __init__(
        self,
        source: Source[Item],
        settings: GenerationSettings,
        space: Space,
        *,
        max_rows: int,
        least_room: int = 1,
        nearby: Nearby | None = None,
    ) -> None:
        self._source = source
        self._settings = settings
        self._space = space
        self._max_rows = max_rows
        self._least_room = least_room
        self._nearby = nearby
        self._flags: OpenFlags[Item] | None = None
        # Whose each row is; a run may last for days, so what is settled is nowhere remembered.
        self._items: list[Item | None] = []
        # Answers on their way to the host, and which of them nobody waits for any longer.
        self._arriving: deque[tuple[list[Item], Readout]] = deque()
        self._gone: set[Item] = set()

    @torch.inference_mode()
    def run(self) -> None:
        """Returns once everything is settled. What the source raises comes through."""
        try:
            while self._admit() or self._advance():
                pass
        finally:
            self._space.clear()

    def _advance(self) -> bool:
        """One pass; False once nobody waits for one."""
        live = self._live_rows()
        if not live:
            return False
        if len(live) <= COMPACT_AT * len(self._items):
            self._space.keep(live)
            self._items = [self._items[row] for row in live]
        self._space.advance()
        # While the device is busy with the next pass.
        self._hand_out()
        self._notice()
        return True

    def _give_up(self) -> None:
        given_up = self._source.given_up()
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
            self._space.clear()
            self._items = []
            self._hand_out()
        started = self._source.start(room)
        # While the device is busy with the new prompts.
        self._hand_out()
        if started is None:
            return False
        logits = started.session.prefill(list(PREFIX)).unsqueeze(1)
        check_vocabulary(logits.shape[-1], self._settings.num_beams)
        search = BeamSearch(started.max_new_tokens, self._settings, logits.device, self._nearby)
        search.advance(logits)
        taken = set(self._live_rows())
        free = [row for row in range(len(self._items)) if row not in taken]
        places = self._space.join(started.session, search, free)
        self._items += [None] * (max(places) + 1 - len(self._items))
        for place, item in zip(places, started.items, strict=True):
            self._items[place] = item
        self._notice()
        return True

    def _notice(self) -> None:
        """Learns which items are settled, and hands their answers out."""
        search = self._space.search
        if self._flags is None:
            self._flags = OpenFlags(lag=0 if search.is_open.device.type == "cpu" else 1)
        closed = set(self._flags.closed(self._items, search.is_open))
        ready = [
            (row, item)
            for row, item in enumerate(self._items)
            if item is not None and (item in closed or search.reached_limit(row))
        ]
        if ready:
            self._arriving.append(
                ([item for _, item in ready], search.read([row for row, _ in ready]))
            )
        for row, _ in ready:
            self._items[row] = None
        if not self._flags.lag or not self._live_rows():
            self._hand_out()

    def _hand_out(self) -> None:
        """Settles what has been read."""
        while self._arriving:
            items, readout = self._arriving.popleft()
            for item, answer in zip(items, readout.answers(), strict=True):
                if item not in self._gone:
                    self._source.settle(item, answer)
        self._gone.clear()

    def _live_rows(self) -> list[int]:
        return [row for row, item in enumerate(self._items) if item is not None]


class OpenFlags(Generic[Item]):
    """Brings "is this item settled" to the host, ``lag`` steps late.

    On an accelerator reading it at once would leave the device idle while the host prepares the
    next step. Late news cost at most ``lag`` useless steps and change nothing: a closed item
    takes no further hypotheses, and token limits are known to the host without asking.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._waiting: deque[tuple[list[Item | None], HostCopies]] = deque()

    def closed(self, items: list[Item | None], is_open: Tensor) -> list[Item]:
        """Hand in the flags of this step, get the items that were settled ``lag`` steps ago."""
        self._waiting.append((list(items), HostCopies([is_open])))
        if len(self._waiting) <= self.lag:
            return []
        earlier, copies = self._waiting.popleft()
        [flags] = copies.wait()
        return [
            item
            for item, still in zip(earlier, flags.tolist(), strict=False)
            if item is not None and not still
        ]


def generate(
    session: Session,
    num_items: int,
    settings: GenerationSettings | Sequence[GenerationSettings],
    max_new_tokens: Sequence[int],
    *,
    before_pass: Watch | None = None,
    nearby: Nearby | None = None,
    space: Space | None = None,
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
    ``space`` says how passes are made, by default plainly.
    """
    shared = check_batch(num_items, settings, max_new_tokens)
    if num_items == 0:
        return []
    batch = _Batch(session, max_new_tokens, before_pass)
    DecodeLoop(batch, shared, space or PlainSpace(), max_rows=num_items, nearby=nearby).run()
    return batch.answers()


class _Batch:
    """A source of items that are all there from the start."""

    def __init__(
        self, session: Session, max_new_tokens: Sequence[int], before_pass: Watch | None
    ) -> None:
        self._session = session
        self._limits = max_new_tokens
        self._before_pass = before_pass
        self._has_started = False
        self._answers: dict[int, Answer | FlorenceError] = {}

    def given_up(self) -> Mapping[int, FlorenceError]:
        """What ``before_pass`` names, as long as there is something to wait for."""
        if self._before_pass is None or self._is_settled():
            return {}
        reasons = self._before_pass()
        return {item: why for item, why in reasons.items() if item not in self._answers}

    def start(self, room: int) -> Started[int] | None:
        """All items at once."""
        if self._has_started or self._is_settled():
            return None
        self._has_started = True
        numbers = range(len(self._limits))
        items = [None if number in self._answers else number for number in numbers]
        return Started(items, self._session, self._limits)

    def settle(self, item: int, answer: Answer | FlorenceError) -> None:
        """Notes an answer."""
        self._answers[item] = answer

    def answers(self) -> list[Answer | FlorenceError]:
        """One per item, in order."""
        return [self._answers[item] for item in range(len(self._limits))]

    def _is_settled(self) -> bool:
        return len(self._answers) == len(self._limits)

"""Requests that wait at the scheduler, and whose turn it is."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import islice
from typing import Final

from florence2.engine.answering import identity
from florence2.engine.ask import AnyImage, Ask, name_of
from florence2.errors import (
    DeadlineError,
    FlorenceError,
    GenerationCancelledError,
    InternalError,
    RequestError,
    shown,
    shown_s,
)
from florence2.records import Failure, Result

logger = logging.getLogger(__name__)


LOOK_AFTER_S: Final = 0.1
"""How often a waiting caller is asked whether it still waits."""


class Priority(IntEnum):
    """Who is answered first: someone who looks at the screen, then runs over many images."""

    INTERACTIVE = 0
    BULK = 1


class _Interest:
    """Whether anyone waits for the answers still.

    Asks that looked at their ticket itself would keep each other, and their images, alive.
    """

    __slots__ = ("reason",)

    def __init__(self) -> None:
        self.reason: FlorenceError | None = None

    def stop(self) -> FlorenceError | None:
        """Why nobody waits any longer; the ``Stop`` of every ask of a ticket."""
        return self.reason


class Ticket:
    """The asks of one request; each is answered once, and what comes later is dropped.

    ``chunks`` are the places of the asks that nobody has begun: those about one image together,
    at most ``max_batch`` in each; ``num_waiting`` counts them. The scheduler changes a ticket only
    under its own lock.
    """

    def __init__(
        self,
        asks: Sequence[Ask],
        priority: Priority,
        max_batch: int,
        deadline_s: float | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        _check_deadline(deadline_s)
        self._interest = _Interest()
        self.asks = [_watched(ask, self._interest.stop) for ask in asks]
        self.priority = priority
        self.arrived = time.monotonic()
        self.chunks = _by_image(asks, max_batch)
        self.num_waiting = len(asks)
        self._deadline = None if deadline_s is None else self.arrived + deadline_s
        self._deadline_s = deadline_s
        self._should_stop = should_stop
        self._results: list[Result | Failure | None] = [None] * len(asks)
        self._open = len(asks)
        self._is_done = threading.Event()
        if not asks:
            self._is_done.set()

    @property
    def is_done(self) -> bool:
        """Whether every ask has its result."""
        return self._is_done.is_set()

    @property
    def reason(self) -> FlorenceError | None:
        """Why nobody waits any longer, if so."""
        return self._interest.reason

    def take(self, room: int) -> list[int]:
        """The places of up to ``room`` asks about one image, which are then begun."""
        chunk = self.chunks.popleft()
        if len(chunk) > room:
            self.chunks.appendleft(chunk[room:])
        taken = chunk[:room]
        self.num_waiting -= len(taken)
        return taken

    def settle(self, place: int, outcome: Result | FlorenceError) -> None:
        """Notes the answer to one ask."""
        if self._results[place] is not None:
            return
        if isinstance(outcome, FlorenceError):
            image = name_of(getattr(self.asks[place], "image", None))
            self._results[place] = Failure(outcome.code, str(outcome), image)
        else:
            self._results[place] = outcome
        self._open -= 1
        if not self._open:
            self._is_done.set()

    def give_up(self, reason: FlorenceError) -> None:
        """Settles every open ask with ``reason``; those in the batch in hand leave it."""
        self._interest.reason = reason
        self.chunks.clear()
        self.num_waiting = 0
        for place in range(len(self._results)):
            self.settle(place, reason)

    def wait(self) -> FlorenceError | None:
        """Waits until all is answered, or gives the reason why the caller waits no longer."""
        while True:
            reason = None if self.is_done else self._overdue()
            if reason is not None or self._is_done.wait(self._patience_s()):
                return reason

    def results(self) -> list[Result | Failure]:
        """All results in the order of the asks, once done."""
        return [result for result in self._results if result is not None]

    def _patience_s(self) -> float | None:
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        if left is not None:
            left = min(left, threading.TIMEOUT_MAX)
        if self._should_stop is None:
            return left
        return LOOK_AFTER_S if left is None else min(left, LOOK_AFTER_S)

    def _overdue(self) -> FlorenceError | None:
        try:
            if self._should_stop is not None and self._should_stop():
                return GenerationCancelledError(
                    "The request was cancelled; send it again if it is needed."
                )
        except Exception:
            logger.exception("Asking whether a request is still wanted failed")
            return InternalError()
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return DeadlineError(
                "The time for an answer was over before it was there: "
                f"{shown_s(max(0.0, self._deadline_s or 0.0))} from when it was asked for; allow "
                "more time or ask for less at once."
            )
        return None


def _check_deadline(deadline_s: float | None) -> None:
    if deadline_s is not None and math.isnan(deadline_s):
        raise RequestError(
            f"A deadline is a number of seconds from now, and {shown(deadline_s)} was received; "
            "leave it out to wait as long as it takes."
        )


def _watched(ask: Ask, stop: Callable[[], FlorenceError | None]) -> Ask:
    if not isinstance(ask, Ask):
        return ask
    own = ask.stop
    return replace(ask, stop=stop if own is None else lambda: stop() or own())


def _by_image(asks: Sequence[Ask], max_batch: int) -> deque[list[int]]:
    places: dict[object, list[int]] = {}
    for place, ask in enumerate(asks):
        places.setdefault(identity(getattr(ask, "image", None)), []).append(place)
    return deque(
        group[start : start + max_batch]
        for group in places.values()
        for start in range(0, len(group), max_batch)
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """One ask of a ticket."""

    ticket: Ticket
    place: int

    @property
    def ask(self) -> Ask:
        """What is asked."""
        return self.ticket.asks[self.place]


class TicketQueue:
    """Tickets of one priority. Its user holds a lock: nothing here is safe between threads."""

    def __init__(self) -> None:
        self._tickets: deque[Ticket] = deque()

    @property
    def num_asks(self) -> int:
        """Asks that wait."""
        return sum(ticket.num_waiting for ticket in self._tickets)

    def __len__(self) -> int:
        """Tickets that have an ask waiting."""
        return len(self._tickets)

    def add(self, ticket: Ticket) -> None:
        """Puts a ticket at the end of the line."""
        self._tickets.append(ticket)

    def discard(self, ticket: Ticket) -> None:
        """Takes a ticket out; one that is not there any more is fine."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)

    def pick(self, limit: int) -> list[Piece]:
        """Up to ``limit`` asks: one image of each ticket in turn, until the batch is full."""
        picked: list[Piece] = []
        while self._tickets and len(picked) < limit:
            ticket = self._tickets[0]
            room = limit - len(picked)
            is_cut = len(ticket.chunks[0]) > room
            places = ticket.take(room)
            picked += [Piece(ticket, place) for place in places]
            if not ticket.chunks:
                self._tickets.popleft()
            elif not is_cut:
                # A ticket cut by a full batch stays first: the rest of that image comes next.
                self._tickets.rotate(-1)
        return picked

    def images_ahead(self, limit: int) -> list[AnyImage]:
        """The images of the asks whose turn comes next, ``limit`` at most."""
        images = (
            ticket.asks[places[0]].image
            for ticket in self._tickets
            for places in islice(ticket.chunks, limit)
            if isinstance(ticket.asks[places[0]], Ask)
        )
        return list(islice(images, limit))

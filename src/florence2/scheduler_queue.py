"""Requests that wait, and whose turn it is: one image of each request after the other."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice

from florence2.engine.ask import AnyImage, Ask
from florence2.engine.tickets import Ticket


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

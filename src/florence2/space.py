"""The rows that are searched together: a session of the network and a search, row by row."""

from __future__ import annotations

from typing import Protocol, Self

from torch import Tensor

from florence2.generation.beam_search import BeamSearch


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

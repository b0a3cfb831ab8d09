"""The decode loop's rows in recorded buffers, which go from one run of the loop to the next."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from florence2.generation.beam_search import BeamSearch
from florence2.generation.kv_cache import DecoderSession
from florence2.nearby import Nearby
from florence2.network.florence import Florence2Network
from florence2.records import GenerationSettings
from florence2.runtimes.cuda_graphs import GraphRunner
from florence2.runtimes.decode_buffers import FIRST_STEPS, DecodeBuffers, Kind, Window
from florence2.space import Session

MAX_IDLE: Final = 16
"""Clients may ask with ever new settings, of which each has buffers of its own."""


_IDLE_PART: Final = 8
"""Buffers kept for later runs take at most this part of a GPU's memory."""


def most_idle_bytes(device: torch.device) -> int:
    """Memory that idle buffers may take on this device."""
    if device.type != "cuda":
        return 2**30
    return int(torch.cuda.mem_get_info(device)[1]) // _IDLE_PART


class DecodePool:
    """The buffers that no run of the loop uses now, kept for the next one with their recordings.

    At most ``MAX_IDLE`` of them, and ``max_idle_bytes``. A run takes buffers out and gives them
    back; another one in between takes others. Not for several threads at a time.
    """

    def __init__(self, network: Florence2Network, graphs: GraphRunner, max_idle_bytes: int) -> None:
        self._network = network
        self._graphs = graphs
        self._max_idle_bytes = max_idle_bytes
        # The least recently used come first.
        self._idle: list[tuple[Kind, DecodeBuffers]] = []

    def space(self, settings: GenerationSettings, nearby: Nearby | None) -> GraphSpace:
        """Where one run of the loop searches, with buffers of this pool."""
        return GraphSpace(self, settings, nearby)

    def take(self, kind: Kind) -> DecodeBuffers:
        """Buffers for searches of this kind, the largest there are or new ones."""
        fitting = [entry for entry in self._idle if entry[0] == kind]
        if not fitting:
            return DecodeBuffers(self._network, kind, self._graphs)
        entry = max(fitting, key=lambda found: found[1].num_bytes)
        self._idle = [other for other in self._idle if other is not entry]
        return entry[1]

    def give_back(self, kind: Kind, buffers: DecodeBuffers) -> None:
        """Keeps buffers for the next run, unless growing them failed half-way."""
        if not buffers.is_whole:
            buffers.forget()
            return
        self._idle.append((kind, buffers))
        while len(self._idle) > MAX_IDLE or self.idle_bytes > self._max_idle_bytes:
            self._idle.pop(0)[1].forget()

    def clear(self) -> None:
        """Drops what is kept, with its recordings; what a run uses stays."""
        while self._idle:
            self._idle.pop()[1].forget()

    @property
    def idle_bytes(self) -> int:
        """Memory that is kept for later runs."""
        return sum(buffers.num_bytes for _, buffers in self._idle)


class GraphSpace:
    """Where one run of the decode loop searches: see ``florence2.space.Space``.

    Row numbers are those of the buffers: kept rows are moved together at their beginning.
    """

    def __init__(
        self, pool: DecodePool, settings: GenerationSettings, nearby: Nearby | None
    ) -> None:
        """``settings.max_new_tokens`` is not looked at: every row has its own limit."""
        self._pool = pool
        self._kind = Kind(replace(settings, max_new_tokens=None), nearby)
        self._buffers: DecodeBuffers | None = None
        self._num_rows = 0

    @property
    def search(self) -> BeamSearch:
        """The search of all rows; RuntimeError before something has joined."""
        return self._joined().search

    def join(self, session: Session, search: BeamSearch, free: list[int]) -> list[int]:
        """See ``Space``; ``session`` is one of our own network."""
        if not isinstance(session, DecoderSession):
            raise TypeError(f"Recorded steps are for a DecoderSession, not {type(session)}.")
        if self._buffers is None:
            self._buffers = self._pool.take(self._kind)
        buffers, count = self._buffers, len(search.tokens)
        num_rows = self._num_rows + max(0, count - len(free))
        places = (free + list(range(self._num_rows, num_rows)))[:count]
        buffers.reserve(Window(num_rows, FIRST_STEPS, session.cross_length))
        buffers.session.put(places, session)
        buffers.search.put(places, search)
        self._num_rows = num_rows
        return places

    def advance(self) -> None:
        """See ``Space``."""
        self._joined().step(self._num_rows)

    def keep(self, rows: list[int]) -> None:
        """See ``Space``; rows that have their number already are not touched."""
        buffers = self._joined()
        moved = [(place, row) for place, row in enumerate(rows) if place != row]
        if moved:
            places, chosen = [place for place, _ in moved], [row for _, row in moved]
            buffers.session.put(places, buffers.session, chosen)
            buffers.search.put(places, buffers.search, chosen)
        self._num_rows = len(rows)

    def clear(self) -> None:
        """See ``Space``; the buffers go back to the pool."""
        buffers, self._buffers, self._num_rows = self._buffers, None, 0
        if buffers is not None:
            self._pool.give_back(self._kind, buffers)

    def _joined(self) -> DecodeBuffers:
        if self._buffers is None:
            raise RuntimeError("Nothing has joined yet.")
        return self._buffers

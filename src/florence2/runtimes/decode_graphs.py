"""Decoder steps as CUDA graphs: many launches of little work each become one."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from florence2.generation.beam_search import PREFIX, BeamSearch, Nearby
from florence2.generation.decode import Session
from florence2.generation.kv_cache import DecoderSession, StaticSession
from florence2.network.florence import Florence2Network
from florence2.records import GenerationSettings
from florence2.runtimes.cuda_graphs import GraphRunner, Work

ROWS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
STEPS: Final = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
CROSS_LENGTHS: Final = 32
"""Sizes that are recorded. Prompts' lengths go by multiples: most differ by a few words only."""

FIRST_STEPS: Final = 64
"""New buffers have room for most answers."""

RECORD_AT: Final = 4
"""A window is recorded at its n-th use: recording it costs about as much as so many steps."""

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Window:
    """The first rows, steps and prompt positions of some buffers."""

    num_rows: int
    steps: int
    cross_length: int

    def rounded(self, most_steps: int) -> Window:
        """The next larger one of those that are recorded."""
        return Window(
            _next_of(ROWS, self.num_rows),
            min(_next_of(STEPS, self.steps), most_steps),
            -(-self.cross_length // CROSS_LENGTHS) * CROSS_LENGTHS,
        )

    def within(self, other: Window) -> bool:
        """Whether ``other`` is nowhere smaller."""
        return self == self.common(other)

    def common(self, other: Window) -> Window:
        """What is in both."""
        return Window(
            min(self.num_rows, other.num_rows),
            min(self.steps, other.steps),
            min(self.cross_length, other.cross_length),
        )

    def joined(self, other: Window) -> Window:
        """The smallest that both are within."""
        return Window(
            max(self.num_rows, other.num_rows),
            max(self.steps, other.steps),
            max(self.cross_length, other.cross_length),
        )


def _next_of(sizes: Sequence[int], size: int) -> int:
    """The next of ``sizes``; beyond the last, its next multiple."""
    if size > sizes[-1]:
        return -(-size // sizes[-1]) * sizes[-1]
    return sizes[bisect_left(sizes, size)]


@dataclass(frozen=True, slots=True)
class Kind:
    """What searches that may share a recording have in common."""

    settings: GenerationSettings
    nearby: Nearby | None


class DecodeBuffers:
    """A session and a search of one kind whose tensors stay where they are until they grow."""

    def __init__(self, network: Florence2Network, kind: Kind, graphs: GraphRunner) -> None:
        self._kind = kind
        self._graphs = graphs
        self._device = network.device
        self._limit = network.config.text.max_position_embeddings
        self._number = next(_numbers)
        self._size = Window(0, 0, 0)
        self._uses: Counter[Window] = Counter()
        self._works: dict[Window, tuple[Work, list[Tensor]]] = {}
        self.session = StaticSession(network, kind.settings.num_beams, len(PREFIX))
        self.search = self._new_search(1)
        self.is_whole = True

    @property
    def num_bytes(self) -> int:
        """Memory that the keys and values take; the rest is small beside them."""
        return self.session.num_bytes

    @torch.inference_mode()
    def reserve(self, needed: Window) -> None:
        """Makes room for ``needed``; steps at once twice as many, as each growth copies all."""
        needed = needed.rounded(self._limit)
        if needed.within(self._size):
            return
        before = self._size
        size = needed.joined(before)
        if before.steps < needed.steps:
            size = replace(size, steps=min(max(needed.steps, 2 * before.steps), self._limit))
        self.forget()
        # Until the end some tensors have the new size and some the old one.
        self.is_whole = False
        self.session.enlarge(size.num_rows, size.steps, size.cross_length)
        if size.num_rows > before.num_rows:
            search = self._new_search(size.num_rows)
            search.put(list(range(before.num_rows)), self.search, list(range(before.num_rows)))
            self.search = search
        self._size = size
        self.is_whole = True

    def step(self, num_rows: int) -> None:
        """One pass over the first rows."""
        live = [row for row in range(num_rows) if not self.search.reached_limit(row)]
        window = Window(num_rows, *self.session.needs(live))
        self.reserve(window)
        window = window.rounded(self._limit).common(self._size)
        self.session.count_pass()
        self.search.count_pass()
        self._uses[window] += 1
        if window not in self._works:
            self._works[window] = self._work(window)
        work, state = self._works[window]
        if self._uses[window] < RECORD_AT:
            with torch.inference_mode():
                work()
        else:
            self._graphs.run(self._key(window), work, state)

    def forget(self) -> None:
        """Gives the recordings of these buffers up."""
        self._graphs.forget([self._key(window) for window in self._uses])
        self._uses.clear()
        self._works.clear()

    def _work(self, window: Window) -> tuple[Work, list[Tensor]]:
        session = self.session.window(window.num_rows, window.steps, window.cross_length)
        search = self.search.window(window.num_rows, window.steps)

        def work() -> None:
            session.reorder(search.parents)
            search.advance_on_device(session.step_on_device(search.tokens))

        return work, [*session.state, *search.state]

    def _key(self, window: Window) -> Hashable:
        return ("decode", self._number, window)

    def _new_search(self, num_rows: int) -> BeamSearch:
        limits = [self._limit] * num_rows
        kind = self._kind
        return BeamSearch(limits, kind.settings, self._device, kind.nearby, is_static=True)


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
    """Where one run of the decode loop searches: see ``florence2.generation.decode.Space``.

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

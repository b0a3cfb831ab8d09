"""Decoder steps as CUDA graphs: many launches of little work each become one."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import torch
from torch import Tensor

from florence2.generation.beam_search import BeamSearch, LocationProbability
from florence2.generation.decode import DecodeBatch, Session
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
"""A bucket is recorded at its n-th use: recording it costs about as much as so many steps."""

_numbers = itertools.count()


class Bucket(NamedTuple):
    """How many rows, steps and prompt positions a recorded step has room for."""

    num_rows: int
    steps: int
    cross_length: int

    def rounded(self, most_steps: int) -> Bucket:
        """The next larger one of those that are recorded."""
        return Bucket(
            _next_of(ROWS, self.num_rows),
            min(_next_of(STEPS, self.steps), most_steps),
            -(-self.cross_length // CROSS_LENGTHS) * CROSS_LENGTHS,
        )

    def common(self, other: Bucket) -> Bucket:
        """What is in both."""
        return Bucket(*map(min, self, other))

    def joined(self, other: Bucket) -> Bucket:
        """The smallest that has room for both."""
        return Bucket(*map(max, self, other))


def _next_of(sizes: Sequence[int], size: int) -> int:
    """The next of ``sizes``; beyond the last, its next multiple."""
    if size > sizes[-1]:
        return -(-size // sizes[-1]) * sizes[-1]
    return sizes[bisect_left(sizes, size)]


class RecordedBatch(DecodeBatch):
    """A decode batch in tensors that stay where they are until they grow; its steps are recorded.

    Row numbers are those of the buffers: kept rows are moved together at their beginning. Once a
    run of the loop is over, it goes back to its pool.
    """

    def __init__(
        self,
        pool: RecordedBatchPool,
        settings: GenerationSettings,
        location_probability: LocationProbability | None,
    ) -> None:
        super().__init__(settings, location_probability)
        network, self._graphs = pool.network, pool.graphs
        self._pool = pool
        self._device = network.device
        self._limit = network.config.text.max_position_embeddings
        self._number = next(_numbers)
        self._size = Bucket(0, 0, 0)
        self._uses: Counter[Bucket] = Counter()
        self._works: dict[Bucket, tuple[Work, list[Tensor]]] = {}
        self._session = StaticSession(network, settings.num_beams)
        self._search = self._new_search(1)
        self.is_whole = True
        """False where growing failed half-way: some tensors have the new size and some the old."""

    @property
    def num_bytes(self) -> int:
        """Memory of the session; the search is small beside it."""
        return self._session.num_bytes

    @property
    def search(self) -> BeamSearch:
        """The search of all rows; RuntimeError before something has joined."""
        self._check_joined()
        return self._search

    def join(self, session: Session, search: BeamSearch, free: list[int]) -> list[int]:
        """As in ``DecodeBatch``; ``session`` is one of our own network."""
        if not isinstance(session, DecoderSession):
            raise TypeError(f"Recorded steps are for a DecoderSession, not {type(session)}.")
        count = len(search.tokens)
        num_rows = self._num_rows + max(0, count - len(free))
        places = (free + list(range(self._num_rows, num_rows)))[:count]
        self._reserve(Bucket(num_rows, FIRST_STEPS, session.cross_length))
        self._session.put(places, session)
        self._search.put(places, search)
        self._num_rows = num_rows
        return places

    def advance(self) -> None:
        """One pass over all rows."""
        self._check_joined()
        live = [row for row in range(self._num_rows) if not self._search.reached_limit(row)]
        bucket = Bucket(self._num_rows, *self._session.needs(live))
        self._reserve(bucket)
        bucket = bucket.rounded(self._limit).common(self._size)
        self._session.count_pass()
        self._search.count_pass()
        self._uses[bucket] += 1
        if bucket not in self._works:
            self._works[bucket] = self._work(bucket)
        work, state = self._works[bucket]
        if self._uses[bucket] < RECORD_AT:
            with torch.inference_mode():
                work()
        else:
            self._graphs.run(self._key(bucket), work, state)

    def keep(self, rows: list[int]) -> None:
        """As in ``DecodeBatch``; rows that have their number already are not touched."""
        self._check_joined()
        moved = [(place, row) for place, row in enumerate(rows) if place != row]
        if moved:
            places, chosen = [place for place, _ in moved], [row for _, row in moved]
            self._session.put(places, self._session, chosen)
            self._search.put(places, self._search, chosen)
        self._num_rows = len(rows)

    def clear(self) -> None:
        """Drops all rows."""
        self._num_rows = 0

    def close(self) -> None:
        """Goes back to the pool."""
        self.clear()
        self._pool.give_back(self)

    def forget(self) -> None:
        """Gives the recordings up."""
        self._graphs.forget([self._key(bucket) for bucket in self._uses])
        self._uses.clear()
        self._works.clear()

    @torch.inference_mode()
    def _reserve(self, needed: Bucket) -> None:
        """Makes room for ``needed``; steps at once twice as many, as each growth copies all."""
        needed = needed.rounded(self._limit)
        before = self._size
        size = needed.joined(before)
        if size == before:
            return
        if before.steps < needed.steps:
            size = size._replace(steps=min(max(needed.steps, 2 * before.steps), self._limit))
        self.forget()
        self.is_whole = False
        self._session.enlarge(*size)
        if size.num_rows > before.num_rows:
            search, rows = self._new_search(size.num_rows), list(range(before.num_rows))
            search.put(rows, self._search, rows)
            self._search = search
        self._size = size
        self.is_whole = True

    def _work(self, bucket: Bucket) -> tuple[Work, list[Tensor]]:
        session = self._session.view(*bucket)
        search = self._search.view(bucket.num_rows, bucket.steps)

        def work() -> None:
            session.reorder(search.parents)
            search.advance_on_device(session.step_on_device(search.tokens))

        return work, [*session.state, *search.state]

    def _key(self, bucket: Bucket) -> Hashable:
        return ("decode", self._number, bucket)

    def _new_search(self, num_rows: int) -> BeamSearch:
        return BeamSearch(
            [self._limit] * num_rows,
            self.settings,
            self._device,
            self.location_probability,
            is_static=True,
        )

    def _check_joined(self) -> None:
        if not self._num_rows:
            raise RuntimeError("Nothing has joined yet.")


MAX_IDLE: Final = 16
"""Clients may ask with ever new settings, of which each has a batch of its own."""

_IDLE_PART: Final = 8
"""Batches kept for later runs take at most this part of a GPU's memory."""


def most_idle_bytes(device: torch.device) -> int:
    """Memory that idle batches may take on this device."""
    if device.type != "cuda":
        return 2**30
    return int(torch.cuda.mem_get_info(device)[1]) // _IDLE_PART


class RecordedBatchPool:
    """The batches that no run of the loop uses now, kept for the next one with their recordings.

    At most ``MAX_IDLE`` of them, and ``max_idle_bytes``. A run takes one out and gives it back;
    another one in between takes another. Not for several threads at a time.
    """

    def __init__(self, network: Florence2Network, graphs: GraphRunner, max_idle_bytes: int) -> None:
        self.network = network
        self.graphs = graphs
        self._max_idle_bytes = max_idle_bytes
        # The least recently used come first.
        self._idle: list[RecordedBatch] = []

    def take(
        self, settings: GenerationSettings, location_probability: LocationProbability | None
    ) -> RecordedBatch:
        """A batch of these settings, the largest there is or a new one."""
        settings = replace(settings, max_new_tokens=None)
        fitting = [
            batch
            for batch in self._idle
            if (batch.settings, batch.location_probability) == (settings, location_probability)
        ]
        if not fitting:
            return RecordedBatch(self, settings, location_probability)
        taken = max(fitting, key=lambda batch: batch.num_bytes)
        self._idle.remove(taken)
        return taken

    def give_back(self, batch: RecordedBatch) -> None:
        """Keeps a batch for the next run, unless growing it failed half-way."""
        if not batch.is_whole:
            batch.forget()
            return
        self._idle.append(batch)
        while len(self._idle) > MAX_IDLE or self.idle_bytes > self._max_idle_bytes:
            self._idle.pop(0).forget()

    def clear(self) -> None:
        """Drops what is kept, with its recordings; what a run uses stays."""
        while self._idle:
            self._idle.pop().forget()

    @property
    def idle_bytes(self) -> int:
        """Memory that is kept for later runs."""
        return sum(batch.num_bytes for batch in self._idle)

    @property
    def idle_settings(self) -> list[GenerationSettings]:
        """The settings of the batches that are kept, the least recently used first."""
        return [batch.settings for batch in self._idle]

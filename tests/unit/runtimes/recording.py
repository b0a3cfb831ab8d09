"""A pool of recorded batches for one of the tiny models."""

from __future__ import annotations

import pytest
from tiny_reference import our_network, tiny_model

from florence2.records import GenerationSettings
from florence2.runtimes import decode_graphs
from florence2.runtimes.cuda_graphs import GraphRunner
from florence2.runtimes.decode_graphs import RecordedBatch, RecordedBatchPool


def small_buckets(monkeypatch: pytest.MonkeyPatch, cross_lengths: int) -> None:
    """Sizes of which the tiny searches need many."""
    monkeypatch.setattr(decode_graphs, "STEPS", (2, 4, 8, 16, 32))
    monkeypatch.setattr(decode_graphs, "CROSS_LENGTHS", cross_lengths)
    monkeypatch.setattr(decode_graphs, "FIRST_STEPS", 2)


class Place:
    """The pool, with what records for it."""

    def __init__(self, seed: int, recorder=None, max_idle_bytes: int = 2**30, device: str = "cpu"):
        self.seed, self.recorder = seed, recorder
        self.graphs = GraphRunner(recorder)
        network = our_network(tiny_model(seed), device)
        self.pool = RecordedBatchPool(network, self.graphs, max_idle_bytes)

    def batch(self, settings: GenerationSettings) -> RecordedBatch:
        return self.pool.take(settings, None)

    def free_memory(self) -> None:
        self.graphs.clear()
        self.pool.clear()

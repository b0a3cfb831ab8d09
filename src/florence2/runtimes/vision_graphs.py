"""The vision tower through recordings: one for each of a few batch sizes, others are filled up."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from florence2.runtimes.cuda_graphs import GraphRunner

BUCKETS: Final = (1, 2, 3, 4, 6, 8, 12, 16)
"""Batch sizes that are recorded: up to a half more work for a batch in between.

Above, the device is busy for longer than the host needs to launch its work.
"""

Encode = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class _Buffers:
    """What a recording reads and writes; the output appears in the first warm-up."""

    received: Tensor
    features: Tensor | None = None


class VisionGraphs:
    """Runs the tower on batches of any size."""

    def __init__(self, graphs: GraphRunner, buckets: tuple[int, ...] = BUCKETS) -> None:
        self._graphs = graphs
        self._buckets = buckets
        self._buffers: dict[Hashable, _Buffers] = {}

    def run(self, kind: Hashable, received: Tensor, encode: Encode) -> Tensor:
        """``encode(received)``, [B, ...] on the device to features [B, N, d], a tensor of its own.

        ``kind`` stands for ``encode`` and whatever it reaches, as in ``GraphRunner.run``; each row
        of its result must depend on the same row of its input only.
        """
        count = received.shape[0]
        size = next((bucket for bucket in self._buckets if bucket >= count), None)
        if size is None or not count or not self._graphs.is_enabled:
            return encode(received)
        key = ("vision", kind, size, received.shape[1:], received.dtype)
        buffers = self._buffers.get(key)
        if buffers is None:
            buffers = _Buffers(received.new_empty(size, *received.shape[1:]))
            self._buffers[key] = buffers
        _fill(buffers.received, received)
        self._graphs.run(key, _work(buffers, encode))
        return _features_of(buffers)[:count].clone()

    def clear(self) -> None:
        """Forgets the buffers; the recordings are the runner's to forget, and first."""
        self._buffers.clear()


def _fill(buffer: Tensor, received: Tensor) -> None:
    """Copies a batch in; the rows that are left take its first image, whose numbers are sane."""
    count = received.shape[0]
    buffer[:count].copy_(received)
    buffer[count:].copy_(received[:1].expand(buffer.shape[0] - count, *received.shape[1:]))


def _work(buffers: _Buffers, encode: Encode) -> Callable[[], None]:
    def work() -> None:
        features = encode(buffers.received)
        if buffers.features is None:
            buffers.features = torch.empty_like(features)
        buffers.features.copy_(features)

    return work


def _features_of(buffers: _Buffers) -> Tensor:
    if buffers.features is None:
        raise RuntimeError("The tower was recorded without ever having been run.")
    return buffers.features

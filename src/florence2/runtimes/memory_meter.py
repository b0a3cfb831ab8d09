"""What work costs in the device's memory, measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch

COUNTS: Final = (1, 4)
"""The two batch sizes that a cost is measured at."""


class MemoryMeter(Protocol):
    """The memory of one device."""

    def free_bytes(self) -> int:
        """What could be allocated now."""

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Does ``work``: the most that was allocated meanwhile, beyond what was before."""


@dataclass(frozen=True, slots=True)
class Cost:
    """A batch of n items takes ``fixed_bytes + n * bytes_per_item``."""

    fixed_bytes: int
    bytes_per_item: int


def measure_cost(
    meter: MemoryMeter, run: Callable[[int], object], prepare: Callable[[], None]
) -> Cost:
    """The line through the peaks of ``run(n)`` at two batch sizes, each after ``prepare``."""
    few, many = COUNTS
    prepare()
    low = meter.peak_bytes(lambda: run(few))
    prepare()
    high = meter.peak_bytes(lambda: run(many))
    slope = max(0, high - low) // (many - few)
    return Cost(max(0, low - few * slope), slope)


class CudaMeter:
    """The memory of a CUDA device as torch's allocator sees it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free_bytes(self) -> int:
        """What no program holds, once torch's cached blocks are given back."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """The peak of what torch allocated, over what it held before."""
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before

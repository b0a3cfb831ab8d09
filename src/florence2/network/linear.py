"""Which form of a product is the faster one on this CPU for the few rows of a decoder step."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from florence2.network.bart import TransposedCounts, WeightKind, transposed_product

FEW_FLOAT32_ROWS: Final = 6
"""Up to so many rows ``functional.linear`` in float32 is the slower form on some CPUs."""

MEASURED: Final = ((1, 1), (3, 4), (8, 12), (24, 48))
"""The counts of rows that are measured, each with the largest count that goes by it."""

PROCESSOR: Final = Path("/proc/cpuinfo")

_CLEARLY_FASTER: Final = 0.9
_REPEATS: Final = 3

Form = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Clock = Callable[[Form, Tensor, Tensor], float]
"""Seconds that a form takes for some rows and a weight."""

_measured: dict[WeightKind, TransposedCounts] = {}
"""What was measured in this process for weights of reduced precision."""


def choose_forms(
    weights: Sequence[Tensor], processor: Path = PROCESSOR, clock: Clock | None = None
) -> Mapping[WeightKind, TransposedCounts]:
    """The choice for every kind of these weights that are on a CPU.

    Float32 has a rule, the same on every start of one machine. In reduced precision both forms are
    measured, once in a process, which takes as long as some 20 steps. ``weights`` are those of a
    whole step in its order, so that each is read from where a step reads it: one weight alone
    would stay in the processor's cache. ``processor`` is Linux's description of the CPU.
    """
    on_cpu = [weight for weight in weights if weight.device.type == "cpu"]
    reduced = [weight for weight in on_cpu if weight.dtype != torch.float32]
    new = {_kind(weight) for weight in reduced} - _measured.keys()
    if new:
        faster = [_faster_transposed(reduced, count, clock or seconds) for count, _ in MEASURED]
        for kind in new:
            counts = [False]
            for found, (_, most) in zip(faster, MEASURED, strict=True):
                counts += [kind in found] * (most + 1 - len(counts))
            _measured[kind] = tuple(counts)
    return {
        _kind(weight): _of_float32(weight, processor)
        if weight.dtype == torch.float32
        else _measured[_kind(weight)]
        for weight in on_cpu
    }


def _of_float32(weight: Tensor, processor: Path) -> TransposedCounts:
    """One row reads a weight fastest as a matrix-vector product.

    Of a few rows, those of weights that narrow them are as fast by ``functional.linear``.
    """
    narrows = weight.shape[0] < weight.shape[1]
    most = FEW_FLOAT32_ROWS if not narrows and has_slow_linear(processor) else 1
    return (False, *[True] * most)


@functools.cache
def has_slow_linear(processor: Path) -> bool:
    """Whether ``functional.linear`` reads a weight several times for a few float32 rows.

    MKL, which computes it, does so on x86 CPUs that are not Intel's. Where there is no
    description of the CPU, or it names no vendor, the answer is no.
    """
    try:
        lines = processor.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    vendors = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    return bool(vendors) and "GenuineIntel" not in vendors


def seconds(form: Form, rows: Tensor, weight: Tensor) -> float:
    """How long one product takes."""
    began = time.perf_counter()
    form(rows, weight, None)
    return time.perf_counter() - began


def _kind(weight: Tensor) -> WeightKind:
    return weight.dtype, weight.shape


def _faster_transposed(weights: Sequence[Tensor], count: int, clock: Clock) -> set[WeightKind]:
    """The kinds for which the transposed form is clearly faster with so many rows."""
    plain, transposed = (
        _best_seconds(form, weights, count, clock)
        for form in (functional.linear, transposed_product)
    )
    return {kind for kind in plain if transposed[kind] < _CLEARLY_FASTER * plain[kind]}


def _best_seconds(
    form: Form, weights: Sequence[Tensor], count: int, clock: Clock
) -> dict[WeightKind, float]:
    """Seconds of all products of a step by kind: the best of several steps."""
    best: dict[WeightKind, float] = {}
    for _ in range(_REPEATS):
        step: dict[WeightKind, float] = {}
        for weight in weights:
            rows = weight.new_ones(count, weight.shape[1])
            step[_kind(weight)] = step.get(_kind(weight), 0.0) + clock(form, rows, weight)
        best = {kind: min(spent, best.get(kind, spent)) for kind, spent in step.items()}
    return best

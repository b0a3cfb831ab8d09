"""Which form of a product with few rows is fast: by rule in float32, by measurement otherwise.

A decoder step multiplies a handful of rows by every weight of the decoder. Libraries have several
paths for that, and which one is slow depends on the CPU, the precision and the shape: three float32
rows by the output projection took 6 times longer by ``functional.linear`` than with both factors
transposed on one CPU, and half as long on another.

Two forms of one product round differently. Float32 is there for answers that can be had again, so
its form depends on nothing but the shape, the number of rows and the make of the CPU. In reduced
precision rounding is coarse anyway, and the faster form is found by a stopwatch, once a process.
"""

from __future__ import annotations

import functools
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

ROW_COUNTS: Final = (1, 4, 12, 48)
"""The counts of rows a form is measured for; fewer rows go by the next one, more are not few."""


FEW_FLOAT32_ROWS: Final = 6
"""Up to so many rows ``functional.linear`` in float32 is the slower form on some CPUs."""


_PROCESSOR: Final = Path("/proc/cpuinfo")


_MEASURED_ROWS: Final = (1, 3, 8, 24)


_CLEARLY_FASTER: Final = 0.9


_REPEATS: Final = 3


_Key = tuple[torch.dtype, torch.Size]


_Form = Callable[[Tensor, Tensor, Tensor | None], Tensor]


_transposed: dict[_Key, tuple[bool, ...]] = {}
"""What ``choose_forms`` found, by reduced precision and shape of the weight."""


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``functional.linear`` of [N, C_in] and [C_out, C_in], in the form chosen for so few rows."""
    if rows.device.type == "cpu" and _is_transposed(rows.shape[0], weight):
        return _transposed_product(rows, weight, bias)
    return functional.linear(rows, weight, bias)


def _is_transposed(count: int, weight: Tensor) -> bool:
    if weight.dtype == torch.float32:
        return _is_transposed_float32(count, weight)
    forms = _transposed.get(_key(weight))
    return forms is not None and count <= ROW_COUNTS[-1] and forms[bisect_left(ROW_COUNTS, count)]


def _is_transposed_float32(count: int, weight: Tensor) -> bool:
    """The rule for float32: the same on every start of one machine.

    One row reads a weight fastest as a matrix-vector product. Of a few rows, those of weights
    that narrow them are as fast by ``functional.linear`` everywhere.
    """
    if count == 1:
        return True
    narrows = weight.shape[0] < weight.shape[1]
    return count <= FEW_FLOAT32_ROWS and not narrows and has_slow_linear(_PROCESSOR)


@functools.cache
def has_slow_linear(processor: Path) -> bool:
    """Whether ``functional.linear`` reads a weight several times for a few float32 rows.

    MKL, which computes it, does so on x86 CPUs that are not Intel's. ``processor`` is Linux's
    description of the CPU; where there is none, or it names no vendor, the answer is no.
    """
    try:
        lines = processor.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    vendors = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    return bool(vendors) and "GenuineIntel" not in vendors


def choose_forms(weights: Sequence[Tensor]) -> None:
    """Measures both forms for every shape among these CPU weights that is not measured yet.

    ``weights`` are those of a whole step in its order, so that each is read from where a step
    reads it: one weight alone would stay in the processor's cache. Takes as long as some 20 steps.
    Float32 has its rule and is not measured.
    """
    on_cpu = [
        weight
        for weight in weights
        if weight.device.type == "cpu" and weight.dtype != torch.float32
    ]
    new = {_key(weight) for weight in on_cpu} - _transposed.keys()
    if not new:
        return
    faster = [_faster_transposed(on_cpu, count) for count in _MEASURED_ROWS]
    for key in new:
        _transposed[key] = tuple(key in found for found in faster)


def _key(weight: Tensor) -> _Key:
    return weight.dtype, weight.shape


def _faster_transposed(weights: Sequence[Tensor], count: int) -> set[_Key]:
    """The shapes for which the transposed form is clearly faster with so many rows."""
    plain, transposed = (
        _best_seconds(form, weights, count) for form in (functional.linear, _transposed_product)
    )
    return {key for key in plain if transposed[key] < _CLEARLY_FASTER * plain[key]}


def _best_seconds(form: _Form, weights: Sequence[Tensor], count: int) -> dict[_Key, float]:
    """Seconds of all products of a step by shape: the best of several steps."""
    best: dict[_Key, float] = {}
    for _ in range(_REPEATS):
        step: dict[_Key, float] = {}
        for weight in weights:
            rows = weight.new_ones(count, weight.shape[1])
            step[_key(weight)] = step.get(_key(weight), 0.0) + _seconds(form, rows, weight)
        best = {key: min(spent, best.get(key, spent)) for key, spent in step.items()}
    return best


def _seconds(form: _Form, rows: Tensor, weight: Tensor) -> float:
    began = time.perf_counter()
    form(rows, weight, None)
    return time.perf_counter() - began


def _transposed_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if rows.shape[0] == 1:
        out = (weight @ rows[0]).unsqueeze(0)
    else:
        # Contiguous: fused attention takes a many times slower path for queries that are not.
        out = (weight @ rows.t()).t().contiguous()
    return out if bias is None else out.add_(bias)

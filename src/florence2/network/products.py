"""Which form of a product with few rows is fastest: measured once, because CPUs differ.

A decoder step multiplies a handful of rows by every weight of the decoder. Libraries have several
paths for that, and which one is slow depends on the CPU, the precision and the shape: three float32
rows by the output projection took 6 times longer by ``functional.linear`` than with both factors
transposed on one CPU, and half as long on another.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

ROW_COUNTS: Final = (1, 4, 12, 48)
"""The counts of rows a form is chosen for; fewer rows go by the next one, more are not few."""

_MEASURED_ROWS: Final = (1, 3, 8, 24)
_CLEARLY_FASTER: Final = 0.9
_REPEATS: Final = 3
_ROUND: Final = 12

_transposed: dict[tuple[torch.dtype, torch.Size], tuple[bool, ...]] = {}
"""What ``choose_forms`` found, by precision and shape of the weight. A fact about the machine."""


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``functional.linear`` of [N, C_in] and [C_out, C_in], in the form chosen for so few rows."""
    if rows.shape[0] <= ROW_COUNTS[-1] and rows.device.type == "cpu":
        forms = _transposed.get((weight.dtype, weight.shape))
        if forms is not None and forms[bisect_left(ROW_COUNTS, rows.shape[0])]:
            return _transposed_product(rows, weight, bias)
    return functional.linear(rows, weight, bias)


def choose_forms(weights: Iterable[Tensor]) -> None:
    """Measures both forms for every shape among these CPU weights that is not measured yet.

    Takes about half a second for the largest published checkpoint, less for what is known.
    """
    by_shape: dict[tuple[torch.dtype, torch.Size], list[Tensor]] = {}
    for weight in weights:
        if weight.device.type == "cpu":
            by_shape.setdefault((weight.dtype, weight.shape), []).append(weight)
    for key, alike in by_shape.items():
        if key not in _transposed:
            _transposed[key] = tuple(
                _is_transposed_faster(count, alike) for count in _MEASURED_ROWS
            )


def _is_transposed_faster(count: int, weights: Sequence[Tensor]) -> bool:
    rows = weights[0].new_ones(count, weights[0].shape[1])
    # Different weights in turn, as in a step: one alone would stay in the processor's cache.
    turn = weights[:_ROUND]
    forms = (functional.linear, _transposed_product)
    plain, transposed = (min(_seconds(form, rows, turn) for _ in range(_REPEATS)) for form in forms)
    return transposed < _CLEARLY_FASTER * plain


def _seconds(
    form: Callable[[Tensor, Tensor, None], Tensor], rows: Tensor, weights: Sequence[Tensor]
) -> float:
    began = time.perf_counter()
    for weight in weights:
        form(rows, weight, None)
    return time.perf_counter() - began


def _transposed_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Contiguous: fused attention takes a many times slower path for queries that are not.
    out = (weight @ rows.t()).t().contiguous()
    return out if bias is None else out.add_(bias)

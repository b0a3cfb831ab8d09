"""What the parts of the network share: products, attention, layers whose weights start empty."""

from __future__ import annotations

import functools
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, cast

import torch
from torch import Tensor, nn
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


# Up to so many rows of queries the plain products are faster than the fused kernel on a CPU.
FEW_ROWS: Final = 4


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function of a checkpoint's config; see ``config.ACTIVATIONS``."""
    if name == "gelu_pytorch_tanh":
        return _tanh_gelu
    return functional.relu if name == "relu" else functional.gelu


def _tanh_gelu(values: Tensor) -> Tensor:
    return functional.gelu(values, approximate="tanh")


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``functional.linear`` that is also fast for the few rows of a decoder step.

    ``rows`` [..., C_in], ``weight`` [C_out, C_in] -> [..., C_out].
    """
    # Always two dimensions: a view of one row of a larger tensor keeps that tensor's strides,
    # with which oneDNN's reduced precision takes a path that is a hundred times slower.
    flat = rows.reshape(-1, rows.shape[-1])
    return product(flat, weight, bias).reshape(*rows.shape[:-1], weight.shape[0])


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Attention of [B, heads, L, head_dim] over [B, heads, S, head_dim] -> as ``query``.

    ``mask`` broadcasts to [B, heads, L, S]: bool, True where one may look, or added to the scores.
    """
    if _is_small(query, mask, is_causal):
        scores: Tensor = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores + mask
        return scores.softmax(-1) @ value
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal
    )


def _is_small(query: Tensor, mask: Tensor | None, is_causal: bool) -> bool:
    """Whether the plain products are faster: a decoder step in float32 on a CPU.

    In reduced precision the fused kernel keeps float32 scores.
    """
    if is_causal or query.device.type != "cpu" or (mask is not None and mask.dtype == torch.bool):
        return False
    return query.dtype == torch.float32 and query.shape[2] <= FEW_ROWS


class Linear(nn.Linear):
    """``nn.Linear`` that is also fast for the few rows of a decoder step."""

    def reset_parameters(self) -> None:
        """Leaves the weights empty."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """[..., C_in] -> [..., C_out]."""
        return linear(input, self.weight, self.bias)


class Embedding(nn.Embedding):
    """``nn.Embedding`` that starts empty."""

    def reset_parameters(self) -> None:
        """Leaves the weights empty."""


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` that starts empty."""

    def reset_parameters(self) -> None:
        """Leaves the weights empty."""


class BiasedLinear(Linear):
    """``Linear`` for many rows, without the copies of the bias where the CPU allows it."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """[..., C_in] -> [..., C_out]."""
        if (
            input.dtype != torch.bfloat16
            or input.device.type != "cpu"
            or self.bias is None
            or torch.is_grad_enabled()
            or not has_biased_product()
        ):
            return super().forward(input)
        rows = input.reshape(-1, input.shape[-1])
        return _biased_product(rows, self.weight, self.bias).view(*input.shape[:-1], -1)


@functools.cache
def has_biased_product() -> bool:
    """Whether this torch and CPU have the call, and it gives what ``functional.linear`` gives."""
    numbers = torch.arange(24.0).to(torch.bfloat16)
    rows, weight, bias = numbers[:12].view(6, 2), numbers[12:20].view(4, 2), numbers[20:]
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        product = _biased_product(rows, weight, bias)
    except (AttributeError, RuntimeError, TypeError):
        # A private call: another torch may lack it, or take other arguments.
        return False
    return torch.allclose(product, functional.linear(rows, weight, bias), rtol=0.02)


def _biased_product(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    call = torch.ops.mkldnn._linear_pointwise
    return cast(Tensor, call(rows, weight, bias, "none", [], ""))


_BLOCK: Final = 128
_SMALL_VOCABULARY: Final = 4096


def top_candidates(log_probs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` best tokens of every row, best first: values and ids, both [rows, count].

    Finds the blocks that hold the best maxima first: the winners are all inside the ``count``
    best blocks, so a large vocabulary is only read once, by a plain maximum.
    """
    rows, vocab = log_probs.shape
    blocks = vocab // _BLOCK
    if vocab <= _SMALL_VOCABULARY or blocks < count:
        values, ids = torch.topk(log_probs, count)
        return values, ids
    device = log_probs.device
    whole = blocks * _BLOCK
    maxima = log_probs[:, :whole].view(rows, blocks, _BLOCK).amax(dim=2)
    best_blocks = torch.topk(maxima, count, sorted=False)[1]
    columns = best_blocks.unsqueeze(2) * _BLOCK + torch.arange(_BLOCK, device=device)
    tail = torch.arange(whole, vocab, device=device).expand(rows, -1)
    columns = torch.cat((columns.flatten(1), tail), dim=1)
    values, places = torch.topk(log_probs.gather(1, columns), count)
    return values, columns.gather(1, places)

"""Small operations shared by the parts of the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from florence2.network.linear import product

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

"""Small operations shared by the parts of the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

# With at most this many rows oneDNN's float32 matrix product reads the weight several times
# slower than memory allows; the transposed product does not.
FEW_ROWS: Final = 16


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function of a checkpoint's config; see ``config.ACTIVATIONS``."""
    if name == "gelu_pytorch_tanh":
        return _tanh_gelu
    return functional.relu if name == "relu" else functional.gelu


def _tanh_gelu(values: Tensor) -> Tensor:
    return functional.gelu(values, approximate="tanh")


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``functional.linear`` that is also fast for a few float32 rows on a CPU.

    ``rows`` [..., C_in], ``weight`` [C_out, C_in] -> [..., C_out].
    """
    count = rows.numel() // rows.shape[-1]
    if rows.device.type != "cpu" or rows.dtype != torch.float32 or count > FEW_ROWS:
        return functional.linear(rows, weight, bias)
    flat = rows.reshape(count, rows.shape[-1]).t()
    out = weight @ flat if bias is None else torch.addmm(bias[:, None], weight, flat)
    return out.t().reshape(*rows.shape[:-1], weight.shape[0])

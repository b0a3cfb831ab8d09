"""A linear layer whose bias is added inside the product.

In reduced precision torch copies the bias into every row of the output and then adds the product
to it. oneDNN's own call writes the same values once.
"""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from florence2.network.layers import Linear


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

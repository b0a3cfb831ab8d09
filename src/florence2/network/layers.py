"""Layers whose weights start empty: ``Florence2Network`` draws them, or a checkpoint gives them.

torch's own random start would be thrown away, and on the meta device, where networks are built
for loading, it imports torch's compiler, which takes seconds.
"""

from __future__ import annotations

from torch import Tensor, nn

from florence2.network.ops import linear


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

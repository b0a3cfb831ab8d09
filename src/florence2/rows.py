"""Tensors whose first dimension are the rows of a batch, of which some are given to new items."""

from __future__ import annotations

import torch
from torch import Tensor


def put_rows(into: Tensor, rows: Tensor, source: Tensor, fill: float) -> None:
    """Sets ``into[rows]`` to ``source``, whose later dimensions may be smaller, and else ``fill``.

    In place. ``into`` [B, ...], ``rows`` [B'] row numbers, ``source`` [B', ...].
    """
    part = into
    for dim, size in enumerate(source.shape[1:], start=1):
        if size < into.shape[dim]:
            into.index_fill_(0, rows, fill)
            part = part.narrow(dim, 0, size)
    part.index_copy_(0, rows, source)


def widened(tensor: Tensor, dim: int, size: int, fill: float) -> Tensor:
    """A copy with ``size`` entries along ``dim``, the new ones ``fill``; itself if it has them."""
    if tensor.shape[dim] >= size:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size
    wide = tensor.new_full(shape, fill)
    wide.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return wide


def row_numbers(rows: list[int], device: torch.device) -> Tensor:
    """Row numbers as an index [B'] on ``device``."""
    return torch.tensor(rows, dtype=torch.long, device=device)

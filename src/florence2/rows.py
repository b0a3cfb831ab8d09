"""Tensors whose first dimension are the rows of a batch, of which some are given to new items."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def put_rows(
    into: Tensor, rows: Tensor, source: Tensor, fill: float, chosen: Tensor | None = None
) -> None:
    """Sets ``into[rows]`` to ``source``, whose later dimensions may be smaller, and else ``fill``.

    In place. ``into`` [B, ...], ``rows`` [B'] row numbers, ``source`` [B', ...] or, with
    ``chosen`` [B'], any number of rows of which these are taken; it may be ``into`` itself.
    """
    if chosen is not None:
        source = source.index_select(0, chosen)
    part = into
    for dim, size in enumerate(source.shape[1:], start=1):
        if size < into.shape[dim]:
            into.index_fill_(0, rows, fill)
            part = part.narrow(dim, 0, size)
    part.index_copy_(0, rows, source)


def widened(tensor: Tensor, dim: int, size: int, fill: float) -> Tensor:
    """A copy with ``size`` entries along ``dim``, the new ones ``fill``; itself if it has them."""
    shape = list(tensor.shape)
    shape[dim] = max(size, shape[dim])
    return enlarged(tensor, shape, fill)


def enlarged(tensor: Tensor, shape: Sequence[int], fill: float) -> Tensor:
    """A copy of this ``shape``, nowhere smaller, ``fill`` in what is new; itself if it has it."""
    if tuple(shape) == tensor.shape:
        return tensor
    large = tensor.new_full(list(shape), fill)
    part = large
    for dim, size in enumerate(tensor.shape):
        part = part.narrow(dim, 0, size)
    part.copy_(tensor)
    return large


def row_numbers(rows: list[int], device: torch.device) -> Tensor:
    """Row numbers as an index [B'] on ``device``."""
    return to_device(rows, torch.long, device)


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` on ``device``; the host does not wait for what the device is doing."""
    host = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)

"""Normalised pixels from bytes, on the device: a quarter of what float32 pixels would upload."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def normalise(images_bhwc: Tensor, table: Tensor) -> Tensor:
    """Bytes [B, H, W, 3] -> float32 [B, 3, H, W], channels-last in memory.

    ``table`` [3, 256] float32 has the value of each byte of each channel
    (``ImageProcessor.lookup_table``), so the result is the host's to the last bit.
    """
    first = torch.arange(3, device=images_bhwc.device, dtype=torch.int32) * 256
    places = (images_bhwc.to(torch.int32) + first).flatten()
    values = table.flatten().index_select(0, places)
    return values.view(images_bhwc.shape).permute(0, 3, 1, 2)


def upload(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """``values`` on ``device``, in the same memory order; the caller may reuse them at once."""
    # torch warns of memory that it must not write, such as Pillow's.
    host = torch.from_numpy(np.require(values, requirements="W"))
    if device.type != "cuda":
        return host.to(device)
    # From page-locked memory the copy runs beside the host's own work.
    return host.pin_memory().to(device, non_blocking=True)


def check_bytes(images_bhwc: npt.NDArray[np.uint8], table: npt.NDArray[np.float32]) -> None:
    """ValueError unless these are bytes [B, H, W, 3] and a table [3, 256]."""
    is_image = images_bhwc.ndim == 4 and images_bhwc.shape[3] == 3
    if not is_image or images_bhwc.dtype != np.uint8:
        raise ValueError(
            "Images as bytes have the shape [B, H, W, 3] and the type uint8, and "
            f"{list(images_bhwc.shape)} of {images_bhwc.dtype} was received."
        )
    if table.shape != (3, 256):
        raise ValueError(
            f"A lookup table has the shape [3, 256], and {list(table.shape)} was received."
        )

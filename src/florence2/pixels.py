"""The two steps from a picture to the network's input: Pillow's scaling, and a table of values."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any, Final

import cv2
import numpy as np
from PIL import Image

from florence2.errands import Errand
from florence2.records import SizeWh

Pixels = np.ndarray[Any, np.dtype[np.float32]]
Scaled = np.ndarray[Any, np.dtype[np.uint8]]

SHARED_FROM_PIXELS: Final = 4_000_000
"""Scaling takes some 6 ms per million pixels; below this, sharing it would gain too little."""

# OpenCV hands arrays of 2**18 pixels and more to threads of its own, which would take the cores
# from the model's.
_LOOKED_UP_AT_ONCE_PIXELS: Final = 2**18 - 1


def scale(
    image: Image.Image, size_wh: SizeWh, resample: int, helpers: Executor | None = None
) -> Scaled:
    """An 8-bit RGB image at another size, by Pillow's filter: uint8 ``[height, width, 3]``.

    A large image is scaled by this thread and, if one is free, one of ``helpers``. The pixels are
    the same: Pillow scales each row by itself, rounds, and then each column.
    """
    filter_ = Image.Resampling(resample)
    width, height = image.size
    if helpers is None or width * height < SHARED_FROM_PIXELS or height < 2:
        return np.asarray(image.resize(size_wh, filter_), dtype=np.uint8)
    narrow = Image.new("RGB", (size_wh[0], height))
    middle = height // 2

    def narrowed(top: int, bottom: int) -> Image.Image:
        return image.crop((0, top, width, bottom)).resize((size_wh[0], bottom - top), filter_)

    lower = Errand(lambda: narrowed(middle, height))
    try:
        helpers.submit(lower.run)
    except RuntimeError:
        # The helpers were sent home meanwhile: the work is this thread's.
        lower.run()
    narrow.paste(narrowed(0, middle), (0, 0))
    narrow.paste(lower.result(), (0, middle))
    return np.asarray(narrow.resize(size_wh, filter_), dtype=np.uint8)


def look_up(scaled: Scaled, table: Pixels, out: Pixels | None = None) -> Pixels:
    """Each value of uint8 ``[H, W, 3]`` through its channel's row of ``table`` ``[3, 256]``.

    Gives float32 ``[H, W, 3]``: ``out``, which is contiguous, or a new array.
    """
    if out is None:
        out = np.empty(scaled.shape, np.float32)
    if out.shape != scaled.shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(
            f"Pixels of shape {list(scaled.shape)} go into contiguous float32 of that shape, and "
            f"{out.dtype} {list(out.shape)} was given."
        )
    values = np.ascontiguousarray(table.T)[None]
    step = max(1, _LOOKED_UP_AT_ONCE_PIXELS // max(1, scaled.shape[1]))
    for top in range(0, len(scaled), step):
        # Written in place, because the part of ``out`` has the type and shape of the result.
        cv2.LUT(scaled[top : top + step], values, dst=out[top : top + step])
    return out

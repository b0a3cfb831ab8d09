"""The two steps from a picture to the network's input: Pillow's scaling, and a table of values."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Final

import numpy as np
from PIL import Image

from florence2.errands import Errand
from florence2.opencv import cv2
from florence2.records import SizeWh

logger = logging.getLogger(__name__)


Pixels = np.ndarray[Any, np.dtype[np.float32]]


Scaled = np.ndarray[Any, np.dtype[np.uint8]]


SHARED_FROM_PIXELS: Final = 3_000_000
"""Scaling takes some 6 ms per million pixels; below this, sharing it would gain too little."""


# More make the wait for the last one shorter, and cost more where they are joined.
_PARTS: Final = 8


# OpenCV hands arrays of 2**18 pixels and more to threads of its own, which would take the cores
# from the model's.
_LOOKED_UP_AT_ONCE_PIXELS: Final = 2**18 - 1


@dataclass(frozen=True, slots=True, eq=False)
class PreparedImage:
    """What the network needs of an image.

    ``size_wh`` of the original in pixels, after the EXIF rotation; ``scaled`` uint8
    ``[height, width, 3]`` at the network's size, which ``ImageProcessor.normalise`` or the device
    turns into the network's values. ``content_hash`` has 32 hex digits that are equal for equal
    ``scaled`` of equal ``size_wh``: for images with the same features and the same answers.
    """

    size_wh: SizeWh
    content_hash: str
    scaled: Scaled

    @property
    def num_pixels(self) -> int:
        """Of ``scaled``."""
        return int(self.scaled.shape[0] * self.scaled.shape[1])


def scale(
    image: Image.Image, size_wh: SizeWh, resample: int, helpers: Executor | None = None
) -> Scaled:
    """An 8-bit RGB image at another size, by Pillow's filter: uint8 ``[height, width, 3]``.

    A large image is scaled by this thread and, if one is free, one of ``helpers``, which meet
    somewhere between its ends. The pixels are the same: Pillow scales each row by itself, rounds,
    and then each column.
    """
    filter_ = Image.Resampling(resample)
    width, height = image.size
    if helpers is None or width * height < SHARED_FROM_PIXELS:
        return np.asarray(image.resize(size_wh, filter_), dtype=np.uint8)
    edges = [height * part // _PARTS for part in range(_PARTS + 1)]
    parts = [
        (top, Errand(partial(_narrowed, image, top, bottom, size_wh[0], filter_)))
        for top, bottom in pairwise(edges)
        if bottom > top
    ]
    try:
        helpers.submit(_run, [part for _, part in reversed(parts)])
    except RuntimeError:
        logger.debug("The helpers were sent home: the work is all this thread's")
    _run([part for _, part in parts])
    narrow = Image.new("RGB", (size_wh[0], height))
    for top, part in parts:
        narrow.paste(part.result(), (0, top))
    return np.asarray(narrow.resize(size_wh, filter_), dtype=np.uint8)


def _narrowed(
    image: Image.Image, top: int, bottom: int, width: int, filter_: Image.Resampling
) -> Image.Image:
    rows = image.crop((0, top, image.width, bottom))
    return rows.resize((width, bottom - top), filter_)


def _run(parts: Sequence[Errand[Image.Image]]) -> None:
    for part in parts:
        part.run()


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

"""THE rules of a region, in whatever way it is given: in pixels, on the image, not too small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from florence2.errors import RequestError
from florence2.records import BoxXyxy, Region, SizeWh
from florence2.tokens import NUM_LOCATION_BINS

# A pixel, less what adding floats may take away from it.
_MIN_SIDE_PX: Final = 1 - 1e-6


def region_bins(box_xyxy: BoxXyxy, size_wh: SizeWh) -> tuple[int, int, int, int]:
    """The location bins, 0 to 999, of a box in pixels of an image of ``size_wh``."""
    sizes = (*size_wh, *size_wh)
    x1, y1, x2, y2 = (
        min(max(math.floor(value * NUM_LOCATION_BINS / size), 0), NUM_LOCATION_BINS - 1)
        for value, size in zip(box_xyxy, sizes, strict=True)
    )
    return x1, y1, x2, y2


def check_region(box_xyxy: Sequence[float], name: str = "A region") -> BoxXyxy:
    """The four numbers of a box that is a region on some image.

    Raises RequestError, which calls the box ``name``, unless they are finite, in the order left,
    top, right, bottom, and a pixel or more apart. A box from 0 to 1 counts shares of the image.
    """
    if len(box_xyxy) != 4 or not all(math.isfinite(value) for value in box_xyxy):
        raise RequestError(
            f"{name} is four finite numbers x1, y1, x2, y2 in pixels, and "
            f"{list(box_xyxy)} was received; correct it."
        )
    x1, y1, x2, y2 = (float(value) for value in box_xyxy)
    if x1 >= x2 or y1 >= y2:
        raise RequestError(
            f"{name} must have x1 < x2 and y1 < y2, and "
            f"{list(box_xyxy)} was received; give left, top, right, bottom."
        )
    is_share = min(x1, y1) >= 0 and max(x2, y2) <= 1
    if is_share or not _is_a_pixel(x1, y1, x2, y2):
        raise RequestError(
            f"{name} is in pixels and at least one pixel wide and high, and {list(box_xyxy)} was "
            "received; multiply shares of the image by its width and height."
        )
    return x1, y1, x2, y2


def clip_region(
    box_xyxy: Sequence[float], size_wh: tuple[float, float], name: str = "A region"
) -> BoxXyxy:
    """The part of a region that lies on the image, in pixels.

    Raises RequestError as ``check_region``, and where less than a pixel of it is on the image.
    """
    x1, y1, x2, y2 = check_region(box_xyxy, name)
    width, height = size_wh
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if not _is_a_pixel(*inside):
        raise RequestError(
            f"{name} must lie on the image, which is {width}x{height}, and "
            f"{list(box_xyxy)} was received; give it in pixels of the original image."
        )
    return inside


def region_on_image(box_xyxy: Sequence[float], size_wh: tuple[float, float]) -> Region | None:
    """The region of something found, or None where the rules allow none."""
    try:
        return Region(clip_region(box_xyxy, size_wh))
    except RequestError:
        return None


def _is_a_pixel(x1: float, y1: float, x2: float, y2: float) -> bool:
    return x2 - x1 >= _MIN_SIDE_PX and y2 - y1 >= _MIN_SIDE_PX

"""Between boxes in float pixels and the SDK's inclusive integer pixels.

A box covers [x1, x2) by [y1, y2). The SDK's Rectangle names its first and last pixel, rows before
columns, and cuts fractions off; so rounding and the change of order happen here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from florence2.records import BoxXyxy, SizeWh

Tlbr = tuple[int, int, int, int]


def is_finite(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) for value in values)


def rectangle_tlbr_from_box_xyxy(box_xyxy: BoxXyxy, size_wh: SizeWh) -> Tlbr:
    """First and last pixel (top, left, bottom, right) of a box, at least 1 px, inside the image."""
    x1, y1, x2, y2 = box_xyxy
    left, right = _pixels(x1, x2, size_wh[0])
    top, bottom = _pixels(y1, y2, size_wh[1])
    return top, left, bottom, right


def box_xyxy_from_rectangle_tlbr(tlbr: Tlbr) -> BoxXyxy:
    """The box (x1, y1, x2, y2) whose first and last pixels are given."""
    top, left, bottom, right = tlbr
    return float(left), float(top), float(right + 1), float(bottom + 1)


def points_rc_from_ring_xy(ring_xy: Sequence[float], size_wh: SizeWh) -> list[tuple[int, int]]:
    """The (row, column) pixels of a ring (x1, y1, x2, y2, ...), inside the image."""
    width, height = size_wh
    return [
        (_clamp(_nearest(y), height), _clamp(_nearest(x), width))
        for x, y in zip(ring_xy[0::2], ring_xy[1::2], strict=True)
    ]


def overlap(first: BoxXyxy, second: BoxXyxy) -> float:
    """Intersection over union of two boxes."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    union = _area(first) + _area(second) - shared
    return shared / union if union > 0 else 0.0


def _area(box_xyxy: BoxXyxy) -> float:
    x1, y1, x2, y2 = box_xyxy
    return (x2 - x1) * (y2 - y1)


def _pixels(start: float, end: float, length: int) -> tuple[int, int]:
    start, end = min(start, end), max(start, end)
    first = _clamp(_nearest(start), length)
    return first, max(first, _clamp(_nearest(end) - 1, length))


def _nearest(value: float) -> int:
    return math.floor(value + 0.5)


def _clamp(value: int, length: int) -> int:
    return max(0, min(value, length - 1))

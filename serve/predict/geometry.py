"""Boxes and outlines: float pixels and the SDK's inclusive ones, and which finds are one object.

Of several finds on the same object the surest stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from florence2.opencv import cv2
from florence2.records import Box, BoxXyxy, Polygon, Quad, SizeWh

# What sums of coordinates in float64 may leave of an area of nothing.
_ROUNDING_PX2: Final = 1e-6

Tlbr = tuple[int, int, int, int]
Located = Box | Quad | Polygon


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


def rings_of(shape: Quad | Polygon) -> list[Sequence[float]]:
    """The rings (x1, y1, x2, y2, ...) that can be drawn: three points or more, all numbers."""
    rings = [shape.quad_xy] if isinstance(shape, Quad) else shape.rings_xy
    return [ring for ring in rings if len(ring) >= 6 and is_finite(ring)]


def ring_area(points_rc: Sequence[tuple[int, int]]) -> float:
    """The area inside a ring of (row, column) points; 0 for one that lies on lines only.

    Of a ring that crosses itself, what is left of one side and right of the other cancels out;
    where nothing would be left, the parts are added, each row of pixels as in its middle.
    """
    points = np.array(points_rc, np.float64).reshape(-1, 2)
    rows, columns = points.T
    last_rows, last_columns = np.roll(rows, 1), np.roll(columns, 1)
    area = 0.5 * abs(float(np.dot(rows, last_columns) - np.dot(columns, last_rows)))
    if area or len(points) < 4:
        return area
    # Between two rows no edge ends: the inside is between every other pair of edges.
    for middle in np.arange(rows.min(), rows.max()) + 0.5:
        over = (np.minimum(rows, last_rows) < middle) & (middle < np.maximum(rows, last_rows))
        share = (middle - rows[over]) / (last_rows[over] - rows[over])
        ends = np.sort(columns[over] + share * (last_columns[over] - columns[over]))
        area += float((ends[1::2] - ends[::2]).sum())
    return area if area > _ROUNDING_PX2 else 0.0


def drawable_rings(shape: Quad | Polygon, size_wh: SizeWh) -> list[list[tuple[int, int]]]:
    """The rings as (row, column) pixels, without those that have no area in the image."""
    drawn = (points_rc_from_ring_xy(ring, size_wh) for ring in rings_of(shape))
    return [points for points in drawn if ring_area(points) > 0]


def outer_box(shape: Located) -> BoxXyxy | None:
    """The smallest box around a shape; None for one that has no place, with x1 <= x2, y1 <= y2."""
    if isinstance(shape, Box):
        points = list(shape.box_xyxy) if is_finite(shape.box_xyxy) else []
    else:
        points = [value for ring in rings_of(shape) for value in ring]
    if not points:
        return None
    xs, ys = points[0::2], points[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def area_share(box_xyxy: BoxXyxy, size_wh: SizeWh) -> float:
    """How much of the image a box covers, from 0 to 1."""
    width, height = size_wh
    x1, y1, x2, y2 = box_xyxy
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height))
    return max(0.0, inside[2] - inside[0]) * max(0.0, inside[3] - inside[1]) / (width * height)


def mask_of_rings(
    rings_xy: Iterable[Sequence[float]], size_wh: SizeWh
) -> tuple[NDArray[np.bool_], tuple[int, int]] | None:
    """The pixels that any of the rings covers, and where the mask's (row, column) 0, 0 is.

    The mask is as small as the rings allow; None when no pixel of the image is covered.
    """
    width, height = size_wh
    drawn = [_far_clamped(ring, size_wh) for ring in rings_xy]
    if not drawn:
        return None
    points = np.concatenate(drawn)
    left, top = np.maximum(points.min(axis=0), 0)
    right, bottom = np.minimum(points.max(axis=0), (width - 1, height - 1))
    if left > right or top > bottom:
        return None
    mask = np.zeros((bottom - top + 1, right - left + 1), np.uint8)
    for ring in drawn:
        # One call for all rings would leave out what two of them share.
        cv2.fillPoly(mask, [ring - (left, top)], 1)
    return (mask.astype(bool), (int(top), int(left))) if mask.any() else None


def _far_clamped(ring_xy: Sequence[float], size_wh: SizeWh) -> NDArray[np.int32]:
    """Pixels (x, y) of a ring, [points, 2], at most an image away from it: drawing is 32 bit."""
    ends = np.array(size_wh)
    points = np.floor(np.array(ring_xy, np.float64).reshape(-1, 2) + 0.5)
    return np.clip(points, -ends, 2 * ends).astype(np.int32)


def _pixels(start: float, end: float, length: int) -> tuple[int, int]:
    start, end = min(start, end), max(start, end)
    first = _clamp(_nearest(start), length)
    return first, max(first, _clamp(_nearest(end) - 1, length))


def _nearest(value: float) -> int:
    return math.floor(value + 0.5)


def _clamp(value: int, length: int) -> int:
    return max(0, min(value, length - 1))


@dataclass(frozen=True, slots=True)
class Find:
    """One located object: its outer box (x1 <= x2, y1 <= y2), its class, and its score.

    A score that is unknown counts as 0. ``kind`` parts what is never the same object, such as a
    box and a line of text; across classes too, only finds of one kind are compared.
    """

    box_xyxy: BoxXyxy
    class_name: str
    score: float | None
    kind: str = ""


def distinct(
    finds: Sequence[Find],
    *,
    iou: float | None,
    containment_share: float | None = None,
    across_classes: bool = False,
) -> list[int]:
    """Positions of the finds to keep, in order.

    Two finds of one class (or of any two, ``across_classes``) are the same object when their IoU
    reaches ``iou``, or when ``containment_share`` of the smaller lies inside the larger; None
    switches either off. Every find that goes has a better one among those that stay; of two
    equally good ones the earlier stays.
    """
    if not finds or (iou is None and containment_share is None):
        return list(range(len(finds)))
    boxes = np.array([find.box_xyxy for find in finds], np.float64)
    kinds = numbered([find.kind for find in finds])
    names = numbered([find.class_name for find in finds])
    left = np.ones(len(finds), bool)
    kept: list[int] = []
    for place in sorted(range(len(finds)), key=lambda n: (-known_score(finds[n].score), n)):
        if not left[place]:
            continue
        kept.append(place)
        same = same_boxes(boxes[place], boxes, iou, containment_share) & (kinds == kinds[place])
        left &= ~(same if across_classes else same & (names == names[place]))
    return sorted(kept)


def same_boxes(
    box_xyxy: NDArray[np.float64],
    boxes_xyxy: NDArray[np.float64],
    iou: float | None,
    containment_share: float | None = None,
) -> NDArray[np.bool_]:
    """Which of ``boxes_xyxy`` [N, 4] overlap a box enough to be the same: [N].

    Boxes that share no area never do.
    """
    shared = shared_areas(box_xyxy, boxes_xyxy)
    own, areas = areas_of(box_xyxy), areas_of(boxes_xyxy)
    same = np.zeros(len(boxes_xyxy), bool)
    if iou is not None:
        same |= shared >= iou * (own + areas - shared)
    if containment_share is not None:
        same |= shared >= containment_share * np.minimum(own, areas)
    return same & (shared > 0)


def shared_areas(
    box_xyxy: NDArray[np.float64], boxes_xyxy: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The area that a box has in common with each of ``boxes_xyxy`` [N, 4]: [N]."""
    first = np.maximum(box_xyxy[:2], boxes_xyxy[:, :2])
    last = np.minimum(box_xyxy[2:], boxes_xyxy[:, 2:])
    shared: NDArray[np.float64] = np.prod(np.maximum(last - first, 0.0), axis=1)
    return shared


def areas_of(boxes_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
    """The areas of boxes [..., 4]: [...]."""
    areas: NDArray[np.float64] = np.prod(boxes_xyxy[..., 2:] - boxes_xyxy[..., :2], axis=-1)
    return areas


def known_score(score: float | None) -> float:
    """The score, or 0 where there is none."""
    return 0.0 if score is None or math.isnan(score) else score


def numbered(names: Sequence[object]) -> NDArray[np.int64]:
    """Equal numbers for equal names: [N]."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.int64)

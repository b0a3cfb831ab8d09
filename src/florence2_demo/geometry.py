"""Points and polygons in the image: posing, clipping, the order of points, and boxes.

Points are [n, 2] arrays in fractions 0..1 of the image unless a name says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from florence2.opencv import cv2
from florence2.records import SizeWh

Points = NDArray[np.float64]
"""Vertices as [n, 2], x before y."""

PointsXy = tuple[tuple[float, float], ...]
QuadXy = tuple[tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, float]]
FractionBox = tuple[float, float, float, float]
MAX_POLYGON_POINTS: Final = 12
"""Of an outline as answers spell it."""
_SUBPIXEL_BITS: Final = 4


@dataclass(frozen=True, slots=True)
class Pose:
    """Where and how a shape stands.

    ``centre_xy`` in fractions of the image, ``extent_wh`` in fractions of its shorter side,
    ``angle`` in radians clockwise on the screen.
    """

    centre_xy: tuple[float, float]
    extent_wh: tuple[float, float]
    angle: float
    mirrored: bool


def posed(points: Points, pose: Pose, image_wh: SizeWh) -> Points:
    """Unit coordinates of a shape as fractions of an image of ``image_wh`` pixels."""
    short = min(image_wh)
    flip = -1.0 if pose.mirrored else 1.0
    local = points * (pose.extent_wh[0] * short * flip, pose.extent_wh[1] * short)
    cos, sin = math.cos(pose.angle), math.sin(pose.angle)
    turned: Points = local @ np.array([[cos, sin], [-sin, cos]])
    placed: Points = turned / np.array(image_wh) + np.array(pose.centre_xy)
    return placed


def fill_polygon(
    raster: NDArray[np.uint8], points_px: Points, value: int | tuple[int, int, int]
) -> None:
    """Fills a polygon [n, 2] on a raster [h, w] or [h, w, 3], to a sixteenth of a pixel."""
    fixed = np.round((points_px - 0.5) * (1 << _SUBPIXEL_BITS)).astype(np.int32)
    cv2.fillPoly(raster, [fixed], value, shift=_SUBPIXEL_BITS)


def area(points: Points) -> float:
    """Signed area in squared fractions; positive is clockwise on the screen."""
    following = np.roll(points, -1, axis=0)
    cross = points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]
    return float(cross.sum()) / 2


def _clip_half(points: list[tuple[float, float]], axis: int, limit: float, keep_below: bool) -> (
    list[tuple[float, float]]
):  # fmt: skip
    """Sutherland-Hodgman against one side of the image."""
    kept: list[tuple[float, float]] = []
    sign = 1.0 if keep_below else -1.0
    for here, there in zip(points, points[1:] + points[:1], strict=True):
        depth_here, depth_there = (sign * (limit - p[axis]) for p in (here, there))
        if depth_here >= 0:
            kept.append(here)
        if depth_here * depth_there < 0:
            t = depth_here / (depth_here - depth_there)
            kept.append((here[0] + t * (there[0] - here[0]), here[1] + t * (there[1] - here[1])))
    return kept


def clip_to_image(points: Points) -> Points:
    """The part of a polygon inside the image; empty where nothing is."""
    if points.min() >= 0 and points.max() <= 1:
        return points
    pairs = [(float(x), float(y)) for x, y in points]
    for axis, limit, keep_below in (
        (0, 0.0, False),
        (0, 1.0, True),
        (1, 0.0, False),
        (1, 1.0, True),
    ):
        pairs = _clip_half(pairs, axis, limit, keep_below) if pairs else pairs
    return np.clip(np.array(pairs, np.float64).reshape(-1, 2), 0, 1)


def _drop_flattest(points: Points) -> Points:
    """Without the corner whose triangle with its neighbours is smallest."""
    before, after = np.roll(points, 1, axis=0), np.roll(points, -1, axis=0)
    a, b = points - before, after - points
    triangles = np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0])
    return np.delete(points, int(triangles.argmin()), axis=0)


def answer_polygon(points: Points) -> PointsXy:
    """A clipped polygon as answers spell it: at most 12 points, clockwise, from the top.

    "The top" is the corner with the smallest 3 y + x within the polygon's own box, so that level
    edges start at their left end and a small tilt does not move the start.
    """
    while len(points) > MAX_POLYGON_POINTS:
        points = _drop_flattest(points)
    if area(points) < 0:
        points = points[::-1]
    low, high = points.min(axis=0), points.max(axis=0)
    relative = (points - low) / np.maximum(high - low, 1e-9)
    start = int((3 * relative[:, 1] + relative[:, 0]).argmin())
    return as_pairs(np.roll(points, -start, axis=0))


def as_pairs(points: Points) -> PointsXy:
    """An array of points as plain tuples."""
    return tuple((float(x), float(y)) for x, y in points)


def tight_box(points: Points) -> FractionBox:
    """The smallest upright box around points."""
    (x1, y1), (x2, y2) = points.min(axis=0), points.max(axis=0)
    return float(x1), float(y1), float(x2), float(y2)


def boxes_touch(a: FractionBox, b: FractionBox) -> bool:
    """Whether two boxes share any area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def box_iou(a: FractionBox, b: FractionBox) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

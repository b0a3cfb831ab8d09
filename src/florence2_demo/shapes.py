"""What each kind of thing looks like, in unit coordinates: x right, y down, about -0.5..0.5.

A shape has a dense ``outline`` (what is drawn, and the truth for masks), a ``polygon`` of at most
MAX_POLYGON_POINTS points (what answers spell), and ``details`` that make it recognisable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np

from florence2.opencv import cv2
from florence2_demo.geometry import MAX_POLYGON_POINTS, Points

_RASTER_PX: Final = 1024


@dataclass(frozen=True, slots=True)
class Detail:
    """A painted part inside a shape. ``tone`` names its colour, see ``palette.tone_rgb``."""

    points: Points
    tone: str


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of thing. Rotations are in degrees; ``turns`` are the base directions it may take.

    ``aspect`` is the usual width over height that its unit coordinates are stretched to.
    """

    outline: Points
    polygon: Points
    details: tuple[Detail, ...]
    aspect: float = 1.0
    max_tilt: float = 10.0
    turns: tuple[float, ...] = (0.0,)
    mirrors: bool = False


def ellipse(x: float, y: float, rx: float, ry: float, count: int = 32) -> Points:
    """An ellipse as a polygon, clockwise on the screen from its right-most point."""
    angles = np.arange(count) * (2 * math.pi / count)
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def rectangle(x1: float, y1: float, x2: float, y2: float) -> Points:
    """An upright rectangle."""
    return _points((x1, y1), (x2, y1), (x2, y2), (x1, y2))


def _points(*pairs: tuple[float, float]) -> Points:
    return np.array(pairs, dtype=np.float64)


def _union(*parts: Points) -> Points:
    """The outer contour of overlapping parts, dense enough to look smooth."""
    raster = np.zeros((_RASTER_PX, _RASTER_PX), np.uint8)
    for part in parts:
        pixels = np.round((part + 0.6) / 1.2 * (_RASTER_PX - 1)).astype(np.int32)
        cv2.fillPoly(raster, [pixels], 1)
    contours: Any = cv2.findContours(raster, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    contour = cv2.approxPolyDP(max(contours, key=len), 1.5, True)[:, 0]
    return np.asarray(contour, np.float64) / (_RASTER_PX - 1) * 1.2 - 0.6


def _coarse(outline: Points) -> Points:
    """The outline with as few points as needed, at most MAX_POLYGON_POINTS."""
    if len(outline) <= MAX_POLYGON_POINTS:
        return outline
    for tolerance in np.arange(0.008, 0.2, 0.002):
        points = cv2.approxPolyDP(outline.astype(np.float32)[:, None], float(tolerance), True)
        if len(points) <= MAX_POLYGON_POINTS:
            return np.asarray(points[:, 0], np.float64)
    raise ValueError("This outline cannot be simplified far enough; draw it with fewer corners.")


def _ball() -> Shape:
    # A 12-gon of the circle's area overlaps it better than an inscribed one.
    radius = 0.5 * math.sqrt(math.pi / (12 * math.sin(math.pi / 12) * math.cos(math.pi / 12)))
    arc = np.linspace(-0.42, 0.42, 14)
    bulge = 0.16 * np.cos(arc / 0.42 * math.pi / 2)
    upper = np.stack([arc, -0.06 + bulge], axis=1)
    lower = np.stack([arc[::-1], 0.12 + bulge[::-1]], axis=1)
    details = (
        Detail(np.concatenate([upper, lower]), "mark"),
        Detail(ellipse(-0.17, -0.24, 0.13, 0.08), "shine"),
    )
    polygon = np.clip(ellipse(0, 0, radius, radius, 12), -0.5, 0.5)
    return Shape(ellipse(0, 0, 0.5, 0.5, 48), polygon, details, max_tilt=0)


def _box() -> Shape:
    outline = rectangle(-0.5, -0.5, 0.5, 0.5)
    details = (
        Detail(rectangle(-0.5, -0.5, 0.5, -0.22), "dim"),
        Detail(rectangle(-0.1, -0.5, 0.1, 0.5), "mark"),
    )
    return Shape(outline, outline, details, aspect=1.1, max_tilt=10)


def _star() -> Shape:
    angles = -math.pi / 2 + np.arange(10) * math.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 0.52, 0.23)
    outline = np.stack([radii * np.cos(angles), radii * np.sin(angles) + 0.03], axis=1)
    inner = outline * 0.45 + np.array([0.0, 0.015])
    return Shape(outline, outline, (Detail(inner, "shine"),), max_tilt=15)


def _heart() -> Shape:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x = np.sin(t) ** 3 * 0.5
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 29 - 0.08
    keep = (np.abs(x) > 0.09) | (np.abs(x) < 1e-6) | (y < 0)  # straight sides down to the tip
    outline = np.stack([x, y], axis=1)[keep]
    return Shape(
        outline, _coarse(outline), (Detail(ellipse(-0.24, -0.22, 0.1, 0.08), "shine"),), max_tilt=14
    )


def _house() -> Shape:
    outline = _points(
        (0, -0.5), (0.5, -0.05), (0.4, -0.05), (0.4, 0.5), (-0.4, 0.5), (-0.4, -0.05), (-0.5, -0.05)
    )
    details = (
        Detail(_points((0, -0.5), (0.5, -0.05), (-0.5, -0.05)), "mark"),
        Detail(rectangle(-0.09, 0.14, 0.11, 0.5), "mark"),
        Detail(rectangle(-0.31, 0.08, -0.15, 0.26), "glass"),
        Detail(rectangle(0.17, 0.08, 0.32, 0.26), "glass"),
    )
    return Shape(outline, outline, details, aspect=1.05, max_tilt=6)


def _tree() -> Shape:
    outline = _points(
        (0, -0.5), (0.34, -0.08), (0.2, -0.08), (0.5, 0.28), (0.12, 0.28), (0.12, 0.5),
        (-0.12, 0.5), (-0.12, 0.28), (-0.5, 0.28), (-0.2, -0.08), (-0.34, -0.08),
    )  # fmt: skip
    details = (
        Detail(rectangle(-0.12, 0.28, 0.12, 0.5), "wood"),
        Detail(_points((-0.2, -0.08), (0.2, -0.08), (0.28, 0.02), (-0.28, 0.02)), "dim"),
    )
    return Shape(outline, outline, details, aspect=0.72, max_tilt=6)


def _car() -> Shape:
    body = _points(
        (-0.5, 0.02), (-0.36, -0.06), (-0.2, -0.5), (0.16, -0.5), (0.34, -0.04), (0.5, 0.06),
        (0.5, 0.3), (-0.5, 0.3),
    )  # fmt: skip
    wheels = (ellipse(-0.27, 0.28, 0.13, 0.22), ellipse(0.27, 0.28, 0.13, 0.22))
    outline = _union(body, *wheels)
    details = (
        Detail(_points((-0.27, -0.06), (-0.16, -0.38), (-0.05, -0.38), (-0.05, -0.06)), "glass"),
        Detail(_points((0.01, -0.06), (0.01, -0.38), (0.12, -0.38), (0.25, -0.06)), "glass"),
        *(Detail(wheel, "tyre") for wheel in wheels),
        Detail(ellipse(-0.27, 0.28, 0.055, 0.09), "hub"),
        Detail(ellipse(0.27, 0.28, 0.055, 0.09), "hub"),
    )
    return Shape(outline, _coarse(outline), details, aspect=1.75, max_tilt=8, mirrors=True)


def _fish() -> Shape:
    outline = _union(
        ellipse(0.1, 0, 0.4, 0.36, 48),
        _points((-0.16, 0), (-0.5, -0.38), (-0.42, 0), (-0.5, 0.38)),
        _points((-0.08, -0.3), (0.02, -0.5), (0.24, -0.3)),
    )
    details = (
        Detail(_points((-0.02, 0.02), (-0.2, 0.16), (0.02, 0.22), (0.08, 0.1)), "mark"),
        Detail(ellipse(0.32, -0.09, 0.07, 0.1), "hub"),
        Detail(ellipse(0.335, -0.09, 0.035, 0.055), "tyre"),
    )
    return Shape(outline, _coarse(outline), details, aspect=1.55, max_tilt=18, mirrors=True)


def _cup() -> Shape:
    bowl = _points((-0.5, -0.5), (0.26, -0.5), (0.18, 0.5), (-0.42, 0.5))
    outline = _union(bowl, ellipse(0.24, -0.06, 0.26, 0.27, 40))
    details = (
        Detail(ellipse(0.3, -0.06, 0.1, 0.13), "hole"),
        Detail(_points((-0.5, -0.5), (0.26, -0.5), (0.245, -0.34), (-0.485, -0.34)), "mark"),
        Detail(_points((-0.4, -0.26), (-0.3, -0.26), (-0.27, 0.34), (-0.35, 0.34)), "shine"),
    )
    return Shape(outline, _coarse(outline), details, aspect=1.05, max_tilt=8, mirrors=True)


def _moon() -> Shape:
    t_out = np.linspace(math.radians(50), math.radians(310), 40)
    outer = np.stack([0.5 * np.cos(t_out), 0.5 * np.sin(t_out)], axis=1)
    tip_x, tip_y = outer[-1]
    inner_x, radius = 0.33, math.hypot(tip_x - 0.33, tip_y)
    start = math.atan2(tip_y, tip_x - inner_x) % (2 * math.pi)
    t_in = np.linspace(start, 2 * math.pi - start, 24)[1:-1]
    inner = np.stack([inner_x + radius * np.cos(t_in), radius * np.sin(t_in)], axis=1)
    outline = (np.concatenate([outer, inner]) + np.array([0.09, 0.0])) * np.array([1.2, 1.0])
    details = (
        Detail(ellipse(-0.32, -0.1, 0.07, 0.06), "dim"),
        Detail(ellipse(-0.2, 0.2, 0.06, 0.05), "dim"),
    )
    return Shape(outline, _coarse(outline), details, aspect=0.8, max_tilt=22, mirrors=True)


def _flower() -> Shape:
    angles = -math.pi / 2 + np.arange(5) * 2 * math.pi / 5
    petals = [ellipse(0.29 * math.cos(a), 0.29 * math.sin(a), 0.21, 0.21) for a in angles]
    outline = _union(ellipse(0, 0, 0.26, 0.26), *petals)
    tips = np.stack([0.5 * np.cos(angles), 0.5 * np.sin(angles)], axis=1)
    gaps = np.stack([0.36 * np.cos(angles + 0.628), 0.36 * np.sin(angles + 0.628)], axis=1)
    polygon = np.stack([tips, gaps], axis=1).reshape(-1, 2)
    details = (Detail(ellipse(0, 0, 0.15, 0.15), "core"),)
    return Shape(outline, polygon, details, max_tilt=18)


def _arrow() -> Shape:
    outline = _points(
        (-0.5, -0.2), (0.06, -0.2), (0.06, -0.5), (0.5, 0), (0.06, 0.5), (0.06, 0.2), (-0.5, 0.2)
    )
    detail = Detail(_points((-0.42, -0.1), (0.1, -0.1), (0.1, -0.02), (-0.42, -0.02)), "shine")
    return Shape(
        outline, outline, (detail,), aspect=1.4, max_tilt=12, turns=(0.0, 90.0, 180.0, 270.0)
    )


@lru_cache(maxsize=1)
def shapes() -> dict[str, Shape]:
    """Every kind's shape, made once."""
    return {
        "ball": _ball(),
        "box": _box(),
        "star": _star(),
        "heart": _heart(),
        "house": _house(),
        "tree": _tree(),
        "car": _car(),
        "fish": _fish(),
        "cup": _cup(),
        "moon": _moon(),
        "flower": _flower(),
        "arrow": _arrow(),
    }


def _boat() -> Shape:
    hull = _points((-0.5, 0.16), (0.5, 0.16), (0.3, 0.5), (-0.32, 0.5))
    sail = _points((-0.02, -0.5), (0.42, 0.08), (-0.02, 0.08))
    jib = _points((-0.08, -0.36), (-0.08, 0.08), (-0.36, 0.08))
    mast = rectangle(-0.1, -0.5, 0.0, 0.2)
    outline = _union(hull, sail, jib, mast)
    details = (
        Detail(sail, "shine"),
        Detail(jib, "dim"),
        Detail(rectangle(-0.08, -0.5, -0.02, 0.16), "wood"),
        Detail(_points((-0.45, 0.24), (0.45, 0.24), (0.42, 0.32), (-0.42, 0.32)), "mark"),
    )
    return Shape(outline, _coarse(outline), details, aspect=1.0, max_tilt=10, mirrors=True)


EXTRA_KINDS: Final = ("boat",)
"""Kinds that the demo checkpoint was not taught: in none of its scenes, for training it further."""


@lru_cache(maxsize=1)
def _extra_shapes() -> dict[str, Shape]:
    return dict(zip(EXTRA_KINDS, (_boat(),), strict=True))


def shape_of(kind: str) -> Shape:
    """The shape of one of the twelve kinds, or of an extra one."""
    return shapes().get(kind) or _extra_shapes()[kind]

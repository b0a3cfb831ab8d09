"""A drawn scene as data: what stands where, with exact truth, made from a seed.

Coordinates are fractions 0..1 of the image (x of its width, y of its height) unless a name says
otherwise. ``drawing.draw_scene`` turns a scene into pixels, ``truth`` and ``examples`` into text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from florence2.opencv import cv2
from florence2_demo import geometry, signs
from florence2_demo.geometry import FractionBox, Points, PointsXy, Pose, Size
from florence2_demo.lexicon import BACKGROUND_COLOURS, COLOURS, KINDS, PATTERNS
from florence2_demo.palette import (
    BLACK,
    WHITE,
    Rgb,
    background_shade,
    luminance,
    mixed,
    object_shade,
)
from florence2_demo.shapes import Shape, shapes
from florence2_demo.signs import TextLine

MIN_VISIBLE: Final = 0.62
MAX_OBJECTS: Final = 6
_COUNT_WEIGHTS: Final = (0.24, 0.26, 0.22, 0.14, 0.08, 0.06)
_ASPECTS: Final = ((1.0, 0.4), (4 / 3, 0.3), (3 / 2, 0.15), (3 / 4, 0.15))
_LONG_SIDES_PX: Final = (288, 320, 352, 384)
_LARGEST_EXTENT: Final = (0.6, 0.52, 0.45, 0.4, 0.36, 0.33)
_ATTEMPTS: Final = 24
_MAP_LONG_SIDE_PX: Final = 192


@dataclass(frozen=True, slots=True)
class Background:
    """Two shades of one named colour in a pattern.

    ``period`` is the pattern's repeat as a fraction of the image's height; ``angle`` in radians.
    """

    colour: str
    pattern: str
    rgb: Rgb
    other_rgb: Rgb
    period: float
    angle: float
    seed: int


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One thing. ``box_xyxy`` is the tight box of its full shape, clipped to the image.

    ``outline_xy`` is the dense outline of the full shape clipped to the image (truth for masks),
    ``polygon_xy`` the same with at most 12 points in the order that answers spell.
    ``visible`` is the share of the full shape that neither the border nor other things hide.
    ``shading`` 0..1 is how much darker its bottom is painted than its top.
    """

    kind: str
    colour: str
    rgb: Rgb
    box_xyxy: FractionBox
    outline_xy: PointsXy
    polygon_xy: PointsXy
    pose: Pose
    visible: float
    shading: float

    @property
    def centre_xy(self) -> tuple[float, float]:
        """The centre of the box."""
        x1, y1, x2, y2 = self.box_xyxy
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def name(self) -> str:
        """Colour and kind: "red car"."""
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True, slots=True)
class Finish:
    """What light and camera do: ``light`` 0..1 falls off along ``light_angle`` (radians),
    ``noise`` is a standard deviation in grey levels, ``blur`` in fractions of the short side.
    """

    light: float
    light_angle: float
    noise: float
    blur: float
    seed: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture to draw. ``objects`` are ordered back to front, ``texts`` top to bottom."""

    seed: int
    size_wh: Size
    background: Background
    objects: tuple[SceneObject, ...]
    texts: tuple[TextLine, ...]
    finish: Finish


def make_scene(seed: int, *, max_objects: int = MAX_OBJECTS, size_wh: Size | None = None) -> Scene:
    """The scene of a seed: always the same for the same arguments."""
    rng = np.random.default_rng([seed, 0xF10])
    size = size_wh or _random_size(rng)
    background = _make_background(str(rng.choice(BACKGROUND_COLOURS)), rng)
    texts = signs.make_texts(rng, size)
    weights = np.array(_COUNT_WEIGHTS[: max(1, min(max_objects, MAX_OBJECTS))])
    count = int(rng.choice(len(weights), p=weights / weights.sum())) + 1
    objects = _make_objects(rng, size, count, background.colour, texts)
    return Scene(seed, size, background, objects, texts, _make_finish(rng))


def _make_background(colour: str, rng: np.random.Generator) -> Background:
    """A random background of a named colour."""
    rgb = background_shade(colour, rng)
    share = float(rng.uniform(0.07, 0.16))
    lighter = luminance(rgb) < 90 or (luminance(rgb) < 205 and rng.random() < 0.5)
    return Background(
        colour=colour,
        pattern=str(rng.choice(PATTERNS)),
        rgb=rgb,
        other_rgb=mixed(rgb, WHITE if lighter else BLACK, share),
        period=float(rng.uniform(0.1, 0.3)),
        angle=float(rng.uniform(0, math.pi)),
        seed=int(rng.integers(1 << 31)),
    )


def _random_size(rng: np.random.Generator) -> Size:
    ratios, weights = zip(*_ASPECTS, strict=True)
    aspect = float(rng.choice(ratios, p=weights))
    long_side = int(rng.choice(_LONG_SIDES_PX))
    if aspect >= 1:
        return long_side, round(long_side / aspect)
    return round(long_side * aspect), long_side


def _make_finish(rng: np.random.Generator) -> Finish:
    rough = rng.random() < 0.5
    return Finish(
        light=float(rng.uniform(0, 0.35)) if rng.random() < 0.5 else 0.0,
        light_angle=float(rng.uniform(0, 2 * math.pi)),
        noise=float(rng.uniform(1, 9)) if rough else 0.0,
        blur=float(rng.uniform(0, 0.004)) if rough else 0.0,
        seed=int(rng.integers(1 << 31)),
    )


class _CoverMap:
    """Which placed shape is on top at each point of a small raster of the image."""

    def __init__(self, image_wh: Size) -> None:
        scale = _MAP_LONG_SIDE_PX / max(image_wh)
        self._size_wh = (round(image_wh[0] * scale), round(image_wh[1] * scale))
        self._owner: NDArray[np.uint8] = np.zeros(self._size_wh[::-1], np.uint8)
        self._pixels_per_share: list[float] = []

    def try_add(self, outline: Points, min_visible: float) -> bool:
        """Put a shape on top if it and all below stay visible by ``min_visible`` (0..1).

        ``outline`` is the full shape; its part outside the image counts as not visible.
        """
        clipped = geometry.clip_to_image(outline)
        inside = (
            abs(geometry.area(clipped)) / abs(geometry.area(outline)) if len(clipped) >= 3 else 0.0
        )
        if inside < min_visible:
            return False
        owner = self._owner.copy()
        index = len(self._pixels_per_share) + 1
        cv2.fillPoly(
            owner,
            [geometry.to_subpixels(outline, self._size_wh)],
            index,
            shift=geometry.SUBPIXEL_BITS,
        )
        counts = np.bincount(owner.ravel(), minlength=index + 1)
        if counts[index] == 0:
            return False
        for below, whole in enumerate(self._pixels_per_share, start=1):
            if counts[below] < min_visible * whole:
                return False
        self._owner = owner
        self._pixels_per_share.append(float(counts[index]) / inside)
        return True

    def visible_shares(self) -> list[float]:
        """The visible share 0..1 of each shape, in the order of adding."""
        counts = np.bincount(self._owner.ravel(), minlength=len(self._pixels_per_share) + 1)
        return [
            min(1.0, float(counts[index]) / whole)
            for index, whole in enumerate(self._pixels_per_share, start=1)
        ]


def _make_objects(
    rng: np.random.Generator,
    size_wh: Size,
    count: int,
    background_colour: str,
    texts: tuple[TextLine, ...],
) -> tuple[SceneObject, ...]:
    colours = [colour for colour in COLOURS if colour != background_colour]
    min_visible = 0.97 if rng.random() < 0.45 else MIN_VISIBLE
    cover = _CoverMap(size_wh)
    placed: list[SceneObject] = []
    for _ in range(count):
        kind, colour = str(rng.choice(KINDS)), str(rng.choice(colours))
        if placed and rng.random() < 0.35:
            example = placed[int(rng.integers(len(placed)))]
            kind = example.kind
            colour = example.colour if rng.random() < 0.6 else colour
        made = _place(rng, size_wh, kind, colour, count, cover, min_visible, placed, texts)
        if made is not None:
            placed.append(made)
    if not placed:
        return _make_objects(rng, size_wh, count, background_colour, texts)
    shares = cover.visible_shares()
    return tuple(replace(thing, visible=share) for thing, share in zip(placed, shares, strict=True))


def _place(
    rng: np.random.Generator,
    size_wh: Size,
    kind: str,
    colour: str,
    count: int,
    cover: _CoverMap,
    min_visible: float,
    placed: list[SceneObject],
    texts: tuple[TextLine, ...],
) -> SceneObject | None:
    """One object on top of those placed so far, or None where no free place was found."""
    shape = shapes()[kind]
    largest = _LARGEST_EXTENT[count - 1]
    for attempt in range(_ATTEMPTS):
        shrink = 1 - 0.6 * attempt / _ATTEMPTS
        pose = _random_pose(rng, shape, size_wh, largest * shrink, may_leave=min_visible < 0.9)
        outline = geometry.posed(shape.outline, pose, size_wh)
        clipped = geometry.clip_to_image(outline)
        if len(clipped) < 3:
            continue
        box = geometry.tight_box(clipped)
        if any(geometry.boxes_touch(box, geometry.tight_box(np.array(t.plate_xy))) for t in texts):
            continue
        if any(o.kind == kind and geometry.box_iou(o.box_xyxy, box) > 0.2 for o in placed):
            continue
        if not cover.try_add(outline, min_visible):
            continue
        rgb = object_shade(colour, rng)
        strongest = 0.12 if colour == "white" else 0.4
        shading = float(rng.uniform(0, strongest)) if rng.random() < 0.6 else 0.0
        polygon = geometry.clip_to_image(geometry.posed(shape.polygon, pose, size_wh))
        return SceneObject(
            kind, colour, rgb, box, geometry.as_pairs(clipped), geometry.answer_polygon(polygon),
            pose, 1.0, shading,
        )  # fmt: skip
    return None


def _random_extent(rng: np.random.Generator, largest: float) -> float:
    """An object's mean side as a fraction of the short side; few below 10 %."""
    smallest = 0.065 if rng.random() < 0.1 else 0.13
    return math.exp(rng.uniform(math.log(smallest), math.log(max(largest, smallest * 1.2))))


def _random_pose(
    rng: np.random.Generator, shape: Shape, size_wh: Size, largest: float, *, may_leave: bool
) -> Pose:
    extent = _random_extent(rng, largest)
    stretch = math.sqrt(shape.aspect * math.exp(rng.uniform(-0.12, 0.12)))
    tilt = rng.uniform(-shape.max_tilt, shape.max_tilt)
    angle = math.radians(float(rng.choice(shape.turns)) + tilt)
    mirrored = shape.mirrors and rng.random() < 0.5
    centred = Pose((0.0, 0.0), (extent * stretch, extent / stretch), angle, mirrored)
    points: Points = geometry.posed(shape.outline, centred, size_wh)
    low, high = points.min(axis=0), points.max(axis=0)
    span = high - low
    slack = 0.22 * span if may_leave and rng.random() < 0.25 else -0.01 * np.ones(2)
    first, last = -low - slack, 1 - high + slack
    centre = first + rng.random(2) * np.maximum(last - first, 0)
    return Pose((float(centre[0]), float(centre[1])), centred.extent_wh, angle, mirrored)

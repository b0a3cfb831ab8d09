"""A drawn scene as data: what stands where, with exact truth, made from a seed.

Coordinates are fractions 0..1 of the image (x of its width, y of its height) unless a name says
otherwise. ``drawing.draw_scene`` turns a scene into pixels, ``truth`` and ``examples`` into text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from florence2.records import SizeWh
from florence2_demo import geometry, signs
from florence2_demo.geometry import FractionBox, Points, PointsXy, Pose
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
from florence2_demo.shapes import Shape, shape_of
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
    size_wh: SizeWh
    background: Background
    objects: tuple[SceneObject, ...]
    texts: tuple[TextLine, ...]
    finish: Finish


def make_scene(
    seed: int,
    *,
    max_objects: int = MAX_OBJECTS,
    size_wh: SizeWh | None = None,
    kinds: Sequence[str] = KINDS,
) -> Scene:
    """The scene of a seed: always the same for the same arguments.

    Things are of ``kinds``, those named more often more often; see ``shapes.EXTRA_KINDS`` too.
    """
    rng = np.random.default_rng([seed, 0xF10])
    size = size_wh or _random_size(rng)
    background = _make_background(str(rng.choice(BACKGROUND_COLOURS)), rng)
    texts = signs.make_texts(rng, size)
    weights = np.array(_COUNT_WEIGHTS[: max(1, min(max_objects, MAX_OBJECTS))])
    count = int(rng.choice(len(weights), p=weights / weights.sum())) + 1
    objects = _make_objects(rng, size, count, background.colour, texts, kinds)
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


def _random_size(rng: np.random.Generator) -> SizeWh:
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


def _make_objects(
    rng: np.random.Generator,
    size_wh: SizeWh,
    count: int,
    background_colour: str,
    texts: tuple[TextLine, ...],
    kinds: Sequence[str],
) -> tuple[SceneObject, ...]:
    colours = [colour for colour in COLOURS if colour != background_colour]
    arrangement = _Arrangement(rng, size_wh, texts)
    placed = arrangement.placed
    for _ in range(count):
        kind, colour = str(rng.choice(kinds)), str(rng.choice(colours))
        if placed and rng.random() < 0.35:
            example = placed[int(rng.integers(len(placed)))]
            kind = example.kind
            colour = example.colour if rng.random() < 0.6 else colour
        arrangement.add(kind, colour, _LARGEST_EXTENT[count - 1])
    if not placed:
        return _make_objects(rng, size_wh, count, background_colour, texts, kinds)
    shares = arrangement.visible_shares()
    return tuple(replace(thing, visible=share) for thing, share in zip(placed, shares, strict=True))


class _Arrangement:
    """Objects one on top of the other, all of them visible enough, and none on a text.

    A small raster of the image says which of them is on top at each point.
    """

    def __init__(
        self, rng: np.random.Generator, size_wh: SizeWh, texts: tuple[TextLine, ...]
    ) -> None:
        self.placed: list[SceneObject] = []
        self._rng = rng
        self._size_wh = size_wh
        self._text_boxes = [geometry.tight_box(np.array(line.plate_xy)) for line in texts]
        self._min_visible = 0.97 if rng.random() < 0.45 else MIN_VISIBLE
        scale = _MAP_LONG_SIDE_PX / max(size_wh)
        self._map_wh = (round(size_wh[0] * scale), round(size_wh[1] * scale))
        self._owner: NDArray[np.uint8] = np.zeros(self._map_wh[::-1], np.uint8)
        self._whole_px: list[float] = []

    def add(self, kind: str, colour: str, largest: float) -> None:
        """One object on top of those placed so far, unless no free place is found for it."""
        rng, size_wh, shape = self._rng, self._size_wh, shape_of(kind)
        for attempt in range(_ATTEMPTS):
            shrink = 1 - 0.6 * attempt / _ATTEMPTS
            may_leave = self._min_visible < 0.9
            pose = _random_pose(rng, shape, size_wh, largest * shrink, may_leave=may_leave)
            outline = geometry.posed(shape.outline, pose, size_wh)
            clipped = geometry.clip_to_image(outline)
            if len(clipped) < 3 or not self._is_free(kind, geometry.tight_box(clipped)):
                continue
            if not self._cover(outline, abs(geometry.area(clipped)) / abs(geometry.area(outline))):
                continue
            rgb = object_shade(colour, rng)
            strongest = 0.12 if colour == "white" else 0.4
            polygon = geometry.clip_to_image(geometry.posed(shape.polygon, pose, size_wh))
            self.placed.append(
                SceneObject(
                    kind,
                    colour,
                    rgb,
                    geometry.tight_box(clipped),
                    geometry.as_pairs(clipped),
                    geometry.answer_polygon(polygon),
                    pose,
                    visible=1.0,
                    shading=float(rng.uniform(0, strongest)) if rng.random() < 0.6 else 0.0,
                )
            )
            return

    def _is_free(self, kind: str, box: FractionBox) -> bool:
        """Whether a box is apart from all texts, and mostly apart from things of its own kind."""
        alike = [thing.box_xyxy for thing in self.placed if thing.kind == kind]
        return not any(geometry.boxes_touch(box, text) for text in self._text_boxes) and not any(
            geometry.box_iou(other, box) > 0.2 for other in alike
        )

    def _cover(self, outline: Points, inside: float) -> bool:
        """Puts a full shape on top if it and all below stay visible enough.

        ``inside`` is the share of it that lies in the image; the rest counts as not visible.
        """
        if inside < self._min_visible:
            return False
        owner = self._owner.copy()
        index = len(self._whole_px) + 1
        geometry.fill_polygon(owner, outline * self._map_wh, index)
        counts = np.bincount(owner.ravel(), minlength=index + 1)
        below = enumerate(self._whole_px, start=1)
        if counts[index] == 0 or any(counts[n] < self._min_visible * whole for n, whole in below):
            return False
        self._owner = owner
        self._whole_px.append(float(counts[index]) / inside)
        return True

    def visible_shares(self) -> list[float]:
        """The visible share 0..1 of each object, in the order of adding."""
        counts = np.bincount(self._owner.ravel(), minlength=len(self._whole_px) + 1)
        return [
            min(1.0, float(counts[index]) / whole)
            for index, whole in enumerate(self._whole_px, start=1)
        ]


def _random_extent(rng: np.random.Generator, largest: float) -> float:
    """An object's mean side as a fraction of the short side; few below 10 %."""
    smallest = 0.065 if rng.random() < 0.1 else 0.13
    return math.exp(rng.uniform(math.log(smallest), math.log(max(largest, smallest * 1.2))))


def _random_pose(
    rng: np.random.Generator, shape: Shape, size_wh: SizeWh, largest: float, *, may_leave: bool
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

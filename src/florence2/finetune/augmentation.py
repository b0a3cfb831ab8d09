"""Images changed at random, with the boxes and outlines of their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from PIL import Image, ImageEnhance

from florence2.errors import RequestError, unknown_name
from florence2.labeled.records import LabeledImage, LabeledObject, Ring

AUGMENTATIONS: Final = ("flip", "crop", "colour")

_MIN_SIDE: Final = 0.6
"""A crop keeps at least this part of each side."""
_MIN_SEEN: Final = 0.35
"""A thing of whose box less than this is left is not labeled any more."""
_CHANGE: Final = 0.25
"""Brightness, contrast and saturation change by at most so much."""


def parse_augmentations(text: str) -> tuple[str, ...]:
    """The ways named in ``flip,crop``, or none for ``none``; RequestError for an unknown one."""
    named = [part.strip().lower() for part in text.split(",") if part.strip()]
    if named in (["none"], []):
        return ()
    for name in named:
        if name not in AUGMENTATIONS:
            raise RequestError(unknown_name("augmentation", name, (*AUGMENTATIONS, "none")))
    return tuple(name for name in AUGMENTATIONS if name in named)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Which changes are made.

    ``has_text`` says that tasks ask for what is written; ``caption_tags`` are the tags of an image
    whose sentences are taught, which may say where something is.
    """

    kinds: tuple[str, ...]
    has_text: bool = False
    caption_tags: frozenset[str] = frozenset()

    def apply(
        self, picture: Image.Image, image: LabeledImage, rng: np.random.Generator
    ) -> tuple[Image.Image, LabeledImage]:
        """An upright RGB picture and its labels, changed alike.

        Text is not mirrored, and where answers are kept as they are written (pairs and captions)
        nothing moves, because what they say of places would no longer be true.
        """
        is_described = any(image.tags.get(name) for name in self.caption_tags)
        may_move = not image.answers and not is_described
        is_read = self.has_text and any(thing.texts.get("text") for thing in image.objects)
        # Drawn whether used or not, so that a step sees the same numbers with other settings.
        flips, crops = rng.random() < 0.5, rng.random() < 0.5
        corners, changes = rng.random(4), rng.uniform(1 - _CHANGE, 1 + _CHANGE, 3)
        if "crop" in self.kinds and crops and may_move and not is_read:
            picture, image = cropped(picture, image, _crop_box(corners, picture.size))
        if "flip" in self.kinds and flips and may_move and not is_read:
            picture, image = mirrored(picture, image)
        if "colour" in self.kinds:
            picture = _recoloured(picture, changes)
        return picture, image


def mirrored(picture: Image.Image, image: LabeledImage) -> tuple[Image.Image, LabeledImage]:
    """Left and right exchanged."""
    width = image.size_wh[0]

    def mirror(thing: LabeledObject) -> LabeledObject:
        x1, y1, x2, y2 = thing.box_xyxy
        rings = tuple(_mapped(ring, lambda x, y: (width - x, y)) for ring in thing.rings_xy)
        return replace(thing, box_xyxy=(width - x2, y1, width - x1, y2), rings_xy=rings)

    turned = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    objects, crowds = (tuple(map(mirror, things)) for things in (image.objects, image.crowds))
    return turned, replace(image, objects=objects, crowds=crowds)


def cropped(
    picture: Image.Image, image: LabeledImage, box_xyxy: tuple[int, int, int, int]
) -> tuple[Image.Image, LabeledImage]:
    """The part of a picture within a box in whole pixels.

    Things are cut at its edges; those of which little is left are no longer labeled.
    """
    left, top, right, bottom = box_xyxy
    size_wh = (right - left, bottom - top)

    def kept(things: Iterable[LabeledObject]) -> tuple[LabeledObject, ...]:
        cut = (_cut(thing, left, top, size_wh) for thing in things)
        return tuple(thing for thing in cut if thing is not None)

    objects, crowds = kept(image.objects), kept(image.crowds)
    return picture.crop(box_xyxy), replace(image, size_wh=size_wh, objects=objects, crowds=crowds)


def _crop_box(
    corners: np.ndarray[tuple[int, ...], np.dtype[np.float64]], size_wh: tuple[int, int]
) -> tuple[int, int, int, int]:
    """A box of random size and place from four numbers in 0..1."""
    sides = _MIN_SIDE + (1 - _MIN_SIDE) * corners[:2]
    starts = corners[2:] * (1 - sides)
    x1, y1 = (int(start * size) for start, size in zip(starts, size_wh, strict=True))
    x2, y2 = (
        max(round((start + side) * size), first + 1)
        for start, side, size, first in zip(starts, sides, size_wh, (x1, y1), strict=True)
    )
    return x1, y1, min(x2, size_wh[0]), min(y2, size_wh[1])


def _cut(
    thing: LabeledObject, left: int, top: int, size_wh: tuple[int, int]
) -> LabeledObject | None:
    x1, y1, x2, y2 = thing.box_xyxy
    whole = (x2 - x1) * (y2 - y1)
    width, height = size_wh
    inside = (
        min(max(x1 - left, 0.0), width),
        min(max(y1 - top, 0.0), height),
        min(max(x2 - left, 0.0), width),
        min(max(y2 - top, 0.0), height),
    )
    seen = (inside[2] - inside[0]) * (inside[3] - inside[1])
    if whole <= 0 or seen < _MIN_SEEN * whole:
        return None
    if not thing.rings_xy:
        return replace(thing, box_xyxy=inside)
    moved = (_mapped(ring, lambda x, y: (x - left, y - top)) for ring in thing.rings_xy)
    rings = tuple(ring for one in moved if len(ring := clipped_ring(one, size_wh)) >= 6)
    if not rings:
        return None
    # What is left of an outline may reach less far than what is left of its box.
    xs = [value for ring in rings for value in ring[0::2]]
    ys = [value for ring in rings for value in ring[1::2]]
    return replace(thing, box_xyxy=(min(xs), min(ys), max(xs), max(ys)), rings_xy=rings)


def clipped_ring(ring: Ring, size_wh: tuple[int, int]) -> Ring:
    """The part of an outline on an image (Sutherland and Hodgman); empty where none is."""
    points = list(zip(ring[0::2], ring[1::2], strict=True))
    for axis, limit, keeps_below in (
        (0, 0.0, False),
        (0, float(size_wh[0]), True),
        (1, 0.0, False),
        (1, float(size_wh[1]), True),
    ):
        points = list(_half(points, axis, limit, keeps_below))
    return tuple(value for point in points for value in point)


def _half(
    points: list[tuple[float, float]], axis: int, limit: float, keeps_below: bool
) -> Iterable[tuple[float, float]]:
    """The points of a polygon on one side of a line, and those where its edges cross it."""
    for start, end in zip(points, [*points[1:], *points[:1]], strict=True):
        inside = [(one[axis] <= limit) == keeps_below or one[axis] == limit for one in (start, end)]
        if inside[0]:
            yield start
        if inside[0] != inside[1]:
            share = (limit - start[axis]) / (end[axis] - start[axis])
            crossing = [one + share * (other - one) for one, other in zip(start, end, strict=True)]
            crossing[axis] = limit
            yield crossing[0], crossing[1]


def _mapped(ring: Ring, move: Callable[[float, float], tuple[float, float]]) -> Ring:
    moved = (move(x, y) for x, y in zip(ring[0::2], ring[1::2], strict=True))
    return tuple(value for point in moved for value in point)


def _recoloured(
    picture: Image.Image, changes: np.ndarray[tuple[int, ...], np.dtype[np.float64]]
) -> Image.Image:
    """Brighter or darker, harder or softer, more or less colourful; no other hue."""
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind, change in zip(kinds, changes, strict=True):
        picture = kind(picture).enhance(float(change))
    return picture

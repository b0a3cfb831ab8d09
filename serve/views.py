"""The parts of an image that are looked at on their own: all of it, a rectangle, or tiles."""

from __future__ import annotations

from dataclasses import dataclass

from florence2.images import ImagePart, LoadedImage
from florence2.prompts import clip_region
from florence2.records import BoxXyxy
from serve.settings.model import Tiling
from serve.tiles import plan_tiles


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Pixels ``box_xyxy`` of an image as a picture of its own."""

    picture: LoadedImage
    box_xyxy: tuple[int, int, int, int]

    @property
    def offset_xy(self) -> tuple[int, int]:
        """Where its top left corner lies in the image."""
        return self.box_xyxy[0], self.box_xyxy[1]


def views_of(
    picture: LoadedImage, rectangle: BoxXyxy | None, tiling: Tiling | None
) -> tuple[View, ...]:
    """The views of a picture, those of the whole first.

    Raises RequestError for a ``rectangle`` that lies outside the image.
    """
    whole = (0, 0, *picture.size_wh)
    area = whole if rectangle is None else _inside(rectangle, picture)
    if tiling is None:
        return (_cut(picture, area),)
    left, top, right, bottom = area
    tiles = [
        (x1 + left, y1 + top, x2 + left, y2 + top)
        for x1, y1, x2, y2 in plan_tiles(
            (right - left, bottom - top), tiling.size_wh, tiling.overlap_wh
        )
    ]
    boxes = tiles if len(tiles) == 1 or not tiling.full_image else [area, *tiles]
    return tuple(_cut(picture, box) for box in boxes)


def _inside(rectangle: BoxXyxy, picture: LoadedImage) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = clip_region(rectangle, picture.size_wh, "A rectangle")
    left, top = round(x1), round(y1)
    return left, top, max(round(x2), left + 1), max(round(y2), top + 1)


def _cut(picture: LoadedImage, box: tuple[int, int, int, int]) -> View:
    if box == (0, 0, *picture.size_wh):
        return View(picture, box)
    return View(ImagePart(picture, box), box)

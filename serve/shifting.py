"""Answers about a part of an image, placed in the image. Every geometry moves, none is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from florence2.records import Box, Object, Polygon, Quad, Region, Result, SizeWh
from serve.label_rules import Answered

OffsetXy = tuple[float, float]


def moved(result: Result, offset_xy: OffsetXy, size_wh: SizeWh) -> Result:
    """``result`` of a crop whose top left pixel is ``offset_xy`` of an image of ``size_wh``.

    The objects of all steps move too. ``answer`` stays what the model said: its location tokens
    are places in the crop.
    """
    return replace(
        result,
        size_wh=size_wh,
        objects=tuple(_moved_object(found, offset_xy) for found in result.objects),
        steps=tuple(moved(step, offset_xy, size_wh) for step in result.steps),
    )


def moved_answer(answered: Answered, offset_xy: OffsetXy, size_wh: SizeWh) -> Answered:
    """An answer with its region, which is one of the crop, moved as in ``moved``."""
    region = answered.region
    if region is not None:
        region = moved_region(region, offset_xy)
    return replace(answered, result=moved(answered.result, offset_xy, size_wh), region=region)


def moved_region(region: Region, offset_xy: OffsetXy) -> Region:
    x1, y1, x2, y2 = region.box_xyxy
    dx, dy = offset_xy
    return Region((x1 + dx, y1 + dy, x2 + dx, y2 + dy))


def _moved_object(found: Object, offset_xy: OffsetXy) -> Object:
    dx, dy = offset_xy
    if isinstance(found, Box):
        x1, y1, x2, y2 = found.box_xyxy
        return replace(found, box_xyxy=(x1 + dx, y1 + dy, x2 + dx, y2 + dy))
    if isinstance(found, Quad):
        x1, y1, x2, y2, x3, y3, x4, y4 = found.quad_xy
        corners = (x1 + dx, y1 + dy, x2 + dx, y2 + dy, x3 + dx, y3 + dy, x4 + dx, y4 + dy)
        return replace(found, quad_xy=corners)
    if isinstance(found, Polygon):
        return replace(
            found, rings_xy=tuple(_moved_ring(ring, offset_xy) for ring in found.rings_xy)
        )
    return found


def _moved_ring(ring_xy: Sequence[float], offset_xy: OffsetXy) -> tuple[float, ...]:
    return tuple(value + offset_xy[place % 2] for place, value in enumerate(ring_xy))

"""Labels that are on an image already, as regions to ask about."""

from __future__ import annotations

import math
from dataclasses import dataclass

from florence2.prompts import region_on_image
from florence2.records import Region
from serve.predict.geometry import box_xyxy_from_rectangle_tlbr
from serve.sdk import sly


@dataclass(frozen=True, slots=True)
class LabelRegion:
    """Where a label is. ``label_index`` counts ``annotation.labels``; ``figure_id`` is the
    platform's own, None for a label that was never there."""

    label_index: int
    figure_id: int | None
    region: Region


def regions_from_annotation(annotation: sly.Annotation) -> list[LabelRegion]:
    """The outer box of every label's shape, in float pixels inside the image.

    A label whose shape the SDK cannot place, or that lies outside the image, is left out. An
    annotation without a size, as of an image that is only linked, does not cut off any.
    """
    height, width = (math.inf if side is None else side for side in annotation.img_size)
    return [
        LabelRegion(index, label.geometry.sly_id, region)
        for index, label in enumerate(annotation.labels)
        if (region := _region(label.geometry, (width, height))) is not None
    ]


def _region(
    geometry: sly.geometry.geometry.Geometry, size_wh: tuple[float, float]
) -> Region | None:
    if isinstance(geometry, sly.AnyGeometry):
        return None
    box = geometry.to_bbox()
    x1, y1, x2, y2 = box_xyxy_from_rectangle_tlbr((box.top, box.left, box.bottom, box.right))
    return region_on_image((x1, y1, x2, y2), size_wh)

"""One object, one label: of several finds on the same object the surest stays.

Shapes are compared by their outer boxes. That is exact for boxes; outlines of two objects that
interlock, with nearly one outer box, would pass for one, which Florence-2's outlines hardly do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from florence2.records import BoxXyxy


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

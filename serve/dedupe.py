"""One object, one label: of several finds on the same object the surest stays.

Shapes are compared by their outer boxes. That is exact for boxes; outlines of two objects that
interlock, with nearly one outer box, would pass for one, which Florence-2's outlines hardly do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from florence2.records import BoxXyxy
from serve.geometry import containment, overlap


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
    if iou is None and containment_share is None:
        return list(range(len(finds)))
    kept: list[int] = []
    for position in sorted(range(len(finds)), key=lambda n: (-known_score(finds[n].score), n)):
        find = finds[position]
        if not any(
            _comparable(find, finds[n], across_classes)
            and is_same_box(find.box_xyxy, finds[n].box_xyxy, iou, containment_share)
            for n in kept
        ):
            kept.append(position)
    return sorted(kept)


def is_same_box(
    first: BoxXyxy, second: BoxXyxy, iou: float | None, containment_share: float | None
) -> bool:
    """Whether two boxes overlap enough to be one; boxes that share no area never do."""
    if iou is not None and 0 < overlap(first, second) >= iou:
        return True
    if containment_share is None:
        return False
    return 0 < containment(first, second) >= containment_share


def known_score(score: float | None) -> float:
    """The score, or 0 where there is none."""
    return 0.0 if score is None or math.isnan(score) else score


def _comparable(first: Find, second: Find, across_classes: bool) -> bool:
    return first.kind == second.kind and (across_classes or first.class_name == second.class_name)

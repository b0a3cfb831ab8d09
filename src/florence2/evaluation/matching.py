"""Which predicted boxes are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from florence2.evaluation.overlaps import Boxes, box_ious

_MOST_DETECTIONS: Final = 100


def keep_best(scores: Sequence[float]) -> NDArray[np.int64]:
    """The places of the 100 highest scores, highest first; COCO counts no more per image."""
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    return order[:_MOST_DETECTIONS]


def match_by_rank(ious: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    """Which predictions [n] are right, as COCO decides: ``ious`` [n, m], best score first.

    Each prediction in turn takes the free true box it overlaps most, if by ``threshold``.
    """
    right = np.zeros(len(ious), bool)
    if not ious.size:
        return right
    free = np.array(ious, np.float64)
    for place in range(len(free)):
        # COCO gives equal overlaps to the later box.
        best = free.shape[1] - 1 - int(free[place, ::-1].argmax())
        if free[place, best] >= min(threshold, 1 - 1e-10):
            right[place] = True
            free[:, best] = -1
    return right


def count_matches(
    boxes: Boxes,
    labels: Sequence[str],
    true_boxes: Boxes,
    true_labels: Sequence[str],
    threshold: float = 0.5,
) -> int:
    """How many true boxes have a prediction of their own with their label, by ``threshold``.

    Pairs are made in the order of their overlap.
    """
    ious = box_ious(boxes, true_boxes)
    same = np.array([[a == b for b in true_labels] for a in labels], bool).reshape(ious.shape)
    ious = np.where(same, ious, -1.0)
    matches = 0
    while ious.size and ious.max() >= threshold:
        row, column = np.unravel_index(int(ious.argmax()), ious.shape)
        ious[row, :] = ious[:, column] = -1.0
        matches += 1
    return matches

"""How much two places have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from florence2.opencv import cv2

Boxes = Sequence[Sequence[float]]
Ring = Sequence[float]

_RASTER: Final = 1000
_SUBPIXEL_BITS: Final = 4


def box_ious(first: Boxes, second: Boxes) -> NDArray[np.float64]:
    """Intersection over union [n, m] of boxes (x1, y1, x2, y2); 0 where a box has no area."""
    a = np.asarray(first, np.float64).reshape(-1, 1, 4)
    b = np.asarray(second, np.float64).reshape(1, -1, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.clip(sides, 0, None).prod(axis=-1)
    area_a, area_b = ((box[..., 2:] - box[..., :2]).prod(axis=-1) for box in (a, b))
    union = area_a + area_b - shared
    ious: NDArray[np.float64] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return ious


def outline_iou(first: Iterable[Ring], second: Iterable[Ring]) -> float:
    """Intersection over union of what two sets of rings cover; 0 where neither covers anything.

    A ring is (x1, y1, x2, y2, ...) in fractions of the image.
    """
    masks = [_covered(rings) for rings in (first, second)]
    union = np.count_nonzero(masks[0] | masks[1])
    return float(np.count_nonzero(masks[0] & masks[1]) / union) if union else 0.0


def _covered(rings: Iterable[Ring]) -> NDArray[np.uint8]:
    mask = np.zeros((_RASTER, _RASTER), np.uint8)
    for ring in rings:
        points = np.asarray(ring, np.float64).reshape(-1, 2) * _RASTER - 0.5
        fixed = np.round(points * (1 << _SUBPIXEL_BITS)).astype(np.int32)
        # Ring by ring: filled together, OpenCV leaves a hole where two of them overlap.
        cv2.fillPoly(mask, [fixed], (1,), shift=_SUBPIXEL_BITS)
    return mask

"""Boxes and outlines against the true ones: overlaps, matches, average precision, calibration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from florence2.evaluation.metrics import Floats
from florence2.opencv import cv2
from florence2.records import BoxXyxy

Boxes = Sequence[Sequence[float]]
Ring = Sequence[float]

COCO_DETECTIONS: Final = 100
"""COCO's average precision is of so many of the best predictions of each image and label."""
IOU_THRESHOLDS: Final = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
_RASTER: Final = 1000
_SUBPIXEL_BITS: Final = 4
_RECALLS: Final = np.linspace(0, 1, 101)
_BINS: Final = 10


def box_ious(first: Boxes, second: Boxes, *, over_first: bool = False) -> NDArray[np.float64]:
    """Intersection over union [n, m] of boxes (x1, y1, x2, y2); 0 where a box has no area.

    ``over_first``: over the area of the first box alone.
    """
    a = np.asarray(first, np.float64).reshape(-1, 1, 4)
    b = np.asarray(second, np.float64).reshape(1, -1, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.clip(sides, 0, None).prod(axis=-1)
    area_a, area_b = ((box[..., 2:] - box[..., :2]).prod(axis=-1) for box in (a, b))
    union = area_a + 0 * area_b if over_first else area_a + area_b - shared
    ious: NDArray[np.float64] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return ious


def outline_iou(first: Iterable[Ring], second: Iterable[Ring]) -> float:
    """Intersection over union of what two sets of rings cover; 0 where neither covers anything.

    A ring is (x1, y1, x2, y2, ...) in fractions of the image.
    """
    return _mask_iou(_covered(first), _covered(second))


def outline_ious(
    first: Sequence[Sequence[Ring]],
    second: Sequence[Sequence[Ring]],
    *,
    over_first: bool = False,
) -> NDArray[np.float64]:
    """The ``outline_iou`` [n, m] of each object, given by its rings, with each other one.

    ``over_first``: over what the first one covers alone.
    """
    ious = box_ious([_box_around(rings) for rings in first], [_box_around(r) for r in second])
    rows, columns = np.nonzero(ious)
    # A mask is a megabyte: those of one row and of all columns would be too many at once.
    for row in np.unique(rows):
        mask = _covered(first[row])
        for column in columns[rows == row]:
            other = _covered(second[column])
            ious[row, column] = _mask_iou(mask, mask & other if over_first else other)
    return ious


def _box_around(rings: Sequence[Ring]) -> Ring:
    xs = [x for ring in rings for x in ring[0::2]] or [0.0]
    ys = [y for ring in rings for y in ring[1::2]] or [0.0]
    return min(xs), min(ys), max(xs), max(ys)


def in_crowds(
    shares: NDArray[np.float64], matched: NDArray[np.int64], threshold: float
) -> NDArray[np.bool_]:
    """Whether each prediction [n] is neither right nor wrong: ``matched`` with nothing, and by
    ``threshold`` of its area in a crowd. ``shares`` [n, m] are those in each crowd of its label.

    As COCO decides: one crowd has room for any number.
    """
    inside = np.asarray((shares >= min(threshold, 1 - 1e-10)).any(axis=1), bool)
    return inside & (matched < 0)


def _mask_iou(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    union = np.count_nonzero(first | second)
    return float(np.count_nonzero(first & second) / union) if union else 0.0


def _covered(rings: Iterable[Ring]) -> NDArray[np.uint8]:
    mask = np.zeros((_RASTER, _RASTER), np.uint8)
    for ring in rings:
        points = np.asarray(ring, np.float64).reshape(-1, 2) * _RASTER - 0.5
        fixed = np.round(points * (1 << _SUBPIXEL_BITS)).astype(np.int32)
        # Ring by ring: filled together, OpenCV leaves a hole where two of them overlap.
        cv2.fillPoly(mask, [fixed], (1,), shift=_SUBPIXEL_BITS)
    return mask


def matched_by_rank(ious: NDArray[np.float64], threshold: float) -> NDArray[np.int64]:
    """The true box of each prediction [n], -1 for none: ``ious`` [n, m], best score first.

    As COCO decides: each prediction in turn takes the free true box that it overlaps most, if by
    ``threshold``.
    """
    matched = np.full(len(ious), -1)
    if not ious.size:
        return matched
    free = np.array(ious, np.float64)
    for place in range(len(free)):
        # COCO gives equal overlaps to the later box.
        best = free.shape[1] - 1 - int(free[place, ::-1].argmax())
        if free[place, best] >= min(threshold, 1 - 1e-10):
            matched[place] = best
            free[:, best] = -1
    return matched


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


@dataclass(frozen=True, slots=True)
class ImageBoxes:
    """What was found in one image, and what is there. Boxes in any one unit.

    ``ious`` [found, there] are the overlaps to judge by, such as those of outlines; without them
    those of the boxes are. So with ``crowd_shares`` [found, crowds]: how much of each thing found
    is in each crowd.
    """

    boxes: tuple[BoxXyxy, ...]
    labels: tuple[str, ...]
    scores: tuple[float, ...]
    true_boxes: tuple[BoxXyxy, ...]
    true_labels: tuple[str, ...]
    ious: NDArray[np.float64] | None = None
    crowd_boxes: tuple[BoxXyxy, ...] = ()
    crowd_labels: tuple[str, ...] = ()
    crowd_shares: NDArray[np.float64] | None = None

    def shares_in_crowds(self, found: Sequence[int], label: str) -> NDArray[np.float64]:
        """Those [n, m] of the things found with these numbers, in the crowds of a label."""
        own = [place for place, name in enumerate(self.crowd_labels) if name == label]
        if self.crowd_shares is not None:
            return self.crowd_shares[np.ix_(found, own)]
        crowds = [self.crowd_boxes[m] for m in own]
        return box_ious([self.boxes[n] for n in found], crowds, over_first=True)

    def overlaps(self, found: Sequence[int], there: Sequence[int]) -> NDArray[np.float64]:
        """Those [n, m] of the things found and there with these numbers."""
        if self.ious is not None:
            return self.ious[np.ix_(found, there)]
        return box_ious([self.boxes[n] for n in found], [self.true_boxes[m] for m in there])


@dataclass(frozen=True, slots=True)
class Ranking:
    """All predictions of one label [D], best score first: their scores, whether right [T, D] at
    each threshold, of which image [D]; and the number of true boxes in each image [S].

    ``overlaps`` [D] are those with the true box that each is right about by the first threshold, 0
    for wrong ones. ``ignored`` [T, D] are neither right nor wrong, as they are in a crowd; what is
    ignored at every threshold is not among the predictions.
    """

    scores: Floats
    right: NDArray[np.bool_]
    images: NDArray[np.int64]
    positives: Floats
    overlaps: Floats
    ignored: NDArray[np.bool_]

    def average_precisions(self, weights: Floats) -> Floats | None:
        """COCO's 101-point interpolation at each threshold [T]; None without true boxes."""
        positives = float(weights @ self.positives)
        if not positives:
            return None
        counts = weights[self.images]
        hits = np.cumsum(self.right * counts, axis=1)
        seen = np.cumsum(~self.ignored * counts, axis=1)
        precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
        # One more, of precision 0, for recalls that are not reached.
        envelope = np.zeros((len(hits), len(counts) + 1))
        np.maximum.accumulate(precision[:, ::-1], axis=1, out=envelope[:, -2::-1])
        recalls = hits / positives
        found = np.zeros(len(hits))
        for number, row in enumerate(recalls):
            found[number] = envelope[number].take(row.searchsorted(_RECALLS)).sum()
        return found / len(_RECALLS)


@dataclass(frozen=True, slots=True)
class MeanAveragePrecision:
    """The mean over kinds with true boxes, and over thresholds, of average precision."""

    rankings: Sequence[Ranking]

    @property
    def count(self) -> int:
        return int(sum(ranking.positives.sum() for ranking in self.rankings))

    def value(self, weights: Floats) -> float:
        found = [ranking.average_precisions(weights) for ranking in self.rankings]
        known = [precisions.mean() for precisions in found if precisions is not None]
        return float(np.mean(known)) if known else float("nan")


@dataclass(frozen=True, slots=True)
class CalibrationError:
    """ECE: in 10 equal bins of score, mean score against share right, weighted by the bin's size.

    ``scores``, ``right`` and ``images`` are [D].
    """

    scores: Floats
    right: NDArray[np.bool_]
    images: NDArray[np.int64]

    @property
    def count(self) -> int:
        return len(self.scores)

    def value(self, weights: Floats) -> float:
        counts = weights[self.images]
        total = float(counts.sum())
        if not total:
            return float("nan")
        gaps = np.bincount(self._bins, weights=counts * (self.scores - self.right), minlength=_BINS)
        return float(np.abs(gaps).sum() / total)

    @property
    def _bins(self) -> NDArray[np.int64]:
        return np.minimum((self.scores * _BINS).astype(np.int64), _BINS - 1)

    def table(self) -> list[tuple[float, int, float, float]]:
        """Of each bin that has predictions: where it begins, their number, their mean score, and
        the share of them that is right."""
        bins = self._bins
        return [
            (
                number / _BINS,
                int(inside.sum()),
                float(self.scores[inside].mean()),
                float(self.right[inside].mean()),
            )
            for number in range(_BINS)
            if (inside := bins == number).any()
        ]


def rankings(images: Sequence[ImageBoxes], thresholds: Sequence[float]) -> list[Ranking]:
    """One ranking per label that truly occurs; equal scores stay in the order of the images."""
    labels = sorted({name for image in images for name in image.true_labels})
    return [ranking(images, label, thresholds) for label in labels]


def ranking(
    images: Sequence[ImageBoxes],
    label: str,
    thresholds: Sequence[float],
    most: int | None = COCO_DETECTIONS,
) -> Ranking:
    """That of one label, which need not truly occur.

    Of each image the ``most`` best predictions are ranked, by default as many as COCO's average
    precision counts; None: all.
    """
    found = [_judged(image, label, thresholds, most) for image in images]
    scores, right, overlaps, ignored = (
        np.concatenate(part, axis=-1) for part in zip(*found, strict=True)
    )
    numbers = np.repeat(np.arange(len(found)), [len(scores) for scores, *_ in found])
    positives = np.array([image.true_labels.count(label) for image in images], np.float64)
    order = np.argsort(-scores, kind="stable")
    return Ranking(
        scores[order],
        right[:, order],
        numbers[order],
        positives,
        overlaps[order],
        ignored[:, order],
    )


def _judged(
    image: ImageBoxes, label: str, thresholds: Sequence[float], most: int | None
) -> tuple[Floats, NDArray[np.bool_], Floats, NDArray[np.bool_]]:
    """Scores [D] of one image's predictions of a label, best first, whether right [T, D], the
    overlaps [D] of those that are right by the first threshold, and whether ignored [T, D].
    """
    own = [place for place, name in enumerate(image.labels) if name == label]
    if not own:
        nothing = np.zeros((len(thresholds), 0), bool)
        return np.zeros(0), nothing, np.zeros(0), nothing
    scores = np.array([image.scores[place] for place in own], np.float64)
    order = np.argsort(-scores, kind="stable")[:most]
    true = [place for place, name in enumerate(image.true_labels) if name == label]
    ranked = [own[place] for place in order]
    ious, shares = image.overlaps(ranked, true), image.shares_in_crowds(ranked, label)
    matched = np.stack([matched_by_rank(ious, threshold) for threshold in thresholds])
    overlaps = np.zeros(len(order))
    rows = np.flatnonzero(matched[0] >= 0)
    overlaps[rows] = ious[rows, matched[0][rows]]
    ignored = np.stack(
        [
            in_crowds(shares, row, threshold)
            for row, threshold in zip(matched, thresholds, strict=True)
        ]
    )
    counts = ~ignored.all(axis=0)
    return scores[order][counts], (matched >= 0)[:, counts], overlaps[counts], ignored[:, counts]


def pooled(images: Sequence[ImageBoxes], threshold: float = 0.5) -> CalibrationError:
    """The scores of all labels, also of those that never truly occur, which are wrong."""
    labels = sorted({name for image in images for name in (*image.labels, *image.true_labels)})
    parts = [ranking(images, label, (threshold,)) for label in labels]
    return CalibrationError(
        np.concatenate([np.zeros(0), *(part.scores for part in parts)]),
        np.concatenate([np.zeros(0, bool), *(part.right[0] for part in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(part.images for part in parts)]),
    )


def auroc(scores: Floats, right: NDArray[np.bool_]) -> float:
    """How often a right one scores above a wrong one, ties counting half; NaN without both."""
    positives = np.sort(scores[right])
    negatives = scores[~right]
    if not len(positives) or not len(negatives):
        return float("nan")
    above = len(positives) - np.searchsorted(positives, negatives, side="right")
    at_least = len(positives) - np.searchsorted(positives, negatives, side="left")
    return float((above + at_least).mean() / 2 / len(positives))

"""Figures over scenes that can be computed again for any resampling of the scenes.

``weights`` [S] says how often each scene counts; all ones give the figure itself. A figure of
nothing is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

IOU_THRESHOLDS: Final = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
_RECALLS: Final = np.linspace(0, 1, 101)
_BINS: Final = 10


class Figure(Protocol):
    """One quality, as a function of the weights of the scenes."""

    @property
    def count(self) -> int:
        """How many things it was measured on."""
        ...

    def value(self, weights: Floats) -> float:
        """The figure when each scene counts ``weights`` [S] times."""
        ...


@dataclass(frozen=True, slots=True)
class Ratio:
    """What was reached [S] over what could be reached [S]."""

    reached: Floats
    possible: Floats

    @property
    def count(self) -> int:
        return int(self.possible.sum())

    def value(self, weights: Floats) -> float:
        possible = float(weights @ self.possible)
        return float(weights @ self.reached) / possible if possible else float("nan")


@dataclass(frozen=True, slots=True)
class Ranking:
    """All predictions of one kind [D], best score first: whether right [T, D] at each threshold,
    of which scene [D]; and the number of true boxes in each scene [S].
    """

    right: NDArray[np.bool_]
    scenes: NDArray[np.int64]
    positives: Floats

    def average_precisions(self, weights: Floats) -> Floats | None:
        """COCO's 101-point interpolation at each threshold [T]; None without true boxes."""
        positives = float(weights @ self.positives)
        if not positives:
            return None
        counts = weights[self.scenes]
        hits = np.cumsum(self.right * counts, axis=1)
        seen = np.cumsum(counts)
        precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        padded = np.pad(envelope, ((0, 0), (0, 1)))
        places = [np.searchsorted(row / positives, _RECALLS) for row in hits]
        return np.array([row[place].mean() for row, place in zip(padded, places, strict=True)])


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

    ``scores``, ``right`` and ``scenes`` are [D].
    """

    scores: Floats
    right: NDArray[np.bool_]
    scenes: NDArray[np.int64]

    @property
    def count(self) -> int:
        return len(self.scores)

    def value(self, weights: Floats) -> float:
        counts = weights[self.scenes]
        total = float(counts.sum())
        if not total:
            return float("nan")
        bins = np.minimum((self.scores * _BINS).astype(np.int64), _BINS - 1)
        gaps = np.bincount(bins, weights=counts * (self.scores - self.right), minlength=_BINS)
        return float(np.abs(gaps).sum() / total)

"""Thresholds on scores: precision and recall at each, the best by an objective, fair comparisons.

``weights`` say how often each image counts, [S] or for many resamplings [R, S].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from florence2.errors import RequestError
from florence2.evaluation.detection import Ranking
from florence2.evaluation.metrics import Floats, Ratio

_RECALL_AT: Final = re.compile(r"recall@(0?\.\d+|1(?:\.0*)?)")
_DIGITS: Final = 4


@dataclass(frozen=True, slots=True)
class Counts:
    """Of each image [S]: how many objects were found and right, were found, and are there.

    ``overlap`` is the sum of the IoUs of those that are right.
    """

    right: Floats
    found: Floats
    there: Floats
    overlap: Floats

    @classmethod
    def none(cls, num_images: int) -> Counts:
        """Nothing found, and nothing there."""
        return cls(*(np.zeros(num_images) for _ in fields(cls)))

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(own + others for own, others in self._with(other)))

    @property
    def precision(self) -> Ratio:
        return Ratio(self.right, self.found)

    @property
    def recall(self) -> Ratio:
        return Ratio(self.right, self.there)

    @property
    def f1(self) -> Ratio:
        """The harmonic mean of precision and recall."""
        return Ratio(2 * self.right, self.found + self.there)

    @property
    def mean_overlap(self) -> Ratio:
        """The mean IoU of what was rightly found."""
        return Ratio(self.overlap, self.right)

    def of_images(self, is_chosen: Floats, others: Counts) -> Counts:
        """These of the images whose weight [S] is not 0, and ``others`` of the rest."""
        return Counts(*(np.where(is_chosen > 0, own, other) for own, other in self._with(others)))

    def _with(self, other: Counts) -> Iterator[tuple[Floats, Floats]]:
        return ((getattr(self, one.name), getattr(other, one.name)) for one in fields(self))


def counts_at(ranking: Ranking, threshold: float) -> Counts:
    """The counts of what has at least the score ``threshold``; matches are those of the first IoU.

    A match does not depend on anything with a lower score.
    """
    is_kept = ranking.scores >= threshold

    def of_images(values: NDArray[Any]) -> Floats:
        weights = values[is_kept].astype(np.float64)
        sums: Any = np.bincount(ranking.images[is_kept], weights, len(ranking.positives))
        return np.asarray(sums, np.float64)

    return Counts(
        right=of_images(ranking.right[0]),
        found=of_images(np.ones(len(is_kept))),
        there=ranking.positives,
        overlap=of_images(ranking.overlaps),
    )


@dataclass(frozen=True, slots=True)
class Objective:
    """What is to be as high as can be: F-beta, or recall where precision is at least ``floor``.

    With ``beta`` 1 precision and recall count alike; with 0.5 precision counts twice as much.
    """

    name: str = "f1"
    beta: float = 1.0
    floor: float | None = None

    @classmethod
    def of(cls, name: str) -> Objective:
        """``f1``, ``precision`` (F0.5) or ``recall@0.9``; RequestError."""
        if name == "f1":
            return cls()
        if name == "precision":
            return cls(name, beta=0.5)
        if (found := _RECALL_AT.fullmatch(name)) is not None and float(found[1]) > 0:
            return cls(name, beta=0.5, floor=float(found[1]))
        raise RequestError(
            f"Settings are chosen for f1, precision or recall@P, where P is a precision up to 1, "
            f"and {name[:60]!r} was received; write for example recall@0.9."
        )

    def values(self, counts: Counts, weights: Floats) -> Floats:
        """The values [R] for weights [R, S], the first of which are those of the images themselves.

        0 where nothing is there. With a floor these are recalls if precision is enough by the first
        weights, and otherwise one less than F-beta, which is below every recall.
        """
        right, found, there = (weights @ one for one in (counts.right, counts.found, counts.there))
        if self.floor is not None and self._is_enough(right[0], found[0]):
            return _divided(right, there)
        return self._f_beta(right, found, there) - (self.floor is not None)

    def is_met(self, counts: Counts, weights: Floats) -> bool:
        """Whether precision is at least the floor, for weights [S]."""
        return bool(self._is_enough(weights @ counts.right, weights @ counts.found))

    def threshold(self, ranking: Ranking, weights: Floats) -> float:
        """The threshold with the best value for weights [S]; of equal ones the highest.

        It lies half-way between two scores, and is 0 where everything is kept.
        """
        counts = weights[ranking.images]
        is_seen = counts > 0
        scores, counts = ranking.scores[is_seen], counts[is_seen]
        there = float(weights @ ranking.positives)
        if not len(scores) or not there:
            return 0.0
        right, found = np.cumsum(ranking.right[0][is_seen] * counts), np.cumsum(counts)
        values = self._f_beta(right, found, np.full_like(found, there))
        if self.floor is not None:
            enough = self._is_enough(right, found)
            values = np.where(enough, right / there, values - 1)
        # Equal scores are kept together.
        ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
        best = int(ends[values[ends].argmax()])
        if best == len(scores) - 1:
            return 0.0
        return round(float(scores[best] + scores[best + 1]) / 2, _DIGITS)

    def _f_beta(self, right: Floats, found: Floats, there: Floats) -> Floats:
        weight = self.beta**2
        return _divided((1 + weight) * right, weight * there + found)

    def _is_enough(self, right: Any, found: Any) -> Any:  # noqa: ANN401 - a number or an array
        return _divided(right, found) >= (self.floor or 0.0)


def _divided(part: Any, whole: Any) -> Floats:  # noqa: ANN401 - numbers or arrays
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    shares: Floats = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
    return shares


def simplest(values: Floats, complexity: Sequence[Sequence[float]]) -> int:
    """Which of several choices to take, when a complicated one has to prove that it is better.

    ``values`` [C, 1 + R] has for each choice its value, and those of R resamplings of the images,
    the same for all. The simplest of those that may be as good as the best is taken: its 95 %
    interval of the difference reaches 0. Of equally simple ones the best, then the first.
    """
    best = min(range(len(values)), key=lambda one: (-values[one, 0], complexity[one], one))
    gaps = np.quantile(values[best, 1:] - values[:, 1:], 0.025, axis=1)
    as_good = [one for one in range(len(values)) if one == best or gaps[one] <= 0]
    return min(as_good, key=lambda one: (tuple(complexity[one]), -values[one, 0], one))

"""Metrics over images that can be computed again for any resampling of them, with intervals.

``weights`` [S] says how often each image counts; all ones give the metric itself. A metric of
nothing is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Metric(Protocol):
    """One quality, as a function of the weights of the images."""

    @property
    def count(self) -> int:
        """How many things it was measured on."""
        ...

    def value(self, weights: Floats) -> float:
        """The value when each image counts ``weights`` [S] times."""
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


RESAMPLES: Final = 1000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric's value, its 95 % interval, and how many things it was measured on.

    All three numbers are None where there was nothing to measure.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int


def resamplings(num_images: int, seed: int, count: int = RESAMPLES) -> Floats:
    """Weights [count, num_images] of images drawn with replacement."""
    rng = np.random.default_rng([seed, 0xB007])
    shares = np.full(num_images, 1 / num_images)
    return rng.multinomial(num_images, shares, size=count).astype(np.float64)


def estimate(metric: Metric, weights: Floats) -> Estimate:
    """A metric with the 2.5 % and 97.5 % quantiles over resamplings ``weights`` [R, S].

    Percentile bootstrap: a value of exactly 0 or 1 gets an interval of no width.
    """
    point = metric.value(np.ones(weights.shape[1]))
    if np.isnan(point):
        return Estimate(None, None, None, 0)
    return estimate_of(point, np.array([metric.value(row) for row in weights]), metric.count)


def estimate_of(point: float, values: Floats, count: int) -> Estimate:
    """A value on ``count`` things, with the quantiles of its ``values`` [R] over resamplings."""
    if np.isnan(point):
        return Estimate(None, None, None, 0)
    known = values[~np.isnan(values)]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (point, point)
    return Estimate(float(point), float(low), float(high), count)


def one_spaced(text: str) -> str:
    """The text with single spaces and none around it."""
    return " ".join(text.split())


def edit_distance(first: str, second: str) -> int:
    """The fewest characters to insert, delete or replace (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def character_errors(read: str, written: str) -> float:
    """The character error rate: edits per character that is written, at most 1.

    Where nothing is written it is 1 for anything read and 0 for nothing.
    """
    read, written = one_spaced(read), one_spaced(written)
    if not written:
        return float(bool(read))
    return min(edit_distance(read, written) / len(written), 1.0)

"""How far a figure could be from itself on other scenes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from florence2.evaluation.figures import Figure, Floats

RESAMPLES: Final = 1000


@dataclass(frozen=True, slots=True)
class Measured:
    """A figure, its 95 % interval, and how many things it was measured on.

    All three numbers are None where there was nothing to measure.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int


def resamplings(num_scenes: int, seed: int, count: int = RESAMPLES) -> Floats:
    """Weights [count, num_scenes] of scenes drawn with replacement."""
    rng = np.random.default_rng([seed, 0xB007])
    shares = np.full(num_scenes, 1 / num_scenes)
    return rng.multinomial(num_scenes, shares, size=count).astype(np.float64)


def measure(figure: Figure, weights: Floats) -> Measured:
    """A figure with the 2.5 % and 97.5 % quantiles over resamplings ``weights`` [R, S].

    Percentile bootstrap: a figure of exactly 0 or 1 gets an interval of no width.
    """
    point = figure.value(np.ones(weights.shape[1]))
    if np.isnan(point):
        return Measured(None, None, None, 0)
    values = np.array([figure.value(row) for row in weights])
    low, high = np.nanquantile(values, (0.025, 0.975)) if len(values) else (point, point)
    return Measured(point, float(low), float(high), figure.count)

"""From a score to the share of such answers that is right: isotonic regression.

R. E. Barlow et al., Statistical Inference under Order Restrictions, 1972; B. Zadrozny and C. Elkan,
Transforming Classifier Scores into Accurate Multiclass Probability Estimates, KDD 2002.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from florence2.evaluation.metrics import Floats

Curve = tuple[tuple[float, float], ...]
"""Pairs (raw score, share that is right), straight lines between them and level beyond them."""

MIN_JUDGED: Final = 20
"""With fewer judged answers there is no curve."""
MIN_IN_GROUP: Final = 5
"""So many answers of similar scores, or more, say together which share of them is right."""
MAX_GROUPS: Final = 50
_ADDED: Final = 2
_MARGIN: Final = 0.01
_DIGITS: Final = 4


def isotonic(values: Floats, weights: Floats) -> Floats:
    """The non-decreasing numbers [N] that are nearest to ``values`` [N] by weighted squares.

    Pool adjacent violators: whatever falls is joined with what stands before it, into their mean.
    """
    means: list[float] = []
    sums: list[float] = []
    lengths: list[int] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, total, length = value, weight, 1
        while means and means[-1] >= mean:
            before = sums.pop()
            mean = (means.pop() * before + mean * total) / (before + total)
            total += before
            length += lengths.pop()
        means.append(mean)
        sums.append(total)
        lengths.append(length)
    return np.repeat(means, lengths)


def calibration_curve(scores: Floats, right: NDArray[np.bool_]) -> Curve | None:
    """How many of the answers with a score [D] are right [D]; None with too few to say.

    Answers of similar scores are judged in groups of 5 or more, to each of which two are added that
    are right as often as their scores say: a few that are all right prove little about the next.
    No share is surer than that half an error is among all answers. Between the means of what
    isotonic regression pools the curve is straight, and beyond them it rises by 0.01 at most, so
    that a threshold can be anywhere and equal scores only come of equal ones.
    """
    if len(scores) < MIN_JUDGED:
        return None
    order = np.argsort(scores, kind="stable")
    ascending, hits = scores[order], right[order].astype(np.float64)
    starts = _group_starts(ascending)
    counts = np.diff([*starts, len(ascending)]).astype(np.float64)
    sums = np.add.reduceat(ascending, starts)
    expected = _ADDED * sums / counts
    shares = (np.add.reduceat(hits, starts) + expected) / (counts + _ADDED)
    surest = 0.5 / (len(scores) + 1)
    fitted = np.round(np.clip(isotonic(shares, counts), surest, 1 - surest), _DIGITS)
    # One pair for each level, where its answers are on average.
    levels, of_level = np.unique(fitted, return_inverse=True)
    raw = np.bincount(of_level, sums) / np.bincount(of_level, counts)
    low, high = float(levels[0]), float(levels[-1])
    pairs = {0.0: round(low - min(_MARGIN, low / 2), _DIGITS)}
    for x, y in zip(raw.tolist(), levels.tolist(), strict=True):
        pairs[round(x, _DIGITS)] = round(y, _DIGITS)
    pairs.setdefault(1.0, round(high + min(_MARGIN, (1 - high) / 2), _DIGITS))
    return tuple(pairs.items())


def _group_starts(ascending: Floats) -> list[int]:
    """Where groups of scores begin; equal scores are in one group, and none is too small."""
    size = max(MIN_IN_GROUP, -(-len(ascending) // MAX_GROUPS))
    starts = [0]
    while len(ascending) - starts[-1] >= 2 * size:
        # The first one that is above the last score of a full group.
        last = ascending[starts[-1] + size - 1]
        start = int(np.searchsorted(ascending, last, side="right"))
        if len(ascending) - start < size:
            break
        starts.append(start)
    return starts


def calibrated(scores: Floats, curve: Sequence[tuple[float, float]] | None) -> Floats:
    """The scores [D] that take the place of raw ones; as they are without a curve."""
    if curve is None:
        return scores
    raw, right = zip(*curve, strict=True)
    found: Floats = np.interp(scores, raw, right)
    return found

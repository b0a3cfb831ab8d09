"""What a score is worth: isotonic regression, and how little a few answers prove."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from florence2.evaluation.calibration import (
    MAX_GROUPS,
    MIN_IN_GROUP,
    MIN_JUDGED,
    calibrated,
    calibration_curve,
    isotonic,
)
from florence2.evaluation.detection import CalibrationError


def judged(count, share_right, seed=0):
    """Scores [count], and whether right: with the probability that ``share_right`` has for each."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0, 1, count)
    return scores, rng.uniform(0, 1, count) < share_right(scores)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 9)), min_size=1, max_size=12))
def test_the_regression_is_the_one_of_the_textbook(pairs):
    values, weights = (np.array(column, np.float64) for column in zip(*pairs, strict=True))

    def mean(first, last):
        return np.average(values[first : last + 1], weights=weights[first : last + 1])

    size = len(values)
    wanted = [
        max(min(mean(first, last) for last in range(place, size)) for first in range(place + 1))
        for place in range(size)
    ]
    assert isotonic(values, weights) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    "share_right",
    [
        pytest.param(lambda score: score**3, id="too sure"),
        pytest.param(lambda score: score ** (1 / 3), id="too modest"),
        pytest.param(lambda score: 0.1 + 0.8 * (score > 0.6), id="a step"),
        pytest.param(lambda score: 0.5 + 0 * score, id="scores that say nothing"),
    ],
)
def test_a_calibrated_score_is_the_share_that_is_right_on_other_images_too(share_right):
    scores, right = judged(2000, share_right, seed=1)
    curve = calibration_curve(scores, right)
    others, others_right = judged(2000, share_right, seed=2)
    numbers, weights = np.arange(2000), np.ones(2000)
    error = CalibrationError(calibrated(others, curve), others_right, numbers).value(weights)
    raw = CalibrationError(others, others_right, numbers).value(weights)
    assert error < 0.04 < raw


@given(st.integers(MIN_JUDGED, 300), st.integers(0, 99), st.integers(1, 12))
def test_a_curve_rises_is_short_and_is_never_certain(count, seed, digits):
    scores, right = judged(count, lambda score: score, seed)
    curve = calibration_curve(np.round(scores, digits), right)
    raw, shares = np.array(curve).T
    assert (np.diff(raw) > 0).all()
    assert (np.diff(shares) > 0).all()
    assert (raw[0], raw[-1]) == (0, 1)
    assert ((shares > 0) & (shares < 1)).all()
    assert len(curve) <= 2 + min(MAX_GROUPS, count // MIN_IN_GROUP)


@pytest.mark.parametrize(
    ("scores", "right", "curve"),
    [
        pytest.param([0.5] * 19, [True] * 19, None, id="too few"),
        pytest.param([], [], None, id="none"),
        pytest.param(
            [0.5] * 20, [True] * 20, ((0.0, 0.9445), (0.5, 0.9545), (1.0, 0.9645)),
            id="all right, 21 of 22",
        ),
        pytest.param(
            [0.5] * 20, [False] * 20, ((0.0, 0.0355), (0.5, 0.0455), (1.0, 0.0555)), id="all wrong"
        ),
        pytest.param(
            [0.0] * 10 + [1.0] * 10, [False] * 10 + [True] * 10, ((0.0, 0.0238), (1.0, 0.9762)),
            id="half an error in 21",
        ),
        pytest.param(
            [0.2] * 10 + [0.8] * 10, [True] * 10 + [False] * 10,
            ((0.0, 0.49), (0.5, 0.5), (1.0, 0.51)), id="upside down",
        ),
        pytest.param(
            [0.2] * 15 + [0.8] * 5, [False] * 15 + [True] * 5,
            ((0.0, 0.0138), (0.2, 0.0238), (0.8, 0.9429), (1.0, 0.9529)), id="two groups",
        ),
        pytest.param(
            [0.2] * 16 + [0.8] * 4, [False] * 16 + [True] * 4,
            ((0.0, 0.2009), (0.32, 0.2109), (1.0, 0.2209)), id="four are no group of their own",
        ),
    ],
)  # fmt: skip
def test_curves_of_few_answers(scores, right, curve):
    assert calibration_curve(np.array(scores), np.array(right, bool)) == curve


def test_without_a_curve_scores_stay():
    scores = np.array([0.1, 0.9])
    assert calibrated(scores, None) is scores
    assert calibrated(scores, ((0.2, 0.4), (0.6, 0.8))) == pytest.approx([0.4, 0.8])

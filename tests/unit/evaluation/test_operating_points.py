"""Thresholds: what is found at each, which is best, and when a choice is really better."""

from __future__ import annotations

import numpy as np
import pytest

from florence2.errors import RequestError
from florence2.evaluation.detection import Ranking
from florence2.evaluation.metrics import estimate, resamplings
from florence2.evaluation.operating_points import Counts, Objective, counts_at, simplest

# Of five found in three images, with four there: right, right, wrong, right, wrong.
RANKING = Ranking(
    scores=np.array([0.9, 0.8, 0.6, 0.6, 0.3]),
    right=np.array([[True, True, False, True, False]]),
    images=np.array([0, 1, 0, 2, 2]),
    positives=np.array([1.0, 2.0, 1.0]),
    overlaps=np.array([0.9, 0.7, 0.0, 0.5, 0.0]),
    ignored=np.zeros((1, 5), bool),
)
ALL = np.ones(3)


@pytest.mark.parametrize(
    ("threshold", "precision", "recall", "f1", "overlap"),
    [
        (0.0, 3 / 5, 3 / 4, 6 / 9, 0.7),
        (0.6, 3 / 4, 3 / 4, 6 / 8, 0.7),
        (0.61, 1.0, 2 / 4, 4 / 6, 0.8),
        (0.95, float("nan"), 0.0, 0.0, float("nan")),
    ],
)
def test_precision_recall_and_overlap_at_a_threshold(threshold, precision, recall, f1, overlap):
    counts = counts_at(RANKING, threshold)
    ratios = (counts.precision, counts.recall, counts.f1, counts.mean_overlap)
    values = [one.value(ALL) for one in ratios]
    assert values == pytest.approx([precision, recall, f1, overlap], nan_ok=True)


def test_counts_add_up_and_none_is_nothing():
    total = sum([counts_at(RANKING, 0.0)] * 2, Counts.none(3))
    assert total.right.tolist() == [2, 2, 2]
    assert total.found.tolist() == [4, 2, 4]
    assert total.overlap.tolist() == pytest.approx([1.8, 1.4, 1.0])


def test_an_interval_is_one_over_images():
    right, ten = np.array([9.0, 1.0]), np.array([10.0, 10.0])
    counts = Counts(right, found=ten, there=ten, overlap=right)
    found = estimate(counts.f1, resamplings(2, 0))
    assert (found.value, found.low, found.high, found.count) == (0.5, 0.1, 0.9, 40)


def test_each_image_has_the_counts_of_its_half():
    first, second = (Counts(*[np.full(3, value)] * 4) for value in (1.0, 2.0))
    mixed = first.of_images(np.array([1.0, 0.0, 1.0]), second)
    assert mixed.found.tolist() == mixed.right.tolist() == mixed.there.tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("name", "weights", "threshold", "is_met"),
    [
        pytest.param("f1", [1, 1, 1], 0.45, True, id="equal scores are kept together"),
        pytest.param("precision", [1, 1, 1], 0.7, True, id="precision counts twice as much"),
        pytest.param("recall@0.75", [1, 1, 1], 0.45, True, id="recall, as far as precision allows"),
        pytest.param("recall@0.8", [1, 1, 1], 0.7, True, id="more precision, less recall"),
        pytest.param("recall@.5", [1, 1, 1], 0.45, True, id="of equal recalls the more precise"),
        pytest.param("f1", [0, 0, 1], 0.45, True, id="the images that count"),
        pytest.param("recall@0.9", [0, 0, 1], 0.45, True, id="one right find"),
        pytest.param("f1", [0, 1, 0], 0.0, True, id="everything is kept"),
        pytest.param("f1", [0, 0, 0], 0.0, True, id="no image"),
    ],
)
def test_the_best_threshold(name, weights, threshold, is_met):
    objective, weights = Objective.of(name), np.array(weights, np.float64)
    assert objective.threshold(RANKING, weights) == pytest.approx(threshold)
    if weights.any():
        assert objective.is_met(counts_at(RANKING, threshold), weights) is is_met


def test_a_precision_that_is_out_of_reach_gives_way_to_f05_and_is_worth_less_than_any_recall():
    wrong_first = Ranking(
        np.array([0.9, 0.5]),
        np.array([[False, True]]),
        np.array([0, 0]),
        np.ones(1),
        np.array([0.0, 0.8]),
        np.zeros((1, 2), bool),
    )
    objective = Objective.of("recall@0.9")
    assert objective.threshold(wrong_first, np.ones(1)) == 0.0
    counts = counts_at(wrong_first, 0.0)
    assert not objective.is_met(counts, np.ones(1))
    assert objective.values(counts, np.ones((2, 1))) == pytest.approx([1.25 / 2.25 - 1] * 2)
    assert Objective.of("f1").values(counts, np.ones((2, 1))) == pytest.approx([2 / 3] * 2)


@pytest.mark.parametrize("name", ["", "F1", "recall", "recall@", "recall@0", "recall@1.5", "map"])
def test_an_unknown_objective_is_one_sentence(name):
    with pytest.raises(RequestError, match=r"f1, precision or recall@P.*write for example recall@"):
        Objective.of(name)


def resampled(value, spread, seed=0):
    return [value, *(value + np.random.default_rng(seed).normal(0, spread, 200))]


@pytest.mark.parametrize(
    ("values", "complexity", "taken"),
    [
        pytest.param(
            [resampled(0.80, 0.01, 1), resampled(0.81, 0.01, 2)], [(1,), (2,)], 0,
            id="a small gain keeps the simpler one",
        ),
        pytest.param(
            [resampled(0.80, 0.01, 1), resampled(0.90, 0.01, 2)], [(1,), (2,)], 1,
            id="a large gain does not",
        ),
        pytest.param(
            [resampled(0.80, 0.1, 1), resampled(0.82, 0.1, 1)], [(1,), (2,)], 1,
            id="a small gain that is the same in every resampling neither",
        ),
        pytest.param(
            [resampled(0.80, 0.01, 1), resampled(0.805, 0.01, 2)], [(1,), (1,)], 1,
            id="the better of equally simple ones",
        ),
        pytest.param([[0.5, 0.5], [0.5, 0.5]], [(1,), (1,)], 0, id="the first of equals"),
        pytest.param([[0.5, 0.5], [0.5, 0.5]], [(2,), (1,)], 1, id="the simpler of equals"),
    ],
)  # fmt: skip
def test_a_complicated_choice_has_to_prove_itself(values, complexity, taken):
    assert simplest(np.array(values), complexity) == taken

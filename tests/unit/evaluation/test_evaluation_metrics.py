"""Overlaps, matches, average precision and the other metrics, by worked arithmetic."""

from dataclasses import replace

import numpy as np
import pytest
from coco_reference import coco_map, random_scenes

from florence2.evaluation.detection import (
    IOU_THRESHOLDS,
    CalibrationError,
    ImageBoxes,
    MeanAveragePrecision,
    Ranking,
    auroc,
    box_ious,
    count_matches,
    matched_by_rank,
    outline_iou,
    pooled,
    rankings,
)
from florence2.evaluation.metrics import (
    Ratio,
    character_errors,
    edit_distance,
    estimate,
    resamplings,
)

UNIT = (0.0, 0.0, 1.0, 1.0)
SQUARE = (0.2, 0.2, 0.6, 0.2, 0.6, 0.6, 0.2, 0.6)


@pytest.mark.parametrize(
    ("a", "b", "iou"),
    [
        ((0, 0, 4, 4), (0, 0, 4, 4), 1.0),
        ((0, 0, 4, 4), (2, 0, 6, 4), 8 / 24),
        ((0, 0, 4, 4), (4, 0, 8, 4), 0.0),
        ((0, 0, 4, 4), (1, 1, 3, 3), 4 / 16),
        ((0, 0, 4, 4), (9, 9, 8, 8), 0.0),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
    ],
)
def test_box_iou(a, b, iou):
    assert box_ious([a], [b])[0, 0] == pytest.approx(iou)


def test_box_ious_of_nothing():
    assert box_ious([], [UNIT]).shape == (0, 1)
    assert box_ious([UNIT], []).shape == (1, 0)


@pytest.mark.parametrize(
    ("found", "true", "iou"),
    [
        ([SQUARE], [SQUARE], 1.0),
        ([(0.4, 0.2, 0.6, 0.2, 0.6, 0.6, 0.4, 0.6)], [SQUARE], 0.5),
        ([SQUARE, SQUARE], [SQUARE], 1.0),
        ([], [SQUARE], 0.0),
        ([(0.7, 0.7, 0.9, 0.7, 0.9, 0.9)], [SQUARE], 0.0),
        ([], [], 0.0),
        ([SQUARE[::-1]], [SQUARE], 1.0),
    ],
)
def test_outline_iou(found, true, iou):
    assert outline_iou(found, true) == pytest.approx(iou, abs=0.01)


def test_each_true_box_is_matched_once():
    ious = np.array([[0.9], [0.8]])
    assert (matched_by_rank(ious, 0.5) >= 0).tolist() == [True, False]
    assert count_matches([UNIT, UNIT], ["car", "car"], [UNIT], ["car"]) == 1


def test_a_prediction_takes_the_free_box_it_overlaps_most():
    ious = np.array([[0.6, 0.9], [0.7, 0.95]])
    assert (matched_by_rank(ious, 0.5) >= 0).tolist() == [True, True]
    assert (matched_by_rank(ious, 0.75) >= 0).tolist() == [True, False]
    assert (matched_by_rank(np.zeros((2, 0)), 0.5) >= 0).tolist() == [False, False]


def test_matches_need_the_label():
    assert count_matches([UNIT], ["car"], [UNIT], ["cup"]) == 0
    assert count_matches([UNIT, UNIT], ["cup", "car"], [UNIT, UNIT], ["car", "car"]) == 1
    assert count_matches([], [], [UNIT], ["car"]) == 0


def found(scores, right, positives, scenes=None):
    right = np.array([right], bool)
    scenes = np.zeros(len(scores), np.int64) if scenes is None else np.array(scenes)
    overlaps = right[0].astype(float)
    positives = np.array(positives, float)
    return Ranking(np.array(scores), right, scenes, positives, overlaps, np.zeros_like(right))


@pytest.mark.parametrize(
    ("right", "positives", "precision"),
    [
        ([True, True], 2, 1.0),
        ([True], 2, 51 / 101),
        ([False, True], 1, 0.5),
        ([True, False, True], 2, (51 + 50 * 2 / 3) / 101),
        ([False, False], 1, 0.0),
        ([], 1, 0.0),
    ],
)
def test_average_precision_of_101_points(right, positives, precision):
    ranking = found([0.5] * len(right), right, [positives])
    assert ranking.average_precisions(np.ones(1))[0] == pytest.approx(precision)


def test_a_scene_that_counts_twice_is_like_two_scenes():
    once = found([0.9, 0.8, 0.7], [True, False, True], [2, 1], [0, 1, 0])
    twice = found(
        [0.9, 0.9, 0.8, 0.7, 0.7], [True, True, False, True, True], [4, 1], [0, 0, 1, 0, 0]
    )
    assert once.average_precisions(np.array([2.0, 1.0])) == pytest.approx(
        twice.average_precisions(np.ones(2))
    )


def test_a_kind_without_true_boxes_does_not_count():
    good, absent = found([0.9], [True], [1]), found([0.9], [False], [0])
    assert MeanAveragePrecision([good, absent]).value(np.ones(1)) == 1.0
    assert np.isnan(MeanAveragePrecision([absent]).value(np.ones(1)))


@pytest.mark.parametrize(
    ("scores", "right", "ece"),
    [
        ([1.0, 1.0], [True, True], 0.0),
        ([1.0, 1.0], [False, False], 1.0),
        ([0.75, 0.75, 0.75, 0.75], [True, True, True, False], 0.0),
        # Bin 0.9: two of mean 0.95, half right; bin 0.2: one of 0.25, wrong.
        ([0.95, 0.95, 0.25], [True, False, False], (2 * 0.45 + 0.25) / 3),
    ],
)
def test_calibration_error(scores, right, ece):
    figure = CalibrationError(np.array(scores), np.array(right), np.zeros(len(scores), np.int64))
    assert figure.value(np.ones(1)) == pytest.approx(ece)


def test_calibration_without_predictions_is_unknown():
    nothing_found = ImageBoxes((), (), (), (UNIT,), ("car",))
    for images in ([], [nothing_found]):
        assert np.isnan(pooled(images).value(np.ones(1)))


def test_labels_that_never_occur_are_wrong_boxes():
    scene = ImageBoxes((UNIT, UNIT), ("car", "dog"), (0.9, 0.8), (UNIT,), ("car",))
    judged = pooled([scene])
    assert sorted(zip(judged.scores, judged.right, strict=True)) == [(0.8, False), (0.9, True)]


@pytest.mark.parametrize(
    ("scores", "right", "area"),
    [
        ([0.9, 0.1], [True, False], 1.0),
        ([0.1, 0.9], [True, False], 0.0),
        ([0.5, 0.5], [True, False], 0.5),
        ([0.9, 0.5, 0.5, 0.1], [True, True, False, False], 3.5 / 4),
    ],
)
def test_auroc(scores, right, area):
    assert auroc(np.array(scores), np.array(right)) == pytest.approx(area)


def test_the_interval_holds_the_figure_and_shrinks():
    rng = np.random.default_rng(1)
    widths = []
    for scenes in (20, 500):
        figure = Ratio((rng.random(scenes) < 0.7).astype(float), np.ones(scenes))
        measured = estimate(figure, resamplings(scenes, 0))
        assert measured.low <= measured.value <= measured.high
        assert measured.count == scenes
        widths.append(measured.high - measured.low)
    # Theory at 500: 2 * 1.96 * sqrt(0.7 * 0.3 / 500) = 0.08.
    assert widths[1] == pytest.approx(0.08, abs=0.015)
    assert widths[0] > 3 * widths[1]


def test_the_interval_is_the_same_for_the_same_seed():
    assert (resamplings(9, 4) == resamplings(9, 4)).all()
    assert (resamplings(9, 4) != resamplings(9, 5)).any()
    assert (resamplings(9, 4).sum(axis=1) == 9).all()


def test_a_figure_of_nothing_is_none():
    measured = estimate(Ratio(np.zeros(3), np.zeros(3)), resamplings(3, 0))
    assert (measured.value, measured.low, measured.high, measured.count) == (None, None, None, 0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_map_is_that_of_an_independent_evaluator(seed):
    scenes = random_scenes(seed)
    whole, half = coco_map(scenes)
    ones = np.ones(len(scenes))
    ours = MeanAveragePrecision(rankings(scenes, IOU_THRESHOLDS)).value(ones)
    ours50 = MeanAveragePrecision(rankings(scenes, (0.5,))).value(ones)
    assert 0.2 < ours < ours50 < 1
    assert ours == pytest.approx(whole, abs=1e-9)
    assert ours50 == pytest.approx(half, abs=1e-9)


def test_map_of_perfect_and_of_shuffled_labels():
    perfect = [
        replace(s, boxes=s.true_boxes, labels=s.true_labels, scores=(1.0,) * len(s.true_boxes))
        for s in random_scenes(3)
    ]
    others = {"ball": "car", "car": "cup", "cup": "ball"}
    shuffled = [replace(s, labels=tuple(others[label] for label in s.labels)) for s in perfect]
    ones = np.ones(len(perfect))
    assert MeanAveragePrecision(rankings(perfect, IOU_THRESHOLDS)).value(ones) == 1.0
    assert MeanAveragePrecision(rankings(shuffled, (0.5,))).value(ones) < 0.05


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("", "", 0),
        ("STOP", "", 4),
        ("STOP", "STOP", 0),
        ("STOP", "SHOP", 1),
        ("kitten", "sitting", 3),
    ],
)
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


@pytest.mark.parametrize(
    ("read", "written", "errors"),
    [
        ("STOP", "STOP", 0.0),
        ("SHOP", "STOP", 0.25),
        ("", "STOP", 1.0),
        ("SOMETHING ELSE", "NO", 1.0),
        (" STOP\n7", "STOP 7", 0.0),
        ("", "", 0.0),
        ("X", "", 1.0),
    ],
)
def test_character_errors(read, written, errors):
    assert character_errors(read, written) == errors

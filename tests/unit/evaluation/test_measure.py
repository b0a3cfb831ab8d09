"""Figures of predictions about labeled images, by hand and beside an independent evaluator."""

import json
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from coco_reference import IDS, coco_map, random_scenes

from florence2.errors import RequestError
from florence2.evaluation.measure import TextAnswer, measure, measure_texts
from florence2.labeled.records import LabeledData, LabeledImage, LabeledObject, LeftOut
from florence2.records import Box, Failure, Polygon, Quad

DOG, CAT = (0.0, 0.0, 40.0, 40.0), (60.0, 60.0, 100.0, 100.0)
FAR = (0.0, 80.0, 10.0, 100.0)
NO_CROWDS = MappingProxyType({})


def data_of(*images, classes=("dog", "cat"), crowds=NO_CROWDS):
    """Labeled images ``0``, ``1``, ... of (label, box) or whole objects; ``crowds`` by number."""
    labeled = tuple(
        LabeledImage(
            Path(f"/{number}.png"),
            str(number),
            (128, 128),
            tuple(
                one if isinstance(one, LabeledObject) else LabeledObject(*one) for one in objects
            ),
            crowds=tuple(LabeledObject(*one) for one in crowds.get(number, ())),
        )
        for number, objects in enumerate(images)
    )
    return LabeledData(Path("/data"), "coco", labeled, classes)


def found(label, box, score=0.9):
    return Box(box, label, score)


def measured(truths, predictions, crowds=NO_CROWDS, **options):
    named = {str(number): one for number, one in enumerate(predictions)}
    return measure(data_of(*truths, crowds=crowds), named, **({"resamples": 20} | options))


@pytest.mark.parametrize(("seed", "crowded"), [(0, False), (1, False), (0, True), (2, True)])
def test_average_precision_is_that_of_an_independent_evaluator(seed, crowded):
    scenes = random_scenes(seed, crowded=crowded)
    crowds = {
        number: list(zip(one.crowd_labels, one.crowd_boxes, strict=True))
        for number, one in enumerate(scenes)
    }
    truths = [list(zip(one.true_labels, one.true_boxes, strict=True)) for one in scenes]
    predictions = [
        [
            Box(box, label.upper(), float(score))
            for box, label, score in zip(one.boxes, one.labels, one.scores, strict=True)
        ]
        for one in scenes
    ]
    named = {str(number): one for number, one in enumerate(predictions)}
    data = data_of(*truths, classes=tuple(IDS), crowds=crowds)
    evaluation = measure(data, named, resamples=50)
    whole, half = coco_map(scenes)
    total = evaluation.total
    assert total.ap.value == pytest.approx(whole, abs=1e-9)
    assert total.ap50.value == pytest.approx(half, abs=1e-9)
    assert total.ap.low < total.ap.value < total.ap.high
    of_classes = [one.ap.value for one in evaluation.classes]
    assert np.mean(of_classes) == pytest.approx(whole, abs=1e-9)
    assert evaluation.to_dict()["total"]["ap"]["value"] == total.ap.value
    json.dumps(evaluation.to_dict())


CROWD = (0.0, 0.0, 128.0, 50.0)
RING = (80.0, 0.0, 128.0, 0.0, 128.0, 50.0)
CROWDED = {
    "in a crowd": ([found("dog", (50.0, 0.0, 90.0, 40.0))], (1, 0, 0)),
    "any number of them": (
        [found("dog", (x, 0.0, x + 20.0, 20.0)) for x in (50, 70, 90)],
        (1, 0, 0),
    ),
    "half in it": ([found("dog", (50.0, 30.0, 90.0, 70.0))], (1, 0, 0)),
    "less than half": ([found("dog", (50.0, 31.0, 90.0, 71.0))], (1, 1, 0)),
    "of another class": ([found("cat", (50.0, 0.0, 90.0, 40.0))], (1, 1, 0)),
    "an object in it is found": ([found("dog", DOG)], (0, 0, 1)),
    "the second on that object": ([found("dog", DOG), found("dog", DOG, 0.8)], (0, 0, 1)),
}


@pytest.mark.parametrize(("predictions", "expected"), CROWDED.values(), ids=CROWDED)
@pytest.mark.parametrize("by", ["boxes", "outlines"])
def test_what_is_found_in_a_crowd_of_its_class_is_neither_right_nor_wrong(
    predictions, expected, by
):
    truth = [[LabeledObject("dog", DOG, ((0.0, 0.0, 40.0, 0.0, 40.0, 40.0, 0.0, 40.0),))]]
    evaluation = measured(truth, [predictions], {0: [("dog", CROWD)]}, by=by)
    [image] = evaluation.images
    missed, wrong, right = expected
    assert (image.missed, image.wrong, image.right) == (missed, wrong, right)
    assert evaluation.total.num_found == wrong + right
    assert evaluation.total.num_true == 1
    assert evaluation.total.ap50.value == (1.0 if right else 0.0)


def test_a_crowd_with_an_outline_is_what_that_covers():
    truth, right_half = [[LabeledObject("dog", DOG, (RING[:6],))]], (80.0, 0.0, 128.0, 50.0)
    crowd = {0: [("dog", right_half, (RING,))]}
    below = (81.0, 30.0, 100.0, 49.0)
    assert measured(truth, [[found("dog", below)]], crowd).images[0].wrong == 0
    assert measured(truth, [[found("dog", below)]], crowd, by="outlines").images[0].wrong == 1


def test_outlines_are_compared_with_outlines():
    # A triangle is half of its box, which it is found in.
    ring = (0.0, 0.0, 40.0, 0.0, 40.0, 40.0)
    truth = [[LabeledObject("dog", DOG, (ring,))]]
    by_outline = measured(truth, [[Polygon((ring,), "dog", 0.9)]], by="outlines")
    assert by_outline.total.overlap.value == pytest.approx(1.0, abs=0.01)
    as_box = measured(truth, [[found("dog", DOG)]], by="outlines")
    assert as_box.total.recall.value == pytest.approx(1.0)
    assert as_box.total.overlap.value == pytest.approx(0.5, abs=0.01)
    with pytest.raises(RequestError, match="labels are boxes only"):
        measured([[("dog", DOG)]], [[found("dog", DOG)]], by="outlines")


CASES = {
    # Truths and predictions of images, options, (right, found, there), confusion without zeros.
    "all right": (
        [[("dog", DOG), ("cat", CAT)]],
        [[found("Dog", DOG), found("cat", CAT)]],
        {},
        (2, 2, 2),
        {("dog", "dog"): 1, ("cat", "cat"): 1},
    ),
    "found twice": (
        [[("dog", DOG)]],
        [[found("dog", DOG), found("dog", DOG, 0.5)]],
        {},
        (1, 2, 1),
        {("dog", "dog"): 1, ("nothing", "dog"): 1},
    ),
    "another class": (
        [[("dog", DOG)]],
        [[found("cat", DOG)]],
        {},
        (0, 1, 1),
        {("dog", "cat"): 1},
    ),
    "the same class first, whatever overlaps": (
        [[("dog", DOG), ("cat", DOG)]],
        [[found("cat", DOG, 0.9), found("dog", (0.0, 0.0, 40.0, 30.0), 0.3)]],
        {},
        (2, 2, 2),
        {("dog", "dog"): 1, ("cat", "cat"): 1},
    ),
    "elsewhere": (
        [[("dog", DOG)]],
        [[found("dog", FAR)]],
        {},
        (0, 1, 1),
        {("dog", "nothing"): 1, ("nothing", "dog"): 1},
    ),
    "below the threshold": (
        [[("dog", DOG), ("cat", CAT)]],
        [[found("dog", DOG, 0.4), found("cat", CAT, 0.4)]],
        {"threshold": 0.5},
        (0, 0, 2),
        {("dog", "nothing"): 1, ("cat", "nothing"): 1},
    ),
    "the threshold of a class": (
        [[("dog", DOG), ("cat", CAT)]],
        [[found("dog", DOG, 0.4), found("cat", CAT, 0.4)]],
        {"threshold": 0.5, "class_thresholds": {"DOG": 0.3}},
        (1, 1, 2),
        {("dog", "dog"): 1, ("cat", "nothing"): 1},
    ),
    "an image with nothing": (
        [[], [("dog", DOG)]],
        [[found("dog", DOG)], [found("dog", DOG)]],
        {},
        (1, 2, 1),
        {("dog", "dog"): 1, ("nothing", "dog"): 1},
    ),
    "a score that is unknown": (
        [[("dog", DOG)]],
        [[Box(DOG, "dog", None)]],
        {"threshold": 0.99},
        (1, 1, 1),
        {("dog", "dog"): 1},
    ),
    "a line of text": (
        [[("dog", DOG)]],
        [[Quad((0.0, 0.0, 40.0, 0.0, 40.0, 40.0, 0.0, 40.0), "dog", 0.9)]],
        {},
        (1, 1, 1),
        {("dog", "dog"): 1},
    ),
}


@pytest.mark.parametrize(
    ("truths", "predictions", "options", "counts", "confusion"), CASES.values(), ids=CASES
)
def test_what_counts_as_right(truths, predictions, options, counts, confusion):
    evaluation = measured(truths, predictions, **options)
    right, num_found, num_true = counts
    total = evaluation.total
    assert (total.num_found, total.num_true) == (num_found, num_true)
    assert total.recall.value == right / num_true
    assert total.precision.value == (right / num_found if num_found else None)
    assert total.f1.value == pytest.approx(2 * right / (num_found + num_true))
    names, rows = evaluation.confusion.names, evaluation.confusion.counts
    seen = {
        (row, column): count
        for row, counts in zip(names, rows, strict=True)
        for column, count in zip(names, counts, strict=True)
        if count
    }
    assert seen == confusion
    assert sum(image.right for image in evaluation.images) == right
    assert sum(image.missed for image in evaluation.images) == num_true - right
    assert sum(image.wrong for image in evaluation.images) == num_found - right


def test_a_failed_image_is_named_and_in_no_figure():
    truths = [[("dog", DOG)], [("dog", DOG)]]
    evaluation = measured(truths, [[found("dog", DOG)], Failure("bad_image", "It is cut.")])
    assert evaluation.total.recall.value == 1.0
    assert evaluation.failed == (LeftOut("1", "It is cut."),)
    assert [image.name for image in evaluation.images] == ["0"]
    with pytest.raises(RequestError, match="of 2 none was; the first: It is cut"):
        measured(truths, [Failure("bad_image", "It is cut.")] * 2)


def test_images_that_were_not_asked_are_in_no_figure():
    evaluation = measured([[("dog", DOG)], [("dog", DOG)]], [[found("dog", DOG)]])
    assert (evaluation.total.num_true, evaluation.failed) == (1, ())


def test_classes_that_the_data_does_not_have_are_counted_apart():
    evaluation = measured([[("dog", DOG)]], [[found("dog", DOG), found("bird", CAT)]])
    assert evaluation.total.precision.value == 1.0
    assert evaluation.unlabeled == {"bird": 1}


def test_a_class_without_objects_has_no_average_precision_and_no_share_in_the_mean():
    evaluation = measured([[("dog", DOG)]], [[found("dog", DOG), found("cat", CAT)]])
    dog, cat = evaluation.classes
    assert (cat.ap.value, cat.recall.value, cat.precision.value) == (None, None, 0.0)
    assert evaluation.total.ap.value == dog.ap.value == 1.0
    assert cat.best_f1 is None


def test_the_worst_image_comes_first_and_knows_its_pairs():
    truths = [[("dog", DOG)], [("dog", DOG), ("cat", CAT)], [("dog", DOG)]]
    predictions = [[found("dog", DOG)], [found("dog", FAR)], []]
    worst, second, best = measured(truths, predictions).images
    assert (worst.name, second.name, best.name) == ("1", "2", "0")
    assert (worst.right, worst.wrong, worst.missed) == (0, 1, 2)
    assert set(worst.pairs) == {(0, None), (None, 0), (None, 1)}
    assert best.pairs == ((0, 0),)


def test_the_best_f1_has_its_threshold_and_equal_scores_stay_together():
    truths = [[("dog", DOG)], [("dog", DOG)], []]
    predictions = [[found("dog", DOG, 0.9)], [found("dog", DOG, 0.6)], [found("dog", DOG, 0.2)]]
    total = measured(truths, predictions).total
    assert (total.best_f1, total.best_threshold) == (1.0, 0.6)
    alike = [[found("dog", DOG, 0.6)], [found("dog", DOG, 0.6)], [found("dog", DOG, 0.6)]]
    total = measured(truths, alike).total
    assert (total.best_f1, total.best_threshold) == (pytest.approx(0.8), 0.6)


def test_calibration_is_by_class_and_in_all():
    truths = [[("dog", DOG)], [], [("cat", CAT)]]
    predictions = [[found("dog", DOG, 0.95)], [found("dog", DOG, 0.95)], [found("cat", CAT, 0.35)]]
    evaluation = measured(truths, predictions)
    dog, cat = evaluation.classes
    assert [(one.low, one.count, one.right) for one in dog.reliability] == [(0.9, 2, 0.5)]
    assert dog.ece.value == pytest.approx(0.45)
    assert cat.ece.value == pytest.approx(0.65)
    # Two of three are 0.45 off, one 0.65.
    assert evaluation.total.ece.value == pytest.approx((2 * 0.45 + 0.65) / 3)


def test_intervals_shrink_with_images_and_have_no_width_without_resamples():
    def widths(count, **options):
        truths = [[("dog", DOG)] for _ in range(count)]
        predictions = [[found("dog", DOG)] if number % 3 else [] for number in range(count)]
        total = measured(truths, predictions, **options).total
        return total.recall.high - total.recall.low

    assert widths(15, resamples=200) > 2 * widths(150, resamples=200) > 0
    assert widths(15, resamples=0) == 0


def text(image, wanted, said, subject="dog"):
    return TextAnswer(image, subject, tuple(wanted), said)


@pytest.mark.parametrize(
    ("wanted", "said", "is_exact", "errors"),
    [
        (["STOP"], "stop.", True, 0.75),
        (["STOP"], "SHOP", False, 0.25),
        (["a dog", "a pet"], "a pet", True, 0.0),
        (["STOP\nBUS"], "STOP  BUS", True, 0.0),
        (["STOP"], "", False, 1.0),
        ([""], "", True, 0.0),
    ],
)
def test_a_text_is_compared_with_the_nearest_of_those_wanted(wanted, said, is_exact, errors):
    one = text("0", wanted, said)
    assert one.is_exact is is_exact
    # Upper and lower case are other characters: "stop." has four wrong and one too many.
    assert one.errors == pytest.approx(min(1.0, errors if said != "stop." else 1.0))


def test_texts_have_figures_by_subject_and_the_worst_first():
    answers = [
        text("0", ["dog"], "dog"),
        text("0", ["cat"], "cut", "cat"),
        text("1", ["cat"], "cat", "cat"),
    ]
    evaluation = measure_texts(answers, [LeftOut("2", "It is cut.")], resamples=20)
    assert evaluation.total.exact.value == pytest.approx(2 / 3)
    assert {one.name: one.exact.value for one in evaluation.subjects} == {"dog": 1.0, "cat": 0.5}
    assert evaluation.answers[0].found == "cut"
    assert evaluation.total.character_errors.value == pytest.approx(1 / 9)
    assert evaluation.failed[0].name == "2"
    json.dumps(evaluation.to_dict())
    with pytest.raises(RequestError, match="at least one answer"):
        measure_texts([])

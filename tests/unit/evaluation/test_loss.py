"""What one precision loses against another on the same labeled images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from florence2.evaluation.loss import PrecisionLoss, located_loss, text_loss
from florence2.evaluation.measure import TextAnswer, measure, measure_texts
from florence2.labeled.records import LabeledData, LabeledImage, LabeledObject
from florence2.records import Box

IMAGES = 40
DOG = (10.0, 10.0, 50.0, 50.0)


def labeled(*names, label="dog"):
    images = tuple(
        LabeledImage(Path(name), name, (100, 100), (LabeledObject(label, DOG),)) for name in names
    )
    return LabeledData(Path("data"), "coco", images, (label,))


def found(data, missed=(), score=0.9):
    return {
        image.name: [] if image.name in missed else [Box(DOG, "Dog", score)]
        for image in data.images
    }


NAMES = [f"{number:02}" for number in range(IMAGES)]
DATA = labeled(*NAMES)
EXACT = measure(DATA, found(DATA))


def test_the_loss_is_that_of_average_precision():
    worse = measure(DATA, found(DATA, missed=NAMES[::4]))
    loss = located_loss("<OD>", DATA, EXACT, worse)
    assert (loss.task, loss.figure, loss.images) == ("<OD>", "AP", IMAGES)
    assert (loss.before, loss.after) == (EXACT.total.ap.value, worse.total.ap.value)
    assert loss.points == pytest.approx(100 * (loss.before - loss.after))
    assert 0 < loss.low < loss.points < loss.high
    back = located_loss("<OD>", DATA, worse, EXACT)
    assert back.points == -loss.points


def test_images_are_drawn_for_both_at_once():
    """Of one figure alone the interval is wide; of a loss in one image it is not."""
    half = measure(DATA, found(DATA, missed=NAMES[::2]))
    same = located_loss("<OD>", DATA, half, half)
    assert (same.points, same.low, same.high) == (0.0, 0.0, 0.0)
    less = measure(DATA, found(DATA, missed=[*NAMES[::2], NAMES[1]]))
    loss = located_loss("<OD>", DATA, half, less)
    assert loss.high - loss.low < 50 * (half.total.ap.high - half.total.ap.low)


def test_only_images_that_both_answered_are_compared():
    answered = found(DATA, missed=NAMES[:4])
    worse = measure(DATA, {name: answered[name] for name in NAMES[:8]})
    loss = located_loss("<OD>", DATA, EXACT, worse)
    assert (loss.images, loss.before) == (8, 1.0)
    assert loss.after == worse.total.ap.value


def test_nothing_is_lost_where_nothing_is_there():
    empty = replace(DATA, images=tuple(replace(one, objects=()) for one in DATA.images))
    evaluation = measure(empty, found(empty))
    assert located_loss("<OD>", empty, evaluation, evaluation) is None


TEXTS = {"exact": (True, "exact texts", 50.0), "characters": (False, "right characters", 12.5)}


@pytest.mark.parametrize(("exact", "figure", "points"), TEXTS.values(), ids=TEXTS)
def test_of_texts_it_is_of_exact_ones_or_of_characters(exact, figure, points):
    def read(*texts):
        answers = [
            TextAnswer(name, "text", ("four",), text)
            for name, text in zip(NAMES[: len(texts)], texts, strict=True)
        ]
        return measure_texts(answers)

    loss = text_loss("<OCR>", read("four", "four", "four"), read("four", "foul"), exact=exact)
    assert (loss.figure, loss.images, loss.before) == (figure, 2, 1.0)
    assert loss.points == points


def test_a_loss_is_sentences_and_numbers():
    worse = measure(DATA, found(DATA, missed=NAMES[::4]))
    loss = located_loss("<OD>", DATA, EXACT, worse)
    both = PrecisionLoss("int8", "fp32", (loss,), None)
    assert both.is_too_much
    head, line = both.sentences()
    assert head.startswith("int8 against fp32")
    assert f"<OD> lost {loss.points:.2f} points of AP" in line
    assert both.to_dict()["tasks"][0]["points"] == loss.points
    assert np.isfinite(loss.high)

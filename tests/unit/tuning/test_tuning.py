"""Settings chosen by answers that are there already: what wins, and what is said of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from florence2.errors import RequestError
from florence2.evaluation.operating_points import Objective
from florence2.labeled.records import LabeledData, LabeledImage, LabeledObject
from florence2.records import Box, Result
from serve.predict.annotations import Answered, Found, annotation_from_answers
from serve.predict.predictor import rules_of
from serve.settings import Tiling, parse_settings
from serve.tuning.asking import Answers
from serve.tuning.comparison import Comparison
from serve.tuning.plan import TuningPlan, classes_in, some_of, windows_for
from serve.tuning.report import tune

GROUNDING = "<CAPTION_TO_PHRASE_GROUNDING>"
SIZE = (100, 100)
PLACES = [(10.0, 10.0, 30.0, 30.0), (40.0, 10.0, 60.0, 30.0), (70.0, 10.0, 90.0, 30.0)]
NOTHING_THERE = (10.0, 60.0, 30.0, 80.0)
WINDOWS = Tiling((64, 64), (16, 16))


def labeled(name, *objects):
    return LabeledImage(
        Path(name), name, SIZE, tuple(LabeledObject(label, box) for label, box in objects)
    )


def data(*images, classes=()):
    return LabeledData(Path("labels"), "coco", tuple(images), classes)


class World:
    """Images with some dogs, and what prompts find in them."""

    def __init__(self, num_images=60, seed=0, dogs=(1, 2)):
        self.rng = np.random.default_rng(seed)
        self.images, self.found = [], {}
        for number in range(num_images):
            count = int(self.rng.choice(dogs))
            self.images.append(
                labeled(f"{number:03}", *(("dog", place) for place in PLACES[:count]))
            )

    def prompt(self, text, *, recall, wrong, tiling=0, name="dog", right_score=(0.3, 1.0),
               wrong_score=(0.0, 0.7), boxes=slice(None)):  # fmt: skip
        """A prompt that finds such a share of the dogs, and so many wrong things in an image."""
        for image in self.images:
            shapes = [
                Found(Box(one.box_xyxy, text, float(self.rng.uniform(*right_score))), name)
                for one in image.objects[boxes]
                if self.rng.random() < recall
            ]
            if self.rng.random() < wrong:
                score = float(self.rng.uniform(*wrong_score))
                shapes.append(Found(Box(NOTHING_THERE, text, score), name))
            self.found.setdefault((tiling, name, text), []).append(tuple(shapes))
        return self

    def plan(self, *prompts, nms=(0.7,), tilings=(None,), optimise="f1"):
        return TuningPlan({"dog": prompts}, GROUNDING, tilings, nms, Objective.of(optimise))

    def tuned(self, *prompts, **tried):
        return tune(Answers(self.images, self.found), self.plan(*prompts, **tried))


def test_a_bad_prompt_makes_way_for_the_best():
    world = World().prompt("thing", recall=0.2, wrong=0.9).prompt("dog", recall=0.95, wrong=0.3)
    tuned = world.tuned("thing", "dog")
    assert tuned.settings["mapping"] == {"dog": ["dog"]}
    assert (tuned.num_images, tuned.num_objects) == (60, sum(len(i.objects) for i in world.images))
    [report] = tuned.classes
    bad, good, both = report.compared
    assert [one.prompts for one in report.compared] == [("thing",), ("dog",), ("thing", "dog")]
    assert bad.untuned_f1.value < 0.4 < 0.8 < good.figures.f1.value
    assert report.chosen.figures.f1.value > good.figures.f1.value - 0.02
    assert both.figures.f1.low < both.figures.f1.value < both.figures.f1.high
    assert tuned.mean_f1.value == report.chosen.figures.f1.value
    assert report.notes == ()


@pytest.mark.parametrize(
    ("second", "chosen"),
    [
        pytest.param({"recall": 1.0, "boxes": slice(1, None)}, ["dog", "puppy"], id="finds others"),
        pytest.param({"recall": 0.0}, ["dog"], id="finds nothing new"),
    ],
)
def test_prompts_are_combined_only_where_that_proves_to_be_better(second, chosen):
    world = World(dogs=(2, 3)).prompt("dog", recall=1.0, wrong=0.1, boxes=slice(1))
    world.prompt("puppy", wrong=0.1, **second)
    assert world.tuned("dog", "puppy").settings["mapping"] == {"dog": chosen}


def test_of_many_prompts_the_best_are_combined():
    world = World(num_images=40)
    texts = [f"dog {number}" for number in range(8)]
    for number, text in enumerate(texts):
        world.prompt(text, recall=0.1 * number, wrong=0.1)
    chosen = world.tuned(*texts).settings["mapping"]["dog"]
    assert "dog 7" in chosen
    assert set(chosen) <= set(texts[3:])


@pytest.mark.parametrize(
    ("recall", "wins"),
    [
        pytest.param(0.5, True, id="objects that are seen through windows only"),
        pytest.param(0.95, False, id="nothing much to gain"),
    ],
)
def test_windows_have_to_prove_that_they_are_better(recall, wins):
    world = World().prompt("dog", recall=recall, wrong=0.1)
    world.prompt("dog", recall=0.97, wrong=0.1, tiling=1)
    tuned = world.tuned("dog", tilings=(None, WINDOWS))
    assert ("tiling" in tuned.settings) is wins
    if wins:
        assert parse_settings(tuned.settings).tiling == WINDOWS
    assert [(one.tiling, one.is_chosen) for one in tuned.options] == [
        (None, not wins), (WINDOWS, wins),
    ]  # fmt: skip


def test_what_is_found_in_a_crowd_counts_neither_for_nor_against_a_prompt():
    world = World().prompt("dog", recall=1.0, wrong=1.0)

    def right():
        compared = Comparison(Answers(world.images, world.found), world.plan("dog"))
        return compared.ranking("dog", 0, 0.7, ("dog",)).right

    before = right()
    crowd = LabeledObject("Dog", (0.0, 0.0, float(SIZE[0]), float(SIZE[1])))
    world.images[:] = [replace(image, crowds=(crowd,)) for image in world.images]
    assert before.sum() == right().sum() == right().size < before.size


def test_nms_is_chosen_too():
    world = World().prompt("dog", recall=1.0, wrong=0.0)
    for image, found in zip(world.images, world.found[0, "dog", "dog"], strict=True):
        x1, y1, x2, y2 = image.objects[0].box_xyxy
        double = Found(Box((x1, y1, x2 - 8, y2), "dog", 0.9), "dog")
        place = world.images.index(image)
        world.found[0, "dog", "dog"][place] = (*found, double)
    tuned = world.tuned("dog", nms=(0.7, None, 0.5))
    assert tuned.settings["nms_threshold"] == 0.5
    assert world.tuned("dog", nms=(None,)).settings["nms_threshold"] == "off"


@pytest.mark.parametrize("optimise", ["f1", "precision", "recall@0.9"])
def test_the_written_settings_find_what_was_compared(optimise):
    """Of two prompts and with a calibration: through the labels of the application."""
    world = World(num_images=80).prompt("dog", recall=1.0, wrong=0.5, boxes=slice(1))
    world.prompt("puppy", recall=0.9, wrong=0.6, boxes=slice(1, None))
    tuned = world.tuned("dog", "puppy", optimise=optimise)
    settings = parse_settings(tuned.settings)
    own = tuned.choice.of_class["dog"]
    assert settings.calibration == {"dog": own.curve}
    assert settings.class_thresholds == {"dog": own.threshold}
    found = right = 0
    for place, image in enumerate(world.images):
        answers = [
            Answered(
                Result(GROUNDING, SIZE, tuple(f.shape for f in world.found[0, "dog", p][place]),
                       None, "", (), False),
                "dog", p,
            )
            for p in own.prompts
        ]  # fmt: skip
        labels = annotation_from_answers(answers, rules_of(settings), SIZE)[0].labels
        found += len(labels)
        truth = {one.box_xyxy for one in image.objects}
        right += sum(
            (float(b.left), float(b.top), b.right + 1.0, b.bottom + 1.0) in truth
            for b in (label.geometry for label in labels)
        )
    counts = Comparison(
        Answers(world.images, world.found), world.plan("dog", "puppy", optimise=optimise)
    ).counts("dog", tuned.choice)
    assert (found, right) == (counts.found.sum(), counts.right.sum())
    assert 0.4 * tuned.num_objects < right <= found < 1.5 * right
    if optimise == "recall@0.9":
        assert right >= 0.9 * found


def test_a_calibrated_score_is_worth_what_it_says():
    world = World(num_images=150).prompt(
        "dog", recall=0.8, wrong=1.0, right_score=(0.2, 0.6), wrong_score=(0.0, 0.4)
    )
    [report] = world.tuned("dog").classes
    assert report.calibrated_error.value < 0.13 < 0.2 < report.raw_error.value


@pytest.mark.parametrize(
    ("world", "optimise", "said"),
    [
        pytest.param(
            World(8, dogs=(1,)).prompt("dog", recall=1.0, wrong=0.0), "f1",
            ["only 8 labeled objects", "too few to calibrate"], id="few objects",
        ),
        pytest.param(
            World(30).prompt("dog", recall=0.0, wrong=1.0), "f1",
            [f"No prompt found .* under {GROUNDING}.*--task \"{GROUNDING}\""], id="unknown",
        ),
        pytest.param(
            World(30).prompt("dog", recall=0.0, wrong=0.0), "recall@0.9",
            ["No prompt found a single labeled object"], id="unknown, nothing found",
        ),
        pytest.param(
            World(6, dogs=(0,)).prompt("dog", recall=1.0, wrong=1.0), "f1",
            ["no labeled object of it"], id="no object",
        ),
        pytest.param(
            World(60).prompt("dog", recall=0.9, wrong=1.0, wrong_score=(0.9, 1.0)), "recall@0.99",
            ["No threshold reaches the precision of 0.99"], id="out of reach",
        ),
    ],
)  # fmt: skip
def test_what_the_figures_do_not_prove_is_said(world, optimise, said):
    [report] = world.tuned("dog", optimise=optimise).classes
    assert len(report.notes) == len(said)
    assert all(re.search(part, note) for part, note in zip(said, report.notes, strict=True))


def test_objects_of_one_half_only_are_not_measured():
    world = World(8, dogs=(0,))
    world.images[0] = labeled("000", ("dog", PLACES[0]))
    [report] = world.prompt("dog", recall=1.0, wrong=0.5).tuned("dog").classes
    assert report.chosen.figures.f1.value is None
    assert any("in one half of the images" in note for note in report.notes)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(count):
    world = World(count).prompt("dog", recall=1.0, wrong=0.0)
    with pytest.raises(RequestError, match=f"at least 2 .* there is {count}; label more"):
        world.tuned("dog")


DATA = data(
    labeled("a", ("dog", PLACES[0]), ("Cat", PLACES[1])), labeled("b", ("cat ", PLACES[0])),
    classes=("dog", "Cat", "bird", "traffic_light"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("named", "prompts", "ignored"),
    [
        pytest.param({}, {"dog": ("dog",), "Cat": ("Cat",)}, {}, id="all by their names"),
        pytest.param({"dog": ()}, {"dog": ("dog",)}, {"Cat": 2}, id="others are ignored"),
        pytest.param({"cat": ("kitten",)}, {"Cat": ("kitten",)}, {"dog": 1}, id="in any case"),
        pytest.param(
            {"traffic_light": (), "dog": ("hound",)},
            {"traffic_light": ("traffic light",), "dog": ("hound",)}, {"Cat": 2},
            id="a class without objects, by its name in words",
        ),
    ],
)  # fmt: skip
def test_which_classes_are_tuned(named, prompts, ignored):
    assert classes_in(DATA, named) == (prompts, ignored)


@pytest.mark.parametrize(
    ("source", "named", "message"),
    [
        (DATA, {"dgo": ()}, "Unknown class 'dgo'. Did you mean 'dog'. Known: dog, Cat, bird"),
        (DATA, {"bird": ()}, "there is none of bird"),
        (data(labeled("a")), {}, "'labels' has none; label some first"),
    ],
)
def test_classes_that_cannot_be_tuned_are_one_sentence(source, named, message):
    with pytest.raises(RequestError, match=message):
        classes_in(source, named)


@pytest.mark.parametrize(
    ("task", "prompts", "message"),
    [
        ("<OD>", ("dog",), "<OD> does not; leave out --task"),
        ("<CAPTION_TO_PHRASE_GROUNDING>+<REGION_TO_CATEGORY>", ("dog",), "takes text and finds"),
        (GROUNDING, ("<loc_7>",), "plain words"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(task, prompts, message):
    with pytest.raises(RequestError, match=message):
        TuningPlan({"dog": prompts}, task)


def test_a_prompt_is_tried_once_however_it_is_spelled():
    assert TuningPlan({"dog": ("dog", "a dog", "Dog.")}, GROUNDING).prompts == {"dog": ("dog",)}


@pytest.mark.parametrize(
    ("size_wh", "input_wh", "windows"),
    [
        ((768, 512), (768, 768), None),
        ((900, 700), (768, 768), None),
        ((1000, 700), (768, 768), Tiling((600, 420), (200, 140))),
        ((4000, 3000), (768, 768), Tiling((2400, 1800), (800, 600))),
        ((300, 40), (192, 192), Tiling((180, 32), (60, 16))),
        ((300, 20), (192, 192), Tiling((180, 32), (60, 16))),
    ],
)
def test_windows_are_tried_for_images_larger_than_what_the_network_sees(size_wh, input_wh, windows):
    assert windows_for([size_wh, size_wh, (10, 10)], input_wh) == windows


def test_some_of_the_images_are_the_same_ones_each_time():
    images = [labeled(f"{number}") for number in range(50)]
    some = some_of(images, 10)
    assert len(some) == 10
    assert some_of(images[::-1], 10) == some == some_of(images, 30)[:10]

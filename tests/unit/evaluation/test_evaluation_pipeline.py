"""From held-out scenes to the report, with stand-ins at the model's edge."""

import json
import re

import numpy as np
import pytest
from evaluation_oracle import Oracle

from florence2.errors import FlorenceError, RequestError
from florence2.postprocess import parse_answer_text
from florence2.records import Failure
from florence2_demo.batches import FIRST_TRAINING_SEED
from florence2_demo.demo_images import FIRST_DEMO_SEED
from florence2_demo.evaluation import (
    ALL_TASKS,
    FIGURES,
    HELD_OUT_SEEDS,
    EvaluationPlan,
    evaluate,
    held_out_examples,
    held_out_seeds,
    task_tokens,
)
from florence2_demo.lexicon import KINDS

SCENES = 24


@pytest.fixture(scope="module")
def perfect():
    oracle = Oracle(range(SCENES))
    return oracle, evaluate(oracle, EvaluationPlan(SCENES, batch=5))


def test_the_truth_itself_is_perfect(perfect):
    content = perfect[1].to_dict()
    right = set(FIGURES) - {"od_map", "segmentation_miou", "ocr_cer", "ece"}
    assert {name: content[name] for name in right} == dict.fromkeys(right, 1.0)
    # Location tokens have a thousandth of the image; a strict overlap of a small box feels that.
    assert content["od_map"] > 0.97
    # Answers spell outlines with at most twelve points.
    assert content["segmentation_miou"] > 0.95
    assert content["ocr_cer"] == content["ece"] == content["region_ocr_cer"] == 0.0
    assert content["grounding_precision50"] == content["ovd_precision50"] == 1.0
    assert content["ocr_lines_recall50"] == content["dense_caption_recall50"] == 1.0
    assert content["detailed_caption_exact"] == content["more_detailed_caption_exact"] == 1.0
    assert content["region_description_accuracy"] == content["ocr_silent_without_text"] == 1.0


def test_the_truth_itself_is_well_formed(perfect):
    report = perfect[1]
    assert report.well_formed == dict.fromkeys(ALL_TASKS, 1.0)
    assert report.known_words == dict.fromkeys(ALL_TASKS, 1.0)


def test_each_scene_is_one_picture_for_all_its_tasks(perfect):
    oracle = perfect[0]
    assert oracle.pictures == [5, 5, 5, 5, 4]
    asked = [example for seed in range(SCENES) for example in held_out_examples(seed, ALL_TASKS)]
    assert sum(oracle.calls) == len(asked)


def test_the_report_is_plain_json_with_an_interval_for_every_figure(perfect):
    content = json.loads(json.dumps(perfect[1].to_dict()))
    assert set(FIGURES) <= set(content["interval_95"])
    for name, (low, high) in content["interval_95"].items():
        assert low <= content[name] <= high
        assert content["counts"][name] > 0
    assert (content["scenes"], content["seed"]) == (SCENES, 0)


def figures_of(count, change):
    """The report's figures about a model that answers the truth as ``change`` makes of it."""
    return evaluate(Oracle(range(count), change), EvaluationPlan(count)).to_dict()


def test_an_offset_is_seen():
    def moved(task, answer):
        return re.sub(r"(?<=<loc_)\d+", lambda found: str(min(int(found[0]) + 150, 999)), answer)

    content = figures_of(6, moved)
    assert content["od_map50"] < 0.2
    assert content["grounding_recall50"] < 0.5
    assert content["segmentation_miou"] < 0.5
    assert content["category_accuracy"] == 1.0


def test_wrong_labels_are_nothing_found():
    others = dict(zip(KINDS, KINDS[1:] + KINDS[:1], strict=True))

    def swapped(task, answer):
        return re.sub("|".join(KINDS), lambda found: others[found[0]], answer)

    content = figures_of(6, swapped)
    assert content["od_map50"] < 0.1
    assert content["category_accuracy"] == 0.0
    assert content["caption_exact"] == 0.0
    assert content["proposal_recall50"] == 1.0
    assert content["ece"] > 0.9


def test_junk_is_not_well_formed():
    content = figures_of(3, lambda task, answer: f"{answer}zzz<loc_1>")
    assert set(content["well_formed"].values()) == {0.0}
    assert set(content["known_words"].values()) == {0.0}


def test_silence_is_zero_and_not_an_error():
    content = figures_of(4, lambda task, answer: "")
    assert content["od_map50"] == content["grounding_recall50"] == 0.0
    assert content["ece"] is None


class OutOfMemory(Oracle):
    def answer(self, ask):
        failure = Failure("error", "Out of memory.")
        return failure if ask.task == "<OCR>" else super().answer(ask)


class Gone(Oracle):
    def answer(self, ask):
        raise FlorenceError("The device is gone.")


class Scoreless(Oracle):
    def answer(self, ask):
        whole = super().answer(ask)
        return parse_answer_text(ask.task, whole.answer, whole.size_wh)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (OutOfMemory, r"could not answer <OCR> about scene 0.*Out of memory"),
        (Gone, "The device is gone"),
        (Scoreless, "score for every box"),
    ],
)
def test_a_model_that_fails_has_no_figures(model, sentence):
    with pytest.raises(FlorenceError, match=sentence):
        evaluate(model(range(2)), EvaluationPlan(2))


def test_some_tasks_only():
    plan = EvaluationPlan(3, tasks=task_tokens(["ocr", "<CAPTION>"]))
    content = evaluate(Oracle(range(3)), plan).to_dict()
    assert content["tasks"] == ["<CAPTION>", "<OCR>"]
    assert content["caption_exact"] == 1.0
    assert content["od_map50"] is None
    assert "od_map50" not in content["interval_95"]


def test_questions_are_the_same_every_time_and_whatever_else_is_asked():
    alone = [q for seed in range(30) for q in held_out_examples(seed, ["<REGION_TO_CATEGORY>"])]
    among = [q for seed in range(30) for q in held_out_examples(seed, ALL_TASKS)]
    assert alone == [q for q in among if q.task == "<REGION_TO_CATEGORY>"]
    assert len({q.truth.answer for q in alone}) > 20


@pytest.mark.parametrize(
    ("seed", "count", "words"),
    [
        (-1, 3, "0 to 399999"),
        (399_999, 2, "lower seed"),
        (0, 0, "At least one"),
        (10**7, 1, "fewer"),
    ],
)
def test_scenes_that_are_not_held_out_are_refused(seed, count, words):
    with pytest.raises(RequestError, match=words):
        held_out_seeds(seed, count)


def test_nothing_else_draws_held_out_scenes():
    assert list(held_out_seeds(399_998, 2)) == [399_998, 399_999]
    assert HELD_OUT_SEEDS[-1] < min(FIRST_DEMO_SEED, FIRST_TRAINING_SEED, 500_000)


def test_the_interval_shrinks_with_more_scenes():
    def flaky(task, answer):
        return "" if sum(map(ord, answer)) % 2 else answer

    widths = []
    for count in (8, 64):
        plan = EvaluationPlan(count, tasks=("<CAPTION>",))
        found = evaluate(Oracle(range(count), flaky), plan).figures["caption_exact"]
        assert found.low <= found.value <= found.high
        widths.append(found.high - found.low)
    assert widths[1] < 0.6 * widths[0]
    assert np.isfinite(widths).all()

"""From held-out scenes to the report, with stand-ins at the model's edge."""

import json

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
    Plan,
    evaluate,
    held_out_examples,
    held_out_seeds,
    task_tokens,
)

SCENES = 24


@pytest.fixture(scope="module")
def perfect():
    oracle = Oracle(range(SCENES))
    return oracle, evaluate(oracle, Plan(SCENES, batch=5))


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
    assert sum(oracle.calls) == sum(
        len(held_out_examples(seed, ALL_TASKS)) for seed in range(SCENES)
    )


def test_the_report_is_plain_json_with_an_interval_for_every_figure(perfect):
    content = json.loads(json.dumps(perfect[1].to_dict()))
    assert set(FIGURES) <= set(content["interval_95"])
    for name, (low, high) in content["interval_95"].items():
        assert low <= content[name] <= high
        assert content["counts"][name] > 0
    assert (content["scenes"], content["seed"]) == (SCENES, 0)


def test_an_offset_is_seen():
    def moved(task, answer):
        for number in range(999, -1, -1):
            answer = answer.replace(f"<loc_{number}>", f"<loc_{min(number + 150, 999)}>")
        return answer

    content = evaluate(Oracle(range(6), moved), Plan(6)).to_dict()
    assert content["od_map50"] < 0.2
    assert content["grounding_recall50"] < 0.5
    assert content["segmentation_miou"] < 0.5
    assert content["category_accuracy"] == 1.0


def test_wrong_labels_are_nothing_found():
    kinds = {"ball": "box", "box": "ball", "star": "heart", "heart": "star", "house": "tree"}
    kinds |= {"tree": "house", "car": "fish", "fish": "car", "cup": "moon", "moon": "cup"}
    kinds |= {"flower": "arrow", "arrow": "flower"}

    def swapped(task, answer):
        for number, kind in enumerate(kinds):
            answer = answer.replace(kind, f"#{number}#")
        for number, kind in enumerate(kinds.values()):
            answer = answer.replace(f"#{number}#", kind)
        return answer

    content = evaluate(Oracle(range(6), swapped), Plan(6)).to_dict()
    assert content["od_map50"] < 0.1
    assert content["category_accuracy"] == 0.0
    assert content["caption_exact"] == 0.0
    assert content["proposal_recall50"] == 1.0
    assert content["ece"] > 0.9


def test_junk_is_not_well_formed():
    report = evaluate(Oracle(range(3), lambda task, answer: f"{answer}zzz<loc_1>"), Plan(3))
    assert set(report.well_formed.values()) == {0.0}
    assert set(report.known_words.values()) == {0.0}


def test_silence_is_zero_and_not_an_error():
    content = evaluate(Oracle(range(4), lambda task, answer: ""), Plan(4)).to_dict()
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
        evaluate(model(range(2)), Plan(2))


def test_some_tasks_only():
    plan = Plan(3, tasks=task_tokens(["ocr", "<CAPTION>"]))
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
        plan = Plan(count, tasks=("<CAPTION>",))
        found = evaluate(Oracle(range(count), flaky), plan).figures["caption_exact"]
        assert found.low <= found.value <= found.high
        widths.append(found.high - found.low)
    assert widths[1] < 0.6 * widths[0]
    assert np.isfinite(widths).all()

"""Definitions of a score, compared on the same boxes."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from florence2.errors import FlorenceError
from florence2.evaluation.detection import ImageBoxes
from florence2.postprocess import parse
from florence2.records import Result, TokenKind
from florence2.tasks import find_task
from florence2.tokenizer import tokens_from_text
from florence2_demo.score_study import DEFINITIONS, OURS, ScoreStudy


def spelled(answer, exact, near, label):
    """Tokens of these probabilities, and the result they are parsed to."""
    chances = {TokenKind.LOCATION: (exact, near), TokenKind.TEXT: (label, label)}
    tokens = [
        replace(
            token,
            log_prob=math.log(chances[token.kind][0]),
            near_log_prob=math.log(chances[token.kind][1]),
        )
        for token in tokens_from_text(answer)
    ]
    parsed = parse(tokens, find_task("<OD>"), (100, 100))
    return tokens, Result("<OD>", (100, 100), parsed.objects, None, answer, (), truncated=False)


def study_of(tokens, result):
    study = ScoreStudy(SimpleNamespace(answer_tokens=lambda *_: tokens))
    boxes = tuple(box.box_xyxy for box in result.objects)
    labels = tuple(box.label for box in result.objects)
    study.add(0, ImageBoxes(boxes, labels, (1.0,) * len(boxes), (), ()), result)
    return study


def test_each_definition_by_hand():
    study = study_of(*spelled("car<loc_1><loc_2><loc_300><loc_400>", 0.1, 0.5, 0.8))
    scores = {name: found[0][0] for name, found in study.scores.items()}
    assert scores == pytest.approx(
        {
            OURS: 0.4,
            "exact mean x label mean": 0.08,
            "near mean": 0.5,
            "exact mean": 0.1,
            "label mean": 0.8,
            "near mean x label product": 0.4,
            "near product x label product": 0.5**4 * 0.8,
            "exact product x label product": 0.1**4 * 0.8,
            "mean of near and label": (0.5**4 * 0.8) ** 0.2,
            "lowest of near and label": 0.5,
        }
    )
    assert set(scores) == {OURS, *DEFINITIONS}


def test_ours_is_the_score_that_results_carry():
    answer = "cup<loc_5><loc_6><loc_700><loc_800>car<loc_1><loc_1><loc_1><loc_9>"
    tokens, result = spelled(answer, 0.1, 0.5, 0.8)
    study = study_of(tokens, result)
    assert list(study.scores[OURS][0]) == [box.score for box in result.objects]


def test_boxes_that_do_not_line_up_are_an_error():
    tokens, result = spelled("car<loc_1><loc_2><loc_300><loc_400>", 0.1, 0.5, 0.8)
    with pytest.raises(FlorenceError, match="spells 0 boxes and 1 were read"):
        study_of(tokens[:2], result)

"""Definitions of a score, compared on the same boxes."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from florence2.errors import FlorenceError
from florence2.evaluation.questions import questions_about
from florence2.evaluation.score_study import DEFINITIONS, OURS, ScoreStudy
from florence2.postprocess import parse
from florence2.records import Result
from florence2.tasks import find_task
from florence2.tokenizer import PieceKind, pieces_from_text


def spelled(answer, exact, near, label):
    """Pieces of these probabilities, and the result they are parsed to."""
    chances = {PieceKind.LOCATION: (exact, near), PieceKind.TEXT: (label, label)}
    pieces = [
        replace(
            piece,
            log_prob=math.log(chances[piece.kind][0]),
            near_log_prob=math.log(chances[piece.kind][1]),
        )
        for piece in pieces_from_text(answer)
    ]
    parsed = parse(pieces, find_task("<OD>"), (100, 100))
    return pieces, Result("<OD>", (100, 100), parsed.objects, None, answer, (), truncated=False)


def study_of(question, pieces, result):
    study = ScoreStudy(SimpleNamespace(pieces=lambda *_: pieces))
    study.see(0, question, result)
    return study


@pytest.fixture
def question():
    return questions_about(0, ["<OD>"])[0]


def test_each_definition_by_hand(question):
    study = study_of(question, *spelled("car<loc_1><loc_2><loc_300><loc_400>", 0.1, 0.5, 0.8))
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


def test_ours_is_the_score_that_results_carry(question):
    pieces, result = spelled(
        f"{question.truth.answer}car<loc_1><loc_1><loc_1><loc_9>", 0.1, 0.5, 0.8
    )
    study = study_of(question, pieces, result)
    assert list(study.scores[OURS][0]) == [box.score for box in result.objects]


def test_other_tasks_are_passed_over(question):
    other = questions_about(0, ["<CAPTION>"])[0]
    assert study_of(other, *spelled("car", 1, 1, 1)).qualities() == {}


def test_boxes_that_do_not_line_up_are_an_error(question):
    pieces, result = spelled("car<loc_1><loc_2><loc_300><loc_400>", 0.1, 0.5, 0.8)
    with pytest.raises(FlorenceError, match="spells 0 boxes and 1 were read"):
        study_of(question, pieces[:2], result)

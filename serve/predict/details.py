"""What a prediction was made of, for those who ask: tokens, raw answers, seconds of each stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Final

from florence2.records import AnswerToken, Result, Text, Timings, TokenKind
from florence2.tasks import find_task
from serve.naming import clean_text
from serve.predict.annotations import IMAGE_TEXT_TAGS, Answered, Found
from serve.predict.predictor import Predicted
from serve.sdk import sly

_DIGITS: Final = 6


def details_of(predicted: Predicted) -> dict[str, Any]:
    """Plain JSON beside an annotation.

    - ``seconds`` of ``vision``, ``prompt`` and ``decode``, of the batches it was part of;
    - ``is_image_encoded_before``: its features were there, so there was no vision stage;
    - ``answers``: what the model generated, in the order of the questions and their steps;
    - ``objects``: for each of the annotation's the exact score and the tokens that spell it, and
      the ``raw_score`` of the model where a calibration made another one of it;
    - ``texts``: the same for the tags of the image.

    A ``probability`` is the model's for this very token, and ``near_probability`` that of its
    place or one within 2 % of the image, which is what counts in a score. Both are null where
    unknown.
    """
    timings_s = _timings_s(predicted.results)
    return {
        "seconds": {stage: round(seconds, _DIGITS) for stage, seconds in timings_s.items()},
        "is_image_encoded_before": timings_s.vision == 0.0,
        "answers": [answer for one in predicted.answered for answer in _answers(one)],
        "objects": [
            _object(located) if located else _spelled(None, ()) for located in predicted.located
        ],
        "texts": [text for result in predicted.results for text in _texts(result)],
    }


def slides_of(predicted: Predicted) -> dict[str, Any]:
    """What a client shows of its sliding window: each window with its labels, then all of them.

    Of the annotation's labels, those of a window are the ones whose middle lies in it. The last
    two slides are the whole image, where the SDK has it before and after doubles are dropped.
    """
    labels = [
        (label.geometry.to_bbox().center, label.to_json()) for label in predicted.annotation.labels
    ]
    height, width = predicted.annotation.img_size
    slides = []
    for left, top, right, bottom in (*predicted.views_xyxy, *[(0, 0, width, height)] * 2):
        window = sly.Rectangle(top, left, bottom - 1, right - 1)
        seen = [label for middle, label in labels if window.contains_point_location(middle)]
        slides.append({"rectangle": window.to_json(), "labels": seen})
    return {"slides": slides}


def _timings_s(results: Sequence[Result]) -> Timings:
    """Steps come one after the other; the regions of a step, and questions, share their batches."""
    of_results = [_timings_of_steps(result) for result in results]
    return Timings(*(max((one[stage] for one in of_results), default=0.0) for stage in Timings()))


def _timings_of_steps(result: Result) -> Timings:
    steps = [list(group) for _, group in groupby(_steps(result), key=lambda step: step.task)]

    def seconds(stage: str) -> float:
        return sum(max(one.timings_s[stage] for one in step) for step in steps)

    return Timings(result.timings_s.vision, seconds("prompt"), seconds("decode"))


def _steps(result: Result) -> Sequence[Result]:
    return result.steps or (result,)


def _answers(answered: Answered) -> list[dict[str, Any]]:
    region = answered.region
    asked = {
        "text": answered.phrase,
        "class": answered.class_name,
        "region": None if region is None else list(region.box_xyxy),
    }
    return [
        {
            "task": step.task.rsplit("+", 1)[-1],
            **(asked if number == 0 else dict.fromkeys(asked)),
            "answer": step.answer,
            "is_truncated": step.truncated,
        }
        for number, step in enumerate(_steps(answered.result))
    ]


def _texts(result: Result) -> list[dict[str, Any]]:
    first = _steps(result)[0]
    tag = IMAGE_TEXT_TAGS.get(find_task(first.task.split("+", 1)[0]).token)
    if tag is None:
        return []
    return [
        {"tag": tag, "text": clean_text(found.label), **_spelled(found.score, found.tokens)}
        for found in first.objects
        if isinstance(found, Text)
    ]


def _object(found: Found) -> dict[str, Any]:
    spelled = _spelled(found.score, found.shape.tokens)
    return spelled if found.raw_score is None else {**spelled, "raw_score": found.raw_score}


def _spelled(score: float | None, tokens: Sequence[AnswerToken]) -> dict[str, Any]:
    is_known = score is not None and math.isfinite(score)
    return {
        "score": score if is_known else None,
        "tokens": [_token(token) for token in tokens],
    }


def _token(token: AnswerToken) -> dict[str, Any]:
    # Bytes that are part of a character stand as they are.
    text = token.data.decode(errors="backslashreplace")
    spelled = {"text": text, "probability": _probability(token.log_prob)}
    if token.kind is TokenKind.LOCATION:
        spelled["near_probability"] = _probability(token.near_log_prob)
    return spelled


def _probability(log_prob: float | None) -> float | None:
    if log_prob is None or math.isnan(log_prob):
        return None
    return round(math.exp(min(log_prob, 0.0)), _DIGITS)

"""Which definition of a score ranks right boxes over wrong ones best, on the same predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from florence2.errors import FlorenceError
from florence2.evaluation.detection import (
    ImageBoxes,
    MeanAveragePrecision,
    auroc,
    pooled,
    rankings,
)
from florence2.postprocess import Notes, location_groups, object_score, split_spans
from florence2.records import AnswerToken, Result
from florence2.tokenizer import Vocabulary

LogProbs = Sequence[float]


def _mean(values: LogProbs) -> float:
    return math.fsum(values) / len(values) if values else 0.0


@dataclass(frozen=True, slots=True)
class BoxTokens:
    """Log-probabilities of a box: its locations exactly, its locations give or take NEAR_BINS,
    and the tokens of its label.
    """

    exact: LogProbs
    near: LogProbs
    label: LogProbs


OURS: Final = "near mean x label mean (ours)"
DEFINITIONS: Final[dict[str, Callable[[BoxTokens], float]]] = {
    "exact mean x label mean": lambda box: _mean(box.exact) + _mean(box.label),
    "near mean": lambda box: _mean(box.near),
    "exact mean": lambda box: _mean(box.exact),
    "label mean": lambda box: _mean(box.label),
    "near mean x label product": lambda box: _mean(box.near) + math.fsum(box.label),
    "near product x label product": lambda box: math.fsum((*box.near, *box.label)),
    "exact product x label product": lambda box: math.fsum((*box.exact, *box.label)),
    "mean of near and label": lambda box: _mean((*box.near, *box.label)),
    "lowest of near and label": lambda box: min((*box.near, *box.label)),
}
"""The logarithm of a score, from the tokens of a box."""


@dataclass(slots=True)
class ScoreStudy:
    """Collects the boxes of ``<OD>`` answers with their score by every definition."""

    vocabulary: Vocabulary
    images: list[ImageBoxes] = field(default_factory=list)
    scores: dict[str, list[tuple[float, ...]]] = field(default_factory=dict)

    def add(self, seed: int, found: ImageBoxes, result: Result) -> None:
        """One answer to ``<OD>`` about the scene of a seed, and the boxes that were read in it."""
        spelled = _spelled_boxes(
            self.vocabulary.answer_tokens(result.token_ids, result.log_probs, result.near_log_probs)
        )
        if len(spelled) != len(found.boxes):
            raise FlorenceError(
                f"The answer about scene {seed} spells {len(spelled)} boxes and "
                f"{len(found.boxes)} were read; scores cannot be compared."
            )
        self.images.append(found)
        ours = tuple(object_score(place, label) or 0.0 for place, label in spelled)
        self.scores.setdefault(OURS, []).append(ours)
        tokens = [_tokens(place, label) for place, label in spelled]
        for name, define in DEFINITIONS.items():
            own = tuple(math.exp(min(define(box), 0.0)) for box in tokens)
            self.scores.setdefault(name, []).append(own)

    def rows(self) -> dict[str, dict[str, float | None]]:
        """How well each definition ranks (AP at 0.5, AUROC of right over wrong) and means (ECE).

        The one in use is first; None is a figure of nothing.
        """
        return {name: self._row(scores) for name, scores in self.scores.items()}

    def _row(self, scores: Sequence[tuple[float, ...]]) -> dict[str, float | None]:
        images = [
            replace(image, scores=own) for image, own in zip(self.images, scores, strict=True)
        ]
        ones = np.ones(len(images))
        judged = pooled(images)
        figures = {
            "map50": MeanAveragePrecision(rankings(images, (0.5,))).value(ones),
            "auroc": auroc(judged.scores, judged.right),
            "ece": judged.value(ones),
        }
        return {name: None if np.isnan(v) else round(v, 4) for name, v in figures.items()}


def _tokens(place: Sequence[AnswerToken], label: Sequence[AnswerToken]) -> BoxTokens:
    return BoxTokens(
        [_known(token.log_prob) for token in place],
        [_known(token.near_log_prob) for token in place],
        [_known(token.log_prob) for token in label],
    )


def _known(log_prob: float | None) -> float:
    return -math.inf if log_prob is None else log_prob


def _spelled_boxes(
    tokens: Sequence[AnswerToken],
) -> list[tuple[list[AnswerToken], list[AnswerToken]]]:
    """The tokens of each box and of its label, for the boxes that the parser keeps."""
    spelled = []
    for span in split_spans(tokens, Notes()):
        for group in location_groups(span.place_tokens, 4, Notes()) if span.label else ():
            x1, y1, x2, y2 = (token.location_bin for token in group)
            if x1 != x2 and y1 != y2:
                spelled.append((group, span.label_tokens))
    return spelled

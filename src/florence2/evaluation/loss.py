"""How much worse one precision answers than another, on the same labeled images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from florence2.conversion.measured_loss import MOST_POINTS, TaskLoss
from florence2.evaluation.detection import IOU_THRESHOLDS, MeanAveragePrecision, rankings
from florence2.evaluation.measure import (
    ClassNames,
    Evaluation,
    TextAnswer,
    TextEvaluation,
    image_boxes,
)
from florence2.evaluation.metrics import (
    RESAMPLES,
    Floats,
    Metric,
    Ratio,
    estimate,
    resamplings,
)
from florence2.labeled.records import LabeledData


@dataclass(frozen=True, slots=True)
class PrecisionLoss:
    """``precision`` beside ``against``: what each task lost, and why that may say too little."""

    precision: str
    against: str
    tasks: tuple[TaskLoss, ...]
    why_not: str | None

    @property
    def is_too_much(self) -> bool:
        """Whether some task lost a point or more, however few images say so."""
        return any(one.points >= MOST_POINTS for one in self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {"precision": self.against, "tasks": [asdict(one) for one in self.tasks]}

    def sentences(self) -> list[str]:
        """A headline, and one for each task."""
        head = f"{self.precision} against {self.against}, the same images asked the same:"
        return [head, *(f"  {one}" for one in self.tasks)]


@dataclass(frozen=True, slots=True)
class _Points:
    """Hundredths that ``after`` is below ``before``; each drawing of images is of both."""

    before: Metric
    after: Metric

    @property
    def count(self) -> int:
        return self.before.count

    def value(self, weights: Floats) -> float:
        return 100 * (self.before.value(weights) - self.after.value(weights))


def located_loss(
    task: str,
    data: LabeledData,
    before: Evaluation,
    after: Evaluation,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> TaskLoss | None:
    """The loss of average precision in the images of ``data`` that both answered.

    None where these have no objects. The interval is over images drawn with replacement, the same
    ones for both.
    """
    names = ClassNames(data)
    found = [{one.name: one.found for one in both.images} for both in (before, after)]
    images = [one for one in data.images if all(one.name in both for both in found)]
    metrics = [
        MeanAveragePrecision(
            rankings(
                [image_boxes(one, both[one.name], names, before.by) for one in images],
                IOU_THRESHOLDS,
            )
        )
        for both in found
    ]
    return _loss(task, "AP", metrics, len(images), resamples, seed)


def text_loss(
    task: str,
    before: TextEvaluation,
    after: TextEvaluation,
    *,
    exact: bool,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> TaskLoss | None:
    """The loss of the share of texts that are ``exact``, or else of characters that are right."""
    of_both = [{one.image for one in both.answers} for both in (before, after)]
    images = sorted(of_both[0] & of_both[1])
    metrics = [_right(both.answers, images, exact=exact) for both in (before, after)]
    figure = "exact texts" if exact else "right characters"
    return _loss(task, figure, metrics, len(images), resamples, seed)


def _right(answers: Iterable[TextAnswer], images: Sequence[str], *, exact: bool) -> Ratio:
    numbers = {name: number for number, name in enumerate(images)}
    right, asked = np.zeros(len(images)), np.zeros(len(images))
    for one in answers:
        if one.image in numbers:
            right[numbers[one.image]] += one.is_exact if exact else 1 - one.errors
            asked[numbers[one.image]] += 1
    return Ratio(right, asked)


def _loss(
    task: str, figure: str, metrics: Sequence[Metric], images: int, resamples: int, seed: int
) -> TaskLoss | None:
    before, after = metrics
    points = estimate(_Points(before, after), resamplings(images, seed, resamples))
    if points.value is None or points.low is None or points.high is None:
        return None
    every = np.ones(images)
    return TaskLoss(
        task,
        figure,
        images,
        before.value(every),
        after.value(every),
        points.value,
        points.low,
        points.high,
    )

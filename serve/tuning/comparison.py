"""Settings compared on answers that are there already, without the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final

import numpy as np

from florence2.evaluation.calibration import Curve, calibrated, calibration_curve
from florence2.evaluation.detection import ImageBoxes, Ranking, ranking
from florence2.evaluation.metrics import Floats, resamplings
from florence2.evaluation.operating_points import Counts, counts_at, simplest
from florence2.labeled.records import LabeledObject
from florence2.records import BoxXyxy
from serve.naming import clean_class_name
from serve.predict.annotations import each_once
from serve.predict.geometry import known_score, outer_box
from serve.predict.predictor import rules_of
from serve.tuning.asking import Answers
from serve.tuning.plan import Prompts, TuningPlan

MAX_COMBINED: Final = 5
"""All combinations of so many prompts of a class are tried; of more, those of the best."""
RESAMPLING_SEED: Final = 0
_RESAMPLES: Final = 500


@dataclass(frozen=True, slots=True)
class ClassChoice:
    """The prompts of a class, the threshold of its confidence, and what its scores are worth.

    ``threshold`` is about calibrated scores where there is a ``curve``. ``is_met`` says that the
    objective's floor was reached where this was chosen.
    """

    prompts: Prompts
    threshold: float = 0.0
    curve: Curve | None = None
    is_met: bool = True


@dataclass(frozen=True, slots=True)
class Choice:
    """Settings that were chosen on some images."""

    tiling: int
    nms: float | None
    of_class: Mapping[str, ClassChoice]


class Comparison:
    """Settings compared on answers that are there already, on any part of the images."""

    def __init__(self, answers: Answers, plan: TuningPlan) -> None:
        self._answers, self._plan = answers, plan
        self._rankings: dict[tuple[str, int, float | None, Prompts], Ranking] = {}
        self._truth = {
            name: [(_boxes_of(i.objects, name), _boxes_of(i.crowds, name)) for i in answers.images]
            for name in plan.prompts
        }

    @property
    def num_images(self) -> int:
        return len(self._answers.images)

    def ranking(self, name: str, tiling: int, nms: float | None, prompts: Prompts) -> Ranking:
        """All that is found of a class by some prompts, by its raw scores."""
        key = (name, tiling, nms, prompts)
        if key not in self._rankings:
            self._rankings[key] = self._ranked(*key)
        return self._rankings[key]

    def _ranked(self, name: str, tiling: int, nms: float | None, prompts: Prompts) -> Ranking:
        rules = replace(rules_of(self._plan.settings), nms_threshold=nms)
        lists = [self._answers.found[tiling, name, prompt] for prompt in prompts]
        images = []
        for (truth, crowds), *of_prompts in zip(self._truth[name], *lists, strict=True):
            kept = each_once([item for found in of_prompts for item in found], rules)
            boxes = tuple(outer_box(item.shape) or (0.0, 0.0, 0.0, 0.0) for item in kept)
            scores = tuple(known_score(item.score) for item in kept)
            labels, true_labels = (name,) * len(boxes), (name,) * len(truth)
            images.append(
                ImageBoxes(
                    boxes,
                    labels,
                    scores,
                    truth,
                    true_labels,
                    crowd_boxes=crowds,
                    crowd_labels=(name,) * len(crowds),
                )
            )
        return ranking(images, name, (self._plan.iou,), most=None)

    def choose(self, weights: Floats) -> tuple[Choice, list[Floats]]:
        """What is best on the images with a weight [S], and every option's mean values [1 + R]."""
        chances = np.vstack([weights, _resampled(weights)])
        options = [
            (tiling, nms) for tiling in range(len(self._plan.tilings)) for nms in self._plan.nms
        ]
        choices: list[Choice] = []
        values: list[Floats] = []
        for tiling, nms in options:
            of_class = {}
            of_option = []
            for name in self._plan.prompts:
                chosen, own = self._choose_prompts(name, tiling, nms, chances)
                of_class[name] = chosen
                if (weights @ self.ranking(name, tiling, nms, chosen.prompts).positives) > 0:
                    of_option.append(own)
            choices.append(Choice(tiling, nms, of_class))
            values.append(np.mean(of_option, axis=0) if of_option else np.zeros(len(chances)))
        complexity = [
            (self._plan.tilings[tiling] is not None, tiling, self._plan.nms.index(nms))
            for tiling, nms in options
        ]
        best = choices[simplest(np.array(values), complexity)]
        finished = {name: self._finish(name, best, weights) for name in best.of_class}
        return replace(best, of_class=finished), values

    def _choose_prompts(
        self, name: str, tiling: int, nms: float | None, chances: Floats
    ) -> tuple[ClassChoice, Floats]:
        """The prompts of a class and their values [1 + R]."""
        objective, weights = self._plan.objective, chances[0]

        def tried(prompts: Prompts) -> tuple[Prompts, float, Floats]:
            ranking = self.ranking(name, tiling, nms, prompts)
            threshold = objective.threshold(ranking, weights)
            return prompts, threshold, objective.values(counts_at(ranking, threshold), chances)

        prompts = self._plan.prompts[name]
        alone = [tried((prompt,)) for prompt in prompts]
        ranked = sorted(range(len(alone)), key=lambda one: (-alone[one][2][0], one))
        best = [prompts[one] for one in sorted(ranked[:MAX_COMBINED])]
        together = [
            tried(several)
            for count in range(2, len(best) + 1)
            for several in combinations(best, count)
        ]
        candidates = [*alone, *together]
        values = np.array([own for _, _, own in candidates])
        taken = simplest(values, [(len(some),) for some, _, _ in candidates])
        chosen, threshold, own = candidates[taken]
        return ClassChoice(chosen, threshold), own

    def _finish(self, name: str, choice: Choice, weights: Floats) -> ClassChoice:
        """With the curve of its scores, and the threshold in units of that curve."""
        prompts = choice.of_class[name].prompts
        ranking = self.ranking(name, choice.tiling, choice.nms, prompts)
        is_in = weights[ranking.images] > 0
        curve = None
        if weights @ ranking.positives > 0:
            curve = calibration_curve(ranking.scores[is_in], ranking.right[0][is_in])
        return self._with_threshold(name, choice, prompts, curve, weights)

    def _with_threshold(
        self, name: str, choice: Choice, prompts: Prompts, curve: Curve | None, weights: Floats
    ) -> ClassChoice:
        ranking = self.ranking(name, choice.tiling, choice.nms, prompts)
        in_units = replace(ranking, scores=calibrated(ranking.scores, curve))
        objective = self._plan.objective
        threshold = objective.threshold(in_units, weights)
        is_met = objective.is_met(counts_at(in_units, threshold), weights)
        return ClassChoice(prompts, threshold, curve, is_met)

    def counts(self, name: str, choice: Choice) -> Counts:
        """What a class's choice finds in every image."""
        own = choice.of_class[name]
        ranking = self.ranking(name, choice.tiling, choice.nms, own.prompts)
        in_units = replace(ranking, scores=calibrated(ranking.scores, own.curve))
        return counts_at(in_units, own.threshold)

    def is_found(self, name: str) -> bool:
        """Whether any prompt of a class, with any tiling, finds an object of it."""
        return any(
            self.ranking(name, tiling, nms, (prompt,)).right.any()
            for tiling in range(len(self._plan.tilings))
            for nms in self._plan.nms
            for prompt in self._plan.prompts[name]
        )

    def instead(self, name: str, choice: Choice, prompts: Prompts, weights: Floats) -> Choice:
        """Other prompts of a class in the place of the chosen ones, with their best threshold."""
        own = self._with_threshold(name, choice, prompts, None, weights)
        return replace(choice, of_class={**choice.of_class, name: own})


def _boxes_of(objects: Iterable[LabeledObject], name: str) -> tuple[BoxXyxy, ...]:
    key = name.casefold()
    labels = ((clean_class_name(one.label).casefold(), one.box_xyxy) for one in objects)
    return tuple(box_xyxy for label, box_xyxy in labels if label == key)


def _resampled(weights: Floats) -> Floats:
    """Resamplings [R, S] of the images that have a weight [S]."""
    chances = np.zeros((_RESAMPLES, len(weights)))
    chosen = np.flatnonzero(weights)
    if len(chosen):
        chances[:, chosen] = resamplings(len(chosen), RESAMPLING_SEED, _RESAMPLES)
    return chances

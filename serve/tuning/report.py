"""The settings that win, and what they are worth on images that they were not chosen on.

What is chosen on one half of the images is measured on the other, both ways round; the settings
themselves are chosen on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from florence2.errors import RequestError
from florence2.evaluation.calibration import MIN_JUDGED, calibrated, calibration_curve
from florence2.evaluation.detection import CalibrationError, Ranking
from florence2.evaluation.metrics import Estimate, Floats, Metric, Ratio, estimate, resamplings
from florence2.evaluation.operating_points import Counts
from serve.settings import Tiling, parse_settings, raw_settings
from serve.tuning.asking import Answers
from serve.tuning.comparison import RESAMPLING_SEED, Choice, ClassChoice, Comparison
from serve.tuning.plan import UNTUNED_NMS, Prompts, TuningPlan

FEW_OBJECTS: Final = 20
"""With fewer labeled objects of a class its figures say little."""
MIN_IMAGES: Final = 2


@dataclass(frozen=True, slots=True)
class Figures:
    """Precision, recall and F1 with their 95 % intervals."""

    precision: Estimate
    recall: Estimate
    f1: Estimate


@dataclass(frozen=True, slots=True)
class PromptFigures:
    """How good prompts are: with a threshold from one half on the other half of the images, and the
    F1 that they have without a threshold, tiling and any NMS but the usual.
    """

    prompts: Prompts
    figures: Figures
    untuned_f1: Estimate


@dataclass(frozen=True, slots=True)
class ClassReport:
    """What is known of a class. ``compared`` are its prompts one by one, then all together.

    The errors (ECE) are those of the chosen prompts' scores: as the model gives them, and
    calibrated by the other half of the images; None where that has too few.
    """

    name: str
    num_objects: int
    compared: tuple[PromptFigures, ...]
    chosen: PromptFigures
    raw_error: Estimate
    calibrated_error: Estimate | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Option:
    """A tiling and an NMS threshold, and the mean of all classes' values with them."""

    tiling: Tiling | None
    nms: float | None
    value: Estimate
    is_chosen: bool


@dataclass(frozen=True, slots=True)
class Tuned:
    """The settings that won, and what they and the others are worth."""

    settings: dict[str, Any]
    choice: Choice
    classes: tuple[ClassReport, ...]
    options: tuple[Option, ...]
    mean_f1: Estimate
    num_images: int
    num_objects: int


def tune(answers: Answers, plan: TuningPlan) -> Tuned:
    """The best settings by the answers, and figures of images that they were not chosen on.

    RequestError for fewer than two images.
    """
    comparison = Comparison(answers, plan)
    size = comparison.num_images
    if size < MIN_IMAGES:
        raise RequestError(
            f"What is chosen on some images is judged on others, so tuning needs at least "
            f"{MIN_IMAGES} that can be asked about, and there is {size}; label more."
        )
    # In the order of their hash, so that the halves are as good as drawn.
    first = (np.arange(size) < size - size // 2).astype(np.float64)
    everything = np.ones(size)
    choice, values = comparison.choose(everything)
    of_halves = [comparison.choose(half)[0] for half in (first, 1 - first)]
    reports = _Reports(
        comparison, plan, choice, first, of_halves, resamplings(size, RESAMPLING_SEED)
    )
    classes = tuple(reports.of_class(name) for name in plan.prompts)
    return Tuned(
        settings=_settings_of(choice, plan),
        choice=choice,
        classes=classes,
        options=_options(plan, choice, values),
        mean_f1=reports.mean_f1(),
        num_images=size,
        num_objects=sum(report.num_objects for report in classes),
    )


def _options(plan: TuningPlan, choice: Choice, values: Sequence[Floats]) -> tuple[Option, ...]:
    options = []
    pairs = [(tiling, nms) for tiling in range(len(plan.tilings)) for nms in plan.nms]
    for (tiling, nms), own in zip(pairs, values, strict=True):
        low, high = np.quantile(own[1:], (0.025, 0.975))
        value = Estimate(float(own[0]), float(low), float(high), len(own) - 1)
        is_chosen = (tiling, nms) == (choice.tiling, choice.nms)
        options.append(Option(plan.tilings[tiling], nms, value, is_chosen))
    return tuple(options)


def _settings_of(choice: Choice, plan: TuningPlan) -> dict[str, Any]:
    """As a settings file has them, with nothing that has its default; checked."""
    of_class = choice.of_class
    raw: dict[str, Any] = {
        "task_prompt": plan.settings.task_prompt,
        "mapping": {name: list(own.prompts) for name, own in of_class.items()},
        "class_thresholds": {n: own.threshold for n, own in of_class.items() if own.threshold},
        "calibration": {
            name: [list(pair) for pair in own.curve] for name, own in of_class.items() if own.curve
        },
        "nms_threshold": "off" if choice.nms is None else choice.nms,
        "num_beams": plan.num_beams,
    }
    tiling = plan.tilings[choice.tiling]
    if tiling is not None:
        raw["tiling"] = raw_settings(plan.settings.model_copy(update={"tiling": tiling}))["tiling"]
    raw = {key: value for key, value in raw.items() if value not in ({}, None)}
    parse_settings(raw)
    return raw


@dataclass(frozen=True, slots=True)
class _MeanF1:
    """The mean F1 of all classes that are there."""

    counts: Sequence[Counts]

    @property
    def count(self) -> int:
        return int(sum(one.there.sum() for one in self.counts))

    def value(self, weights: Floats) -> float:
        values = [one.f1.value(weights) for one in self.counts if one.there.any()]
        known = [value for value in values if not math.isnan(value)]
        return float(np.mean(known)) if known else float("nan")


def _ratios(counts: Counts) -> tuple[Ratio, Ratio, Ratio]:
    return counts.precision, counts.recall, counts.f1


@dataclass(frozen=True, slots=True)
class _Reports:
    """Figures of every choice on the half of the images that it was not made on."""

    comparison: Comparison
    plan: TuningPlan
    choice: Choice
    first: Floats
    of_halves: Sequence[Choice]
    weights: Floats

    def of_class(self, name: str) -> ClassReport:
        own = self.choice.of_class[name]
        ranking = self.comparison.ranking(name, self.choice.tiling, self.choice.nms, own.prompts)
        prompts = self.plan.prompts[name]
        several = [(prompt,) for prompt in prompts] + ([prompts] if len(prompts) > 1 else [])
        num_objects = int(ranking.positives.sum())
        chosen = Figures(*map(self._estimate, _ratios(self._chosen_counts(name))))
        raw = CalibrationError(ranking.scores, ranking.right[0], ranking.images)
        calibrated_error = self._calibrated_error(ranking) if own.curve else None
        return ClassReport(
            name=name,
            num_objects=num_objects,
            compared=tuple(self._compared(name, some) for some in several),
            chosen=PromptFigures(own.prompts, chosen, self._untuned_f1(name, own.prompts)),
            raw_error=self._estimate(raw),
            calibrated_error=calibrated_error,
            notes=self._notes(name, num_objects),
        )

    def mean_f1(self) -> Estimate:
        return self._estimate(_MeanF1([self._chosen_counts(name) for name in self.plan.prompts]))

    def _chosen_counts(self, name: str) -> Counts:
        return self._crossed([self.comparison.counts(name, half) for half in self.of_halves])

    def _crossed(self, of_halves: Sequence[Counts]) -> Counts:
        """Of each half what the other half's choice finds in it; nothing of a class that is in one
        half only, where nothing could be chosen for it on the other.
        """
        there = of_halves[0].there
        if not (self.first @ there and (1 - self.first) @ there):
            return Counts.none(len(there))
        return of_halves[1].of_images(self.first, of_halves[0])

    def _compared(self, name: str, prompts: Prompts) -> PromptFigures:
        halves = (self.first, 1 - self.first)
        chosen = [self.comparison.instead(name, self.choice, prompts, half) for half in halves]
        counts = self._crossed([self.comparison.counts(name, one) for one in chosen])
        figures = Figures(*map(self._estimate, _ratios(counts)))
        return PromptFigures(prompts, figures, self._untuned_f1(name, prompts))

    def _untuned_f1(self, name: str, prompts: Prompts) -> Estimate:
        untuned = Choice(0, UNTUNED_NMS, {name: ClassChoice(prompts)})
        return self._estimate(self.comparison.counts(name, untuned).f1)

    def _calibrated_error(self, ranking: Ranking) -> Estimate | None:
        """None where a half has too little to calibrate the other by."""
        of_half = []
        for half in (self.first, 1 - self.first):
            is_in = half[ranking.images] > 0
            curve = calibration_curve(ranking.scores[is_in], ranking.right[0][is_in])
            if curve is None:
                return None
            of_half.append(calibrated(ranking.scores, curve))
        scores = np.where(self.first[ranking.images] > 0, of_half[1], of_half[0])
        return self._estimate(CalibrationError(scores, ranking.right[0], ranking.images))

    def _estimate(self, metric: Metric) -> Estimate:
        return estimate(metric, self.weights)

    def _notes(self, name: str, num_objects: int) -> tuple[str, ...]:
        own = self.choice.of_class[name]
        notes = []
        if not num_objects:
            notes.append("There is no labeled object of it: its prompts were not compared.")
        elif num_objects < FEW_OBJECTS:
            notes.append(
                f"There are only {num_objects} labeled objects of it: its figures say little, and "
                f"{FEW_OBJECTS} or more are better."
            )
        is_unknown = bool(num_objects) and not self.comparison.is_found(name)
        if is_unknown:
            task = self.plan.task
            notes.append(
                f"No prompt found a single labeled object of it, so the model does not know it "
                f"by these words under {task}: try other prompts, or teach it with `florence2 "
                f'train DATA --task "{task}"`.'
            )
        there = self.comparison.counts(name, self.choice).there
        if num_objects and not (self.first @ there and (1 - self.first) @ there):
            notes.append(
                "All labeled objects of it are in one half of the images, so nothing of it could "
                "be measured on the other."
            )
        if num_objects and own.curve is None and not is_unknown:
            notes.append(
                f"Fewer than {MIN_JUDGED} finds of it are too few to calibrate its scores."
            )
        if num_objects and not own.is_met and not is_unknown:
            notes.append(
                f"No threshold reaches the precision of {self.plan.objective.floor:g}; it has the "
                "one that comes nearest by F0.5."
            )
        others = {half.of_class[name].prompts for half in self.of_halves}
        if num_objects >= FEW_OBJECTS and others != {own.prompts}:
            named = " and ".join(sorted("; ".join(prompts) for prompts in others))
            notes.append(f"The halves of the images do not agree on the prompts: {named}.")
        return tuple(notes)

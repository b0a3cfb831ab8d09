"""Which prompts, thresholds, NMS and tiling find labeled objects best, and what a score is worth.

Every view of an image goes through the vision tower once and is asked every prompt; combinations
are then compared without the model. What is chosen on one half of the images is judged on the
other, both ways round, and the settings that are written are chosen on all of them.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import median
from typing import Any, Final

import numpy as np

from florence2.budget import open_pixels
from florence2.engine.scheduler import Priority
from florence2.errors import DeviceLostError, FlorenceError, NoRoomError, RequestError
from florence2.evaluation.calibration import MIN_JUDGED, Curve, calibrated, calibration_curve
from florence2.evaluation.detection import CalibrationError, ImageBoxes, Ranking, rankings
from florence2.evaluation.metrics import Estimate, Floats, Metric, Ratio, estimate, resamplings
from florence2.evaluation.operating_points import Counts, Objective, counts_at, simplest
from florence2.images import open_image
from florence2.labeled.records import LabeledData, LabeledImage, LeftOut
from florence2.records import BoxXyxy, Failure, Result, SizeWh
from florence2.tasks import OutputKind, TaskInput
from serve.naming import clean_class_name
from serve.predict.annotations import Found, each_once, wanted_in
from serve.predict.geometry import outer_box
from serve.predict.predictor import (
    Call,
    OpenImage,
    Patience,
    Predictor,
    in_parts,
    joined_answer,
    questions_of,
    rules_of,
)
from serve.predict.tiling import View, plan_tiles, views_of
from serve.settings import Settings, Tiling, parse_settings, raw_settings

FEW_OBJECTS: Final = 20
"""With fewer labeled objects of a class its figures say little."""
MAX_COMBINED: Final = 5
"""All combinations of so many prompts of a class are tried; of more, those of the best."""
_UNTUNED_NMS: Final = 0.7
DEFAULT_NMS: Final = (_UNTUNED_NMS, 0.5, 0.3)
MIN_IMAGES: Final = 2
_RESAMPLES: Final = 500
_SEED: Final = 0
_BATCH: Final = 8
# Half of what may wait for the model.
_MAX_ASKS: Final = 2048
_WINDOW_SHARE: Final = 0.6
_SHARPER: Final = 1.25
_HOPELESS: Final = ("bad_request", "bad_checkpoint", "bad_device")

Prompts = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TuningPlan:
    """What is tried. ``prompts`` by class, each once; what is found is right from ``iou`` on.

    ``tilings``, of which the first is None, and ``nms`` are in the order in which they are
    preferred. ``settings`` are all prompts at once with nothing left out. RequestError for what
    cannot be asked.
    """

    prompts: Mapping[str, Prompts]
    task: str
    tilings: tuple[Tiling | None, ...] = (None,)
    nms: tuple[float | None, ...] = DEFAULT_NMS
    objective: Objective = field(default_factory=Objective)
    iou: float = 0.5
    num_beams: int | None = None

    settings: Settings = field(init=False)

    def __post_init__(self) -> None:
        settings = parse_settings(
            {
                "task_prompt": self.task,
                "mapping": {name: list(prompts) for name, prompts in self.prompts.items()},
                "num_beams": self.num_beams,
                "nms_threshold": "off",
            }
        )
        first, last = settings.steps[0], settings.steps[-1]
        if first.takes is not TaskInput.TEXT or last.output is OutputKind.TEXT:
            raise RequestError(
                f"Prompts are tuned with a task that takes text and finds places, and "
                f"{self.task} does not; leave out --task, or name <OPEN_VOCABULARY_DETECTION>."
            )
        object.__setattr__(self, "settings", settings)
        object.__setattr__(self, "prompts", settings.mapping)


def classes_in(
    data: LabeledData, named: Mapping[str, Prompts]
) -> tuple[dict[str, Prompts], dict[str, int]]:
    """The prompts to try, by class as it is called in the data, and how many objects are ignored.

    A class without prompts is asked for by its name; with nothing named, so is every class.
    RequestError for data without objects, and for a class that it does not have.
    """
    counts = Counter(clean_class_name(one.label) for image in data.images for one in image.objects)
    if not counts:
        raise RequestError(
            f"Tuning compares answers with labeled objects, and {str(data.source)!r} has none; "
            "label some first."
        )
    known = dict.fromkeys([*map(clean_class_name, data.classes), *counts])
    by_key = {name.casefold(): name for name in known}
    chosen: dict[str, Prompts] = {}
    for asked, prompts in named.items():
        name = by_key.get(asked.casefold())
        if name is None:
            raise RequestError(
                f"The classes of {str(data.source)!r} are {', '.join(known)}, and {asked!r} is "
                "none of them; correct --class."
            )
        chosen[name] = prompts or (name,)
    chosen = chosen or {name: (name,) for name in counts}
    if not any(counts[name] for name in chosen):
        raise RequestError(
            f"Tuning compares answers with labeled objects, and there is none of "
            f"{', '.join(chosen)}; label some, or name another --class."
        )
    return chosen, {name: count for name, count in counts.items() if name not in chosen}


def some_of(images: Sequence[LabeledImage], most: int) -> list[LabeledImage]:
    """At most so many of the images, drawn by a hash of their names, which also parts them."""
    return sorted(images, key=lambda image: _hash(image.name))[:most]


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest()


def windows_for(sizes_wh: Sequence[SizeWh], input_wh: SizeWh) -> Tiling | None:
    """Windows for images that are larger than what the network looks at, ``input_wh``.

    Four of them cover an image of the middle size. None where there would be little more to see.
    """
    width, height = (round(median(size[axis] for size in sizes_wh)) for axis in (0, 1))
    if width <= _SHARPER * input_wh[0] and height <= _SHARPER * input_wh[1]:
        return None
    window_wh = _window(width), _window(height)
    overlap_wh = _overlap(width, window_wh[0]), _overlap(height, window_wh[1])
    return Tiling(window_wh, overlap_wh)


def _window(length: int) -> int:
    return max(32, math.ceil(_WINDOW_SHARE * length))


def _overlap(length: int, window: int) -> int:
    return min(max(0, 2 * window - length), window // 2)


@dataclass(frozen=True, slots=True)
class Answers:
    """What the model said about the images that it could be asked about.

    ``found`` has for each (place of the tiling, class, prompt) what was found in each image.
    """

    images: list[LabeledImage] = field(default_factory=list)
    found: dict[tuple[int, str, str], list[tuple[Found, ...]]] = field(default_factory=dict)
    failed: list[LeftOut] = field(default_factory=list)
    num_truncated: int = 0
    is_interrupted: bool = False


def ask_all(
    predictor: Predictor,
    images: Sequence[LabeledImage],
    plan: TuningPlan,
    on_images: Callable[[int], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Answers:
    """Every prompt about every view of every image; each view is encoded once.

    An image that fails is named, and counts neither as found nor as missed. Raises RequestError
    where the first images fail alike because of what is asked, and DeviceLostError.
    """
    asked = Answers()
    truncated = 0
    left = list(images)
    while left and not should_stop():
        size = _batch_size(left, plan)
        batch, left = left[:size], left[size:]
        for image, outcome in _batch_answers(predictor, batch, plan):
            if isinstance(outcome, Failure):
                asked.failed.append(LeftOut(image.name, outcome.message))
                if outcome.code in _HOPELESS and not asked.images and len(asked.failed) == size:
                    raise RequestError(outcome.message)
                continue
            asked.images.append(image)
            found, num_cut = outcome
            truncated += num_cut
            for key, shapes in found.items():
                asked.found.setdefault(key, []).append(shapes)
        on_images(len(batch))
    return replace(asked, num_truncated=truncated, is_interrupted=bool(left))


def _batch_size(images: Sequence[LabeledImage], plan: TuningPlan) -> int:
    """How many images are asked about at once."""
    prompts = sum(map(len, plan.prompts.values()))
    asks, size = 0, 0
    for image in images[:_BATCH]:
        views = 1
        for tiling in plan.tilings:
            if tiling is not None:
                views += len(plan_tiles(image.size_wh, tiling.size_wh, tiling.overlap_wh))
        asks += prompts * views
        if size and asks > _MAX_ASKS:
            break
        size += 1
    return size


_OfImage = tuple[dict[tuple[int, str, str], tuple[Found, ...]], int]


@dataclass(frozen=True, slots=True, eq=False)
class _Viewed:
    """An open image with all views of all tilings, and those of each; or why there is none."""

    labeled: LabeledImage
    image: OpenImage | None = None
    of_tilings: tuple[tuple[View, ...], ...] = ()
    failure: Failure | None = None

    @property
    def num_pixels(self) -> int:
        return 0 if self.image is None else self.image.num_pixels

    def close(self) -> None:
        if self.image is not None:
            self.image.close()


def _batch_answers(
    predictor: Predictor, batch: Sequence[LabeledImage], plan: TuningPlan
) -> Iterator[tuple[LabeledImage, _OfImage | Failure]]:
    patience = Patience(is_bulk=True)

    def open_one(labeled: LabeledImage, wait_s: float) -> _Viewed:
        try:
            picture = open_image(labeled.path, room=patience.room(open_pixels(), wait_s))
        except NoRoomError:
            raise
        except FlorenceError as error:
            return _Viewed(labeled, failure=Failure(error.code, str(error)))
        try:
            of_tilings = tuple(views_of(picture, None, tiling) for tiling in plan.tilings)
        except FlorenceError as error:
            picture.close()
            return _Viewed(labeled, failure=Failure(error.code, str(error)))
        views = tuple({view.box_xyxy: view for own in of_tilings for view in own}.values())
        pictures = tuple(view.picture for view in views)
        image = OpenImage(picture, views, pictures, questions_of(plan.settings), plan.settings)
        return _Viewed(labeled, image, of_tilings)

    with closing(in_parts(batch, open_one)) as parts:
        for part in parts:
            yield from _part_answers(predictor, part)


def _part_answers(
    predictor: Predictor, part: Sequence[_Viewed]
) -> Iterator[tuple[LabeledImage, _OfImage | Failure]]:
    views = [view for one in part if one.image is not None for view in one.image.views]
    encoded = iter(predictor.encode([view.picture for view in views]) if views else ())
    images: list[OpenImage] = []
    asked: list[_Viewed] = []
    for one in part:
        if one.image is None:
            yield one.labeled, one.failure or Failure("internal", "The image could not be read.")
            continue
        pictures = [next(encoded) for _ in one.image.views]
        problem = next((seen for seen in pictures if isinstance(seen, FlorenceError)), None)
        if isinstance(problem, DeviceLostError):
            raise problem
        if problem is not None:
            yield one.labeled, Failure(problem.code, str(problem))
            continue
        good = tuple(seen for seen in pictures if not isinstance(seen, FlorenceError))
        images.append(replace(one.image, pictures=good))
        asked.append(one)
    answers = predictor.answers(images, Call(Priority.BULK)) if images else []
    for one, image, own in zip(asked, images, answers, strict=True):
        yield one.labeled, _of_image(one, image, own)


def _of_image(
    viewed: _Viewed, image: OpenImage, answers: Sequence[Result | Failure]
) -> _OfImage | Failure:
    results: list[Result] = []
    for answer in answers:
        if isinstance(answer, Failure):
            if answer.code == DeviceLostError.code:
                raise DeviceLostError(answer.message)
            return answer
        results.append(answer)
    rules = rules_of(image.settings)
    size_wh = image.picture.size_wh
    found: dict[tuple[int, str, str], tuple[Found, ...]] = {}
    for number, question in enumerate(image.questions):
        own = results[number * len(image.views) : (number + 1) * len(image.views)]
        by_box = dict(zip((view.box_xyxy for view in image.views), own, strict=True))
        for place, views in enumerate(viewed.of_tilings):
            looked_at = replace(image, views=views)
            answered = joined_answer(
                looked_at, question, rules, [by_box[view.box_xyxy] for view in views]
            )
            key = place, question.class_name or "", question.text or ""
            found[key] = tuple(map(_without_tokens, wanted_in(answered, rules, size_wh)))
    return found, sum(result.truncated for result in results)


def _without_tokens(found: Found) -> Found:
    return replace(found, shape=replace(found.shape, tokens=()))


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


class Comparison:
    """Settings compared on answers that are there already, on any part of the images."""

    def __init__(self, answers: Answers, plan: TuningPlan) -> None:
        self._answers, self._plan = answers, plan
        self._rankings: dict[tuple[str, int, float | None, Prompts], Ranking] = {}
        self._truth = {name: [_boxes_of(i, name) for i in answers.images] for name in plan.prompts}

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
        for truth, *of_prompts in zip(self._truth[name], *lists, strict=True):
            kept = each_once([item for found in of_prompts for item in found], rules)
            boxes = tuple(outer_box(item.shape) or (0.0, 0.0, 0.0, 0.0) for item in kept)
            scores = tuple(_score(item) for item in kept)
            labels, true_labels = (name,) * len(boxes), (name,) * len(truth)
            images.append(ImageBoxes(boxes, labels, scores, truth, true_labels))
        found = rankings(images, (self._plan.iou,))
        if found:
            return found[0]
        # There is none of it in any image: whatever is found is wrong.
        numbers = np.repeat(np.arange(len(images)), [len(image.boxes) for image in images])
        flat = np.array([score for image in images for score in image.scores], np.float64)
        order = np.argsort(-flat, kind="stable")
        wrong = np.zeros((1, len(flat)), bool)
        return Ranking(flat[order], wrong, numbers[order], np.zeros(len(images)))

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

    def instead(self, name: str, choice: Choice, prompts: Prompts, weights: Floats) -> Choice:
        """Other prompts of a class in the place of the chosen ones, with their best threshold."""
        own = self._with_threshold(name, choice, prompts, None, weights)
        return replace(choice, of_class={**choice.of_class, name: own})


def _boxes_of(image: LabeledImage, name: str) -> tuple[BoxXyxy, ...]:
    return tuple(one.box_xyxy for one in image.objects if clean_class_name(one.label) == name)


def _score(item: Found) -> float:
    return 0.0 if item.score is None or math.isnan(item.score) else item.score


def _resampled(weights: Floats) -> Floats:
    """Resamplings [R, S] of the images that have a weight [S]."""
    chances = np.zeros((_RESAMPLES, len(weights)))
    chosen = np.flatnonzero(weights)
    if len(chosen):
        chances[:, chosen] = resamplings(len(chosen), _SEED, _RESAMPLES)
    return chances


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
    reports = _Reports(comparison, plan, choice, first, of_halves, resamplings(size, _SEED))
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
            nothing = np.zeros_like(there)
            return Counts(nothing, nothing, nothing)
        return of_halves[1].of_images(self.first, of_halves[0])

    def _compared(self, name: str, prompts: Prompts) -> PromptFigures:
        halves = (self.first, 1 - self.first)
        chosen = [self.comparison.instead(name, self.choice, prompts, half) for half in halves]
        counts = self._crossed([self.comparison.counts(name, one) for one in chosen])
        figures = Figures(*map(self._estimate, _ratios(counts)))
        return PromptFigures(prompts, figures, self._untuned_f1(name, prompts))

    def _untuned_f1(self, name: str, prompts: Prompts) -> Estimate:
        untuned = Choice(0, _UNTUNED_NMS, {name: ClassChoice(prompts)})
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
        there = self.comparison.counts(name, self.choice).there
        if num_objects and not (self.first @ there and (1 - self.first) @ there):
            notes.append(
                "All labeled objects of it are in one half of the images, so nothing of it could "
                "be measured on the other."
            )
        if num_objects and own.curve is None:
            notes.append(
                f"Fewer than {MIN_JUDGED} finds of it are too few to calibrate its scores."
            )
        if num_objects and not own.is_met:
            notes.append(
                f"No threshold reaches the precision of {self.plan.objective.floor:g}; it has the "
                "one that comes nearest by F0.5."
            )
        others = {half.of_class[name].prompts for half in self.of_halves}
        if num_objects >= FEW_OBJECTS and others != {own.prompts}:
            named = " and ".join(sorted("; ".join(prompts) for prompts in others))
            notes.append(f"The halves of the images do not agree on the prompts: {named}.")
        return tuple(notes)

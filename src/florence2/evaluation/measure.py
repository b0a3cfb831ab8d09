"""How good predictions about labeled images are: figures with intervals, for each class and in all.

Nothing here knows a model: whoever has answers and labels can ask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from florence2.errors import RequestError
from florence2.evaluation.detection import (
    IOU_THRESHOLDS,
    CalibrationError,
    ImageBoxes,
    Ranking,
    in_crowds,
    matched_by_rank,
    outline_ious,
    ranking,
)
from florence2.evaluation.metrics import (
    RESAMPLES,
    Estimate,
    Floats,
    Ratio,
    character_errors,
    estimate,
    estimate_of,
    one_spaced,
    resamplings,
)
from florence2.evaluation.operating_points import Counts, counts_at
from florence2.labeled.records import LabeledData, LabeledImage, LabeledObject, LeftOut, Ring
from florence2.records import Box, BoxXyxy, Failure, Polygon, Quad, SizeWh

Located = Box | Quad | Polygon
Predictions = Mapping[str, Sequence[Located] | Failure]
"""What was found in each image, by its name, or why there is no answer.

An object without a score counts as one with the score 1.
"""

NOTHING: Final = "nothing"
"""The class of what is not there, and of what was not found, in a confusion table."""
ALL: Final = "all"
"""The name of the figures of all classes together."""

FOUND_IOU: Final = 0.5
_CURVE_POINTS: Final = 101


@dataclass(frozen=True, slots=True)
class Bin:
    """Predictions with scores from ``low`` on: how many, their mean score, the share right."""

    low: float
    count: int
    score: float
    right: float


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """The figures of one class, or of all.

    ``ap50`` and ``ap`` are average precision at an IoU of 0.5 and its mean from 0.5 to 0.95; for
    all classes their means over classes. ``precision``, ``recall`` and ``f1`` are at an IoU of 0.5
    of what has at least the score ``threshold`` (None where classes have several). ``overlap`` is
    the mean IoU of what was rightly found. ``best_f1`` is the highest there is, with
    ``best_threshold``. ``ece`` and ``reliability`` say how far scores are from the share that is
    right. ``curve`` has recall and precision from the best score to the lowest.
    """

    name: str
    num_true: int
    num_found: int
    threshold: float | None
    ap50: Estimate
    ap: Estimate
    precision: Estimate
    recall: Estimate
    f1: Estimate
    overlap: Estimate
    best_f1: float | None
    best_threshold: float | None
    ece: Estimate
    reliability: tuple[Bin, ...] = ()
    curve: tuple[tuple[float, float], ...] = ()


FIGURES: Final[Mapping[str, str]] = {
    "ap50": "AP50",
    "ap": "AP",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "overlap": "IoU",
    "ece": "ECE",
}
"""The estimates of a class, and what they are called in a table."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """How often a true class (row) was called a class (column); the last of both is ``nothing``."""

    names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class ImageMistakes:
    """What is wrong in one image: found and not there, there and not found, and what is right.

    ``found`` are the predictions of the data's classes, best first; ``pairs`` have their numbers
    and those of the objects that are there, with None for a partner that is missing. What has too
    low a score, or is in a crowd of its class, is in no pair.
    """

    name: str
    right: int
    wrong: int
    missed: int
    found: tuple[Located, ...] = field(default=(), repr=False)
    pairs: tuple[tuple[int | None, int | None], ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The quality of located objects over all images that were answered.

    ``by`` says what overlaps are of. ``images`` has the worst image first. ``unlabeled`` counts
    what was found of classes that the data does not have: nobody knows whether it is right, and it
    is in no figure. ``failed`` images are in no figure either.
    """

    by: str
    total: ClassFigures
    classes: tuple[ClassFigures, ...]
    confusion: Confusion
    images: tuple[ImageMistakes, ...]
    failed: tuple[LeftOut, ...] = ()
    unlabeled: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; an estimate is its value, its 95 % interval and its count."""
        content = asdict(replace(self, images=()))
        for figures in (content["total"], *content["classes"]):
            del figures["curve"]
        shown = ("name", "right", "wrong", "missed")
        content["images"] = [{key: getattr(one, key) for key in shown} for one in self.images]
        return content


def measure(
    data: LabeledData,
    predictions: Predictions,
    *,
    by: Literal["boxes", "outlines"] = "boxes",
    threshold: float = 0.0,
    class_thresholds: Mapping[str, float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Evaluation:
    """Compares what was found with what is there, in those images that ``predictions`` names.

    Names of classes are compared in any case. ``predictions`` hold everything that was found,
    whatever its score: ``threshold``, and ``class_thresholds`` for some classes, decide what counts
    for precision, recall, F1, the confusion table and mistakes. Intervals are over ``resamples``
    drawings of images with replacement, always the same for a ``seed``; with 0 they have no width.

    Raises RequestError where no image was answered, or outlines are compared and none is labeled.
    """
    names = ClassNames(data)
    failed, answered = [], []
    for image in data.images:
        outcome = predictions.get(image.name)
        if isinstance(outcome, Failure):
            failed.append(LeftOut(image.name, outcome.message))
        elif outcome is not None:
            answered.append((image, outcome))
    if not answered:
        reason = f"; the first: {failed[0].reason}" if failed else "."
        raise RequestError(
            f"Figures need at least one image that was answered, and of {len(data.images)} none "
            f"was{reason}"
        )
    if by == "outlines" and not any(one.rings_xy for image, _ in answered for one in image.objects):
        raise RequestError(
            "Outlines are compared with labeled outlines, and the labels are boxes only; choose a "
            "task that answers with boxes."
        )
    kept = [_of_classes(found, names) for _, found in answered]
    compared = [
        image_boxes(image, found, names, by)
        for (image, _), found in zip(answered, kept, strict=True)
    ]
    limits = {names.of(name): value for name, value in (class_thresholds or {}).items()}
    thresholds = {name: limits.get(name, threshold) for name in names.listed}
    weights = resamplings(len(compared), seed, resamples)
    classes, total = _all_figures(compared, thresholds, weights)
    confusion = Counter[tuple[str, str]]()
    mistakes = [
        _mistakes(image.name, found, one, thresholds, confusion)
        for (image, _), found, one in zip(answered, kept, compared, strict=True)
    ]
    mistakes.sort(key=lambda one: (-one.wrong - one.missed, one.right, one.name))
    return Evaluation(
        by,
        total,
        classes,
        _confusion(names.listed, confusion),
        tuple(mistakes),
        tuple(failed),
        dict(names.unlabeled.most_common()),
    )


class ClassNames:
    """The classes of the data in their own spelling."""

    def __init__(self, data: LabeledData) -> None:
        self._names: dict[str, str] = {}
        for name in (*data.classes, *(one.label for i in data.images for one in i.objects)):
            self._names.setdefault(class_key(name), name)
        self.unlabeled = Counter[str]()

    @property
    def listed(self) -> tuple[str, ...]:
        return tuple(self._names.values())

    def of(self, name: str) -> str | None:
        return self._names.get(class_key(name))


def class_key(name: str) -> str:
    """What two spellings of a class share."""
    return one_spaced(name).casefold()


def _of_classes(found: Sequence[Located], names: ClassNames) -> tuple[Located, ...]:
    """Without what is of no class of the data, which is counted; best score first."""
    kept: list[Located] = []
    for one in found:
        name = names.of(one.label)
        if name is None:
            names.unlabeled[one.label] += 1
        else:
            kept.append(replace(one, label=name))
    return tuple(sorted(kept, key=lambda one: -score_of(one)))


def image_boxes(
    image: LabeledImage, kept: Sequence[Located], names: ClassNames, by: str
) -> ImageBoxes:
    """One image's objects of the data's classes, by boxes or outlines."""
    ious = shares = None
    if by == "outlines":
        outlines = [_in_fractions(rings_of(one), image.size_wh) for one in kept]
        there, crowds = (
            [_in_fractions(true_rings(one), image.size_wh) for one in several]
            for several in (image.objects, image.crowds)
        )
        ious = outline_ious(outlines, there)
        shares = outline_ious(outlines, crowds, over_first=True)
    return ImageBoxes(
        tuple(box_around(one) for one in kept),
        tuple(one.label for one in kept),
        tuple(score_of(one) for one in kept),
        tuple(one.box_xyxy for one in image.objects),
        tuple(names.of(one.label) or one.label for one in image.objects),
        ious,
        tuple(one.box_xyxy for one in image.crowds),
        tuple(names.of(one.label) or one.label for one in image.crowds),
        shares,
    )


def score_of(one: Located) -> float:
    """The score of a prediction; 1 where it is unknown."""
    return 1.0 if one.score is None else min(max(float(one.score), 0.0), 1.0)


def rings_of(one: Located) -> tuple[Ring, ...]:
    """The outlines of a prediction; those of a box are its four corners."""
    if isinstance(one, Polygon):
        return one.rings_xy
    return (one.quad_xy,) if isinstance(one, Quad) else (_corners(one.box_xyxy),)


def true_rings(one: LabeledObject) -> tuple[Ring, ...]:
    """The outlines of what is there; those of a box are its four corners."""
    return one.rings_xy or (_corners(one.box_xyxy),)


def box_around(one: Located) -> BoxXyxy:
    """The box of a prediction, or the upright one around it."""
    if isinstance(one, Box):
        return one.box_xyxy
    values = [value for ring in rings_of(one) for value in ring] or [0.0, 0.0]
    return min(values[0::2]), min(values[1::2]), max(values[0::2]), max(values[1::2])


def _corners(box: BoxXyxy) -> Ring:
    x1, y1, x2, y2 = box
    return x1, y1, x2, y1, x2, y2, x1, y2


def _in_fractions(rings: Iterable[Ring], size_wh: SizeWh) -> list[Ring]:
    return [tuple(v / size_wh[place % 2] for place, v in enumerate(ring)) for ring in rings]


def _all_figures(
    compared: Sequence[ImageBoxes], thresholds: Mapping[str, float], weights: Floats
) -> tuple[tuple[ClassFigures, ...], ClassFigures]:
    every = np.vstack([np.ones(len(compared)), weights])
    ranked = {name: ranking(compared, name, (FOUND_IOU,), most=None) for name in thresholds}
    counts = {name: counts_at(ranked[name], value) for name, value in thresholds.items()}
    # [1 + R, T] of each class; the first row is the data itself.
    precisions = {
        name: _average_precisions(ranking(compared, name, IOU_THRESHOLDS), every)
        for name in thresholds
    }
    classes = tuple(
        _figures(
            name,
            (ranked[name],),
            counts[name],
            precisions[name],
            thresholds[name],
            weights,
        )
        for name in thresholds
    )
    known = [found for found in precisions.values() if not np.isnan(found[0]).all()]
    shape = (len(every), len(IOU_THRESHOLDS))
    with np.errstate(invalid="ignore"):
        of_classes = np.stack(known) if known else np.full((1, *shape), np.nan)
        present = (~np.isnan(of_classes)).sum(axis=0)
        mean = np.where(present, np.nansum(of_classes, axis=0) / np.maximum(present, 1), np.nan)
    limits = set(thresholds.values())
    total = _figures(
        ALL,
        tuple(ranked.values()),
        sum(counts.values(), Counts.none(len(compared))),
        mean,
        limits.pop() if len(limits) == 1 else None,
        weights,
    )
    return classes, total


def _figures(
    name: str,
    ranked: Sequence[Ranking],
    counts: Counts,
    precisions: Floats,
    threshold: float | None,
    weights: Floats,
) -> ClassFigures:
    pooled = CalibrationError(
        np.concatenate([one.scores for one in ranked]) if ranked else np.zeros(0),
        np.concatenate([one.right[0] for one in ranked]) if ranked else np.zeros(0, bool),
        np.concatenate([one.images for one in ranked]) if ranked else np.zeros(0, np.int64),
    )
    num_true = int(counts.there.sum())
    best_threshold, best_f1 = best_f1_of(pooled.scores, pooled.right, num_true)
    return ClassFigures(
        name,
        num_true,
        int(counts.found.sum()),
        threshold,
        ap50=estimate_of(precisions[0, 0], precisions[1:, 0], num_true),
        ap=estimate_of(precisions[0].mean(), precisions[1:].mean(axis=1), num_true),
        precision=estimate(counts.precision, weights),
        recall=estimate(counts.recall, weights),
        f1=estimate(counts.f1, weights),
        overlap=estimate(counts.mean_overlap, weights),
        best_f1=best_f1,
        best_threshold=best_threshold,
        ece=estimate(pooled, weights),
        reliability=tuple(Bin(*row) for row in pooled.table()),
        curve=_curve(pooled, num_true),
    )


def _average_precisions(ranked: Ranking, every: Floats) -> Floats:
    nothing = np.full(len(IOU_THRESHOLDS), np.nan)
    found = (ranked.average_precisions(row) for row in every)
    return np.stack([nothing if one is None else one for one in found])


def best_f1_of(
    scores: Floats, right: NDArray[np.bool_], num_true: int
) -> tuple[float | None, float | None]:
    """The lowest score to keep for the highest F1, and that F1; None where nothing is there."""
    if not num_true or not len(scores):
        return None, None
    order = np.argsort(-scores, kind="stable")
    hits, seen = np.cumsum(right[order]), np.arange(1, len(order) + 1)
    # Predictions of one score are kept or dropped together.
    is_last = np.append(np.diff(scores[order]) != 0, True)
    f1 = np.where(is_last, 2 * hits / (seen + num_true), -1.0)
    best = int(f1.argmax())
    return float(scores[order][best]), float(f1[best])


def _curve(pooled: CalibrationError, num_true: int) -> tuple[tuple[float, float], ...]:
    if not num_true or not len(pooled.scores):
        return ()
    order = np.argsort(-pooled.scores, kind="stable")
    hits = np.cumsum(pooled.right[order])
    places = np.unique(np.linspace(0, len(order) - 1, _CURVE_POINTS).round().astype(int))
    return tuple((float(hits[n] / num_true), float(hits[n] / (n + 1))) for n in places)


def _kept(image: ImageBoxes, thresholds: Mapping[str, float]) -> list[int]:
    """The numbers of what has a score of at least the threshold of its class, best first."""
    return [
        place
        for place, (label, score) in enumerate(zip(image.labels, image.scores, strict=True))
        if label in thresholds and score >= thresholds[label]
    ]


def _mistakes(
    name: str,
    kept: tuple[Located, ...],
    image: ImageBoxes,
    thresholds: Mapping[str, float],
    confusion: Counter[tuple[str, str]],
) -> ImageMistakes:
    """Pairs of one class are made first, as for the figures; then what overlaps is confused."""
    pairs = _pairs(image, thresholds)
    for found, true in pairs:
        of_true = NOTHING if true is None else image.true_labels[true]
        confusion[of_true, NOTHING if found is None else image.labels[found]] += 1
    right = sum(
        image.labels[found] == image.true_labels[true]
        for found, true in pairs
        if found is not None and true is not None
    )
    num_found = sum(found is not None for found, _ in pairs)
    missed = len(image.true_labels) - right
    return ImageMistakes(name, right, num_found - right, missed, kept, tuple(pairs))


def _pairs(
    image: ImageBoxes, thresholds: Mapping[str, float]
) -> list[tuple[int | None, int | None]]:
    """Numbers of what was found and what is there, in pairs; None for a partner that is missing.

    What is in a crowd of its class, and is none of the objects there, is in no pair.
    """
    own = _kept(image, thresholds)
    true = list(range(len(image.true_labels)))
    ious = image.overlaps(own, true)
    labels = np.array([image.labels[n] for n in own], object)
    same = labels[:, None] == np.array(image.true_labels, object)[None, :]
    pairs: list[tuple[int | None, int | None]] = []
    left, free = np.ones(len(own), bool), np.ones(len(true), bool)
    ignored = np.zeros(len(own), bool)
    for row, number in enumerate(own):
        shares = image.shares_in_crowds([number], image.labels[number])
        ignored[row] = in_crowds(shares, np.array([-1]), FOUND_IOU)[0]
    for allowed in (same, ~same):
        possible = np.where(allowed & left[:, None] & free[None, :], ious, -1.0)
        for row, column in enumerate(matched_by_rank(possible, FOUND_IOU)):
            if column >= 0:
                pairs.append((own[row], true[column]))
                left[row] = free[column] = False
        left &= ~ignored
    pairs += [(own[row], None) for row in np.flatnonzero(left)]
    return pairs + [(None, true[column]) for column in np.flatnonzero(free)]


def _confusion(names: Sequence[str], counts: Counter[tuple[str, str]]) -> Confusion:
    """Of the classes that are there or were found."""
    seen = {name for pair in counts for name in pair}
    listed = (*(name for name in names if name in seen), NOTHING)
    return Confusion(
        listed, tuple(tuple(counts[row, column] for column in listed) for row in listed)
    )


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """A text that was answered about an image, and those that would be right.

    ``subject`` is what it is about: the class of a region, or a question.
    """

    image: str
    subject: str
    wanted: tuple[str, ...]
    found: str

    @property
    def is_exact(self) -> bool:
        """Whether it is one of those wanted, in any case, white space and full stop aside."""
        key = _text_key(self.found)
        return any(_text_key(one) == key for one in self.wanted)

    @property
    def errors(self) -> float:
        """The character error rate to the nearest of those wanted, at most 1."""
        return min((character_errors(self.found, one) for one in self.wanted), default=0.0)


def _text_key(text: str) -> str:
    return one_spaced(text).casefold().rstrip(" .")


@dataclass(frozen=True, slots=True)
class TextFigures:
    """Of one subject, or of all: the share that is exact, and characters wrong per one written."""

    name: str
    exact: Estimate
    character_errors: Estimate


@dataclass(frozen=True, slots=True)
class TextEvaluation:
    """The quality of texts; ``answers`` has the worst first."""

    total: TextFigures
    subjects: tuple[TextFigures, ...]
    answers: tuple[TextAnswer, ...]
    failed: tuple[LeftOut, ...] = ()

    @property
    def figures(self) -> tuple[TextFigures, ...]:
        """Those of all first."""
        return (self.total, *self.subjects)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; an estimate is its value, its 95 % interval and its count."""
        return asdict(replace(self, answers=()))


def measure_texts(
    answers: Sequence[TextAnswer],
    failed: Sequence[LeftOut] = (),
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> TextEvaluation:
    """Compares texts with those wanted; intervals as those of ``measure``.

    Raises RequestError where nothing was answered.
    """
    if not answers:
        reason = f"; the first: {failed[0].reason}" if failed else "."
        raise RequestError(f"Figures need at least one answer, and there is none{reason}")
    images = {name: number for number, name in enumerate(dict.fromkeys(a.image for a in answers))}
    weights = resamplings(len(images), seed, resamples)

    def figures(name: str, chosen: Sequence[TextAnswer]) -> TextFigures:
        places = [images[one.image] for one in chosen]
        counts = np.bincount(places, minlength=len(images)).astype(np.float64)
        exact, errors = (
            np.bincount(places, values, len(images)).astype(np.float64)
            for values in ([one.is_exact for one in chosen], [one.errors for one in chosen])
        )
        return TextFigures(
            name,
            estimate(Ratio(exact, counts), weights),
            estimate(Ratio(errors, counts), weights),
        )

    subjects = list(dict.fromkeys(one.subject for one in answers))
    return TextEvaluation(
        figures(ALL, answers),
        tuple(
            figures(name, [one for one in answers if one.subject == name])
            for name in subjects
            if len(subjects) > 1
        ),
        tuple(sorted(answers, key=lambda one: (-one.errors, one.is_exact, one.image))),
        tuple(failed),
    )

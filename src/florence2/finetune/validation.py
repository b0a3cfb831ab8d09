"""How good the weights of a training are by now: our engine's answers against the labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from florence2.checkpoint.checkpoint import Checkpoint
from florence2.checkpoint.weights import build_network
from florence2.engine.answering import answer_all
from florence2.engine.ask import Ask
from florence2.engine.batch_sizes import image_batch, prompt_batch
from florence2.engine.engine import Engine
from florence2.errors import FlorenceError, RequestError
from florence2.evaluation.detection import (
    IOU_THRESHOLDS,
    ImageBoxes,
    MeanAveragePrecision,
    outline_iou,
    ranking,
    rankings,
)
from florence2.evaluation.metrics import character_errors
from florence2.evaluation.operating_points import Counts, counts_at
from florence2.finetune.targets import Question, Vocabulary, questions_about
from florence2.labeled.records import LabeledImage
from florence2.postprocess import parse_answer_text
from florence2.records import Box, Polygon, Result, SizeWh, Text
from florence2.runtimes.device import choose_precision
from florence2.runtimes.torch import TorchRuntime
from florence2.tasks import OutputKind, Task, find_task

PAIRS = "pairs"
"""The name under which questions of no published task are measured."""

_FOUND_IOU = 0.5


@dataclass(frozen=True, slots=True)
class ClassQuality:
    """One class among boxes: its average precision over COCO's overlaps, its recall at one half."""

    average_precision: float
    recall: float
    count: int


@dataclass(frozen=True, slots=True)
class TaskQuality:
    """How well a task is done. ``value`` is in 0..1, more is better; ``metric`` says which it is.

    ``recall`` is the share of true objects that were found at an overlap of one half, None without
    boxes; ``by_class`` are the classes where boxes have them.
    """

    task: str
    metric: str
    value: float
    count: int
    recall: float | None = None
    by_class: Mapping[str, ClassQuality] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """An image of the validation with what was found in it and what is there, in pixels."""

    image: LabeledImage
    task: str
    found: Result
    wanted: Result


@dataclass(frozen=True, slots=True)
class Validation:
    """The quality of one moment of a training, over all of its tasks."""

    tasks: tuple[TaskQuality, ...]
    samples: tuple[Sample, ...] = ()

    @property
    def value(self) -> float:
        """The mean of the tasks' values."""
        return float(np.mean([one.value for one in self.tasks])) if self.tasks else math.nan


@contextmanager
def engine_of(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], device: torch.device
) -> Iterator[Engine]:
    """Our engine with weights of a training, in the precision it would be served in."""
    network = build_network(checkpoint.config, state, torch.float32)
    precision = choose_precision("auto", device, checkpoint.config.text.d_model)
    runtime = TorchRuntime(network, device, precision)
    engine = Engine(
        checkpoint,
        runtime,
        image_batch=image_batch(checkpoint, device.type),
        prompt_batch=prompt_batch(checkpoint, device.type),
        cache_bytes=0,
    )
    try:
        # Its weights will be others the next time, and recordings take memory that training needs.
        with runtime.graphs.paused():
            yield engine
    finally:
        engine.close()


class Validator:
    """The images that a training is measured on, with all their questions that fit the network.

    RequestError, before anything is trained, for a question that cannot be asked.
    """

    def __init__(
        self,
        images: Sequence[LabeledImage],
        tasks: Sequence[Task],
        vocabulary: Vocabulary,
        *,
        fits: Callable[[Question], bool] = lambda _: True,
        num_samples: int = 12,
    ) -> None:
        self.images = images
        self.vocabulary = vocabulary
        self._num_samples = num_samples
        self._asked = [
            (image, question, _ask(image, question))
            for image in images
            for question in questions_about(image, tasks, vocabulary)
            if fits(question)
        ]

    def measure(self, engine: Engine) -> Validation:
        """Asks everything; RequestError or whatever else an answer failed with."""
        outcomes = answer_all(engine, [ask for _, _, ask in self._asked])
        by_task: dict[str, list[Sample]] = {}
        for (image, question, _), outcome in zip(self._asked, outcomes, strict=True):
            if isinstance(outcome, FlorenceError):
                raise outcome
            wanted = _wanted(question, outcome.size_wh)
            named = self._in_classes(outcome), self._in_classes(wanted)
            name = PAIRS if question.is_custom else question.task
            by_task.setdefault(name, []).append(Sample(image, name, *named))
        qualities = tuple(
            _quality(name, samples, self.vocabulary.classes) for name, samples in by_task.items()
        )
        samples = [sample for samples in by_task.values() for sample in self._shown(samples)]
        return Validation(qualities, tuple(samples))

    def _shown(self, samples: Sequence[Sample]) -> list[Sample]:
        """A few of them from all over the images, those with something to find first."""
        full = [one for one in samples if one.wanted.objects] or list(samples)
        step = max(1, len(full) // self._num_samples)
        return full[::step][: self._num_samples]

    def _in_classes(self, result: Result) -> Result:
        """With classes in the place of the phrases that asked for them."""
        if result.task not in _PHRASED:
            return result
        objects = tuple(
            replace(one, label=self.vocabulary.class_of(one.label)) for one in result.objects
        )
        return replace(result, objects=objects)


_PHRASED = ("<CAPTION_TO_PHRASE_GROUNDING>", "<OPEN_VOCABULARY_DETECTION>")


def _ask(image: LabeledImage, question: Question) -> Ask:
    if question.is_custom and not question.task:
        raise RequestError(
            f"{image.name} has a prefix that does not begin with a task such as <OD> or <DocVQA> "
            f"({question.sentence[:40]!r}), so it cannot be asked; put one in front."
        )
    return Ask(
        image.path,
        question.task,
        question.text,
        question.region_xyxy,
        is_custom=question.is_custom,
    )


def _wanted(question: Question, size_wh: SizeWh) -> Result:
    if not question.is_custom:
        return parse_answer_text(question.task, question.answer, size_wh)
    text = question.answer.strip()
    said = (Text(text, None),) if text else ()
    return Result(question.task, size_wh, said, text, text, (), False)


def _quality(name: str, samples: Sequence[Sample], classes: Sequence[str]) -> TaskQuality:
    output = OutputKind.TEXT if name == PAIRS else find_task(name).output
    if output in (OutputKind.LABELED_BOXES, OutputKind.GROUNDING, OutputKind.BOXES_OR_POLYGONS):
        return _of_boxes(name, samples, classes)
    if output is OutputKind.BOXES:
        images = _image_boxes(samples)
        recall = _recall(images, _true_labels(images))
        return TaskQuality(name, "recall at IoU 0.5", recall, _count(samples), recall)
    if output is OutputKind.POLYGONS:
        ious = [_outline_overlap(one) for one in samples]
        return TaskQuality(name, "mean IoU of outlines", float(np.mean(ious)), len(ious))
    if name == "<REGION_TO_CATEGORY>":
        right = [_text(one.found) == _text(one.wanted) for one in samples]
        return TaskQuality(name, "accuracy", float(np.mean(right)), len(right))
    errors = [character_errors(_text(one.found), _text(one.wanted)) for one in samples]
    return TaskQuality(name, "characters right", 1 - float(np.mean(errors)), len(errors))


def _text(result: Result) -> str:
    """What an answer says, its lines one below the other."""
    if result.text is not None:
        return result.text
    return "\n".join(one.label for one in result.objects)


def _boxes(result: Result) -> list[Box]:
    return [one for one in result.objects if isinstance(one, Box)]


def _image_boxes(samples: Sequence[Sample]) -> list[ImageBoxes]:
    """Boxes by image: the questions about one image are one answer together."""
    by_image: dict[str, list[Sample]] = {}
    for one in samples:
        by_image.setdefault(one.image.name, []).append(one)
    images = []
    for group in by_image.values():
        found = [box for one in group for box in _boxes(one.found)]
        wanted = [box for one in group for box in _boxes(one.wanted)]
        images.append(
            ImageBoxes(
                tuple(box.box_xyxy for box in found),
                tuple(box.label for box in found),
                tuple(box.score or 0.0 for box in found),
                tuple(box.box_xyxy for box in wanted),
                tuple(box.label for box in wanted),
            )
        )
    return images


def _of_boxes(name: str, samples: Sequence[Sample], classes: Sequence[str]) -> TaskQuality:
    images = _image_boxes(samples)
    ranked = rankings(images, IOU_THRESHOLDS)
    labels = _true_labels(images)
    weights = np.ones(len(images))
    by_class = {
        label: ClassQuality(
            MeanAveragePrecision([of_label]).value(weights),
            _recall(images, [label]),
            sum(image.true_labels.count(label) for image in images),
        )
        for label, of_label in zip(labels, ranked, strict=True)
        if label in classes or not classes
    }
    value = MeanAveragePrecision(ranked).value(weights)
    # Where nothing is there, and rightly nothing is said, there is nothing to rank.
    nothing = float(not any(image.boxes for image in images))
    return TaskQuality(
        name,
        "mAP",
        nothing if math.isnan(value) else value,
        _count(samples),
        _recall(images, labels),
        by_class,
    )


def _count(samples: Sequence[Sample]) -> int:
    return sum(len(one.wanted.objects) for one in samples)


def _recall(images: Sequence[ImageBoxes], labels: Iterable[str]) -> float:
    """The share of true boxes of some classes that were found; 1 where there are none."""
    ranked = [ranking(images, label, (_FOUND_IOU,), most=None) for label in labels]
    counts = sum((counts_at(one, 0.0) for one in ranked), Counts.none(len(images)))
    recall = counts.recall.value(np.ones(len(images)))
    return 1.0 if math.isnan(recall) else recall


def _true_labels(images: Sequence[ImageBoxes]) -> list[str]:
    return sorted({label for image in images for label in image.true_labels})


def _outline_overlap(sample: Sample) -> float:
    width, height = sample.wanted.size_wh

    def rings(result: Result) -> list[tuple[float, ...]]:
        return [
            tuple(value / (width, height)[place % 2] for place, value in enumerate(ring))
            for one in result.objects
            if isinstance(one, Polygon)
            for ring in one.rings_xy
        ]

    return outline_iou(rings(sample.found), rings(sample.wanted))

"""From labeled images to what the network is taught: a prompt's sentence and the whole answer.

The sentences are those that ``florence2.engine.ask`` sends when it asks; the answers are spelled
as the published checkpoints spell them, so that ``florence2.postprocess`` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

import numpy as np

from florence2.engine.ask import prompt_sentence
from florence2.errors import RequestError
from florence2.labeled.records import LabeledImage, LabeledObject, Ring
from florence2.opencv import cv2
from florence2.records import BoxXyxy, Region, SizeWh, region_bins, region_on_image
from florence2.tasks import TASKS, Task, TaskInput, find_task
from florence2.tokens import (
    NUM_LOCATION_BINS,
    POLYGON_END,
    POLYGON_START,
    SEPARATOR,
    location_token,
)

MOST_POINTS: Final = 32
"""Of one ring of an outline; more make answers long and say little."""

PHRASE_SEPARATOR: Final = ". "
_MOST_PHRASES: Final = 12
_FIRST_TOKEN: Final = re.compile(r"<[A-Za-z][A-Za-z0-9_ -]*>")

# The tag of an image, or the text of an object, that answers a task.
IMAGE_TEXTS: Final[Mapping[str, tuple[str, ...]]] = {
    "<CAPTION>": ("caption",),
    "<DETAILED_CAPTION>": ("detailed_caption", "caption"),
    "<MORE_DETAILED_CAPTION>": ("more_detailed_caption", "caption"),
}
OBJECT_TEXTS: Final[Mapping[str, str]] = {
    "<DENSE_REGION_CAPTION>": "description",
    "<REGION_TO_DESCRIPTION>": "description",
    "<REGION_TO_OCR>": "text",
    "<OCR>": "text",
    "<OCR_WITH_REGION>": "text",
}
READING: Final = frozenset({"<OCR>", "<OCR_WITH_REGION>", "<REGION_TO_OCR>"})
"""Tasks that read: a mirrored image has no text to read."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a labeled image, and its whole right answer, without ``<s>`` and ``</s>``.

    ``task`` is a token of the task table, or a fine-tune's own, whose ``text`` goes in as it is.
    ``region_xyxy`` is in pixels. ``sentence`` is what the network reads.
    """

    task: str
    sentence: str
    answer: str
    text: str | None = None
    region_xyxy: BoxXyxy | None = None
    is_custom: bool = False


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The classes that are taught, with the phrases that ask for them.

    ``prompts`` has the phrase of a class that is not asked for by its own name.
    """

    classes: tuple[str, ...]
    prompts: Mapping[str, str] = field(default_factory=dict)

    def phrase(self, name: str) -> str:
        """What asks for a class, and names it in answers that repeat the question."""
        return self.prompts.get(name, name)

    def class_of(self, phrase: str) -> str:
        """The class that a phrase of an answer stands for; the phrase itself where none."""
        known = {self.phrase(name).strip().lower(): name for name in self.classes}
        return known.get(phrase.strip().lower(), phrase)


def spelled(xy: Iterable[float], size_wh: SizeWh) -> str:
    """Location tokens of coordinates in pixels, x before y: floor(1000 x / width), 0 to 999."""
    return "".join(
        location_token(
            min(max(int(value * NUM_LOCATION_BINS // size_wh[place % 2]), 0), NUM_LOCATION_BINS - 1)
        )
        for place, value in enumerate(xy)
    )


def _spelled_box(box_xyxy: BoxXyxy, size_wh: SizeWh) -> str:
    return "".join(location_token(place) for place in region_bins(box_xyxy, size_wh))


def in_order(objects: Iterable[LabeledObject]) -> list[LabeledObject]:
    """By the x, then the y of the centres of their boxes: a fixed order leaves nothing to guess."""

    def centre(thing: LabeledObject) -> tuple[float, float]:
        x1, y1, x2, y2 = thing.box_xyxy
        return (x1 + x2) / 2, (y1 + y2) / 2

    return sorted(objects, key=centre)


def _as_read(objects: Iterable[LabeledObject]) -> list[LabeledObject]:
    """Lines of text from top to bottom, those of one height from left to right."""
    lines = sorted(objects, key=lambda thing: (thing.box_xyxy[1], thing.box_xyxy[0]))
    ordered: list[LabeledObject] = []
    while lines:
        _, top, _, bottom = lines[0].box_xyxy
        middle = (top + bottom) / 2
        level = [one for one in lines if one.box_xyxy[1] <= middle]
        ordered += sorted(level, key=lambda thing: thing.box_xyxy[0])
        lines = [one for one in lines if one.box_xyxy[1] > middle]
    return ordered


def outline(ring: Ring) -> Ring:
    """A ring as answers spell it: at most MOST_POINTS points, clockwise, from the top.

    "The top" is the point with the smallest 3 y + x within the ring's own box, so that a level
    edge starts at its left end.
    """
    points = np.asarray(ring, np.float64).reshape(-1, 2)
    low, span = points.min(axis=0), np.maximum(np.ptp(points, axis=0), 1e-9)
    tolerance = 0.002 * float(span.max())
    while len(points) > MOST_POINTS:
        kept = cv2.approxPolyDP(points.astype(np.float32)[:, None], tolerance, True)
        points, tolerance = np.asarray(kept, np.float64).reshape(-1, 2), 1.5 * tolerance
    x, y = points.T
    if float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) < 0:
        points = points[::-1]
    relative = (points - low) / span
    start = int((3 * relative[:, 1] + relative[:, 0]).argmin())
    return tuple(float(value) for value in np.roll(points, -start, axis=0).ravel())


def _spelled_outlines(things: Sequence[LabeledObject], size_wh: SizeWh) -> str:
    """One outline bare, as published; several each between ``<poly>`` and ``</poly>``."""
    found = [
        SEPARATOR.join(spelled(outline(ring), size_wh) for ring in thing.rings_xy)
        for thing in things
    ]
    if len(found) > 1:
        found = [f"{POLYGON_START}{one}{POLYGON_END}" for one in found]
    return "".join(found)


def _quad(thing: LabeledObject) -> Ring:
    """The four corners of a line of text, clockwise from its top left."""
    if len(thing.rings_xy) == 1 and len(thing.rings_xy[0]) == 8:
        points = np.asarray(thing.rings_xy[0], np.float64).reshape(4, 2)
        x, y = points.T
        if float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) < 0:
            points = points[::-1]
        start = int(points.sum(axis=1).argmin())
        return tuple(float(value) for value in np.roll(points, -start, axis=0).ravel())
    x1, y1, x2, y2 = thing.box_xyxy
    return (x1, y1, x2, y1, x2, y2, x1, y2)


def _question(
    task: Task,
    image: LabeledImage,
    answer: str,
    text: str | None = None,
    region_xyxy: BoxXyxy | None = None,
) -> Question:
    region = None if region_xyxy is None else Region(region_xyxy)
    sentence = prompt_sentence(task, text, region, image.size_wh)
    return Question(task.token, sentence, answer, text, region_xyxy)


def _detection(task: Task, image: LabeledImage, _: Vocabulary) -> list[Question]:
    answer = "".join(
        thing.label + _spelled_box(thing.box_xyxy, image.size_wh)
        for thing in in_order(image.objects)
    )
    return [_question(task, image, answer)]


def _descriptions(task: Task, image: LabeledImage, _: Vocabulary) -> list[Question]:
    named = [(thing.texts.get("description"), thing) for thing in in_order(image.objects)]
    if image.objects and not any(text for text, _ in named):
        return []
    answer = "".join(
        (text or thing.label) + _spelled_box(thing.box_xyxy, image.size_wh) for text, thing in named
    )
    return [_question(task, image, answer)]


def _proposals(task: Task, image: LabeledImage, _: Vocabulary) -> list[Question]:
    boxes = (_spelled_box(thing.box_xyxy, image.size_wh) for thing in in_order(image.objects))
    return [_question(task, image, "".join(boxes))]


def grounding(image: LabeledImage, classes: Sequence[str], vocabulary: Vocabulary) -> Question:
    """Where the things of ``classes`` are, asked for together; what is not there is left out."""
    answer = ""
    for name in classes:
        boxes = [
            _spelled_box(thing.box_xyxy, image.size_wh)
            for thing in in_order(image.objects)
            if thing.label == name
        ]
        if boxes:
            answer += vocabulary.phrase(name) + "".join(boxes)
    text = PHRASE_SEPARATOR.join(vocabulary.phrase(name) for name in classes)
    return _question(find_task("<CAPTION_TO_PHRASE_GROUNDING>"), image, answer, text)


def _groundings(_: Task, image: LabeledImage, vocabulary: Vocabulary) -> list[Question]:
    """All classes, as many at a time as a caption names."""
    names = vocabulary.classes
    parts = (names[at : at + _MOST_PHRASES] for at in range(0, len(names), _MOST_PHRASES))
    return [grounding(image, part, vocabulary) for part in parts]


def _open_vocabulary(task: Task, image: LabeledImage, vocabulary: Vocabulary) -> list[Question]:
    questions = []
    for name in vocabulary.classes:
        phrase = vocabulary.phrase(name)
        answer = "".join(
            phrase + _spelled_box(thing.box_xyxy, image.size_wh)
            for thing in in_order(image.objects)
            if thing.label == name
        )
        questions.append(_question(task, image, answer, phrase))
    return questions


def _referring(task: Task, image: LabeledImage, vocabulary: Vocabulary) -> list[Question]:
    """Of classes that have an outline here, and no thing without one."""
    questions = []
    for name in vocabulary.classes:
        things = [thing for thing in in_order(image.objects) if thing.label == name]
        if things and all(thing.rings_xy for thing in things):
            answer = _spelled_outlines(things, image.size_wh)
            questions.append(_question(task, image, answer, vocabulary.phrase(name)))
    return questions


def _of_regions(
    answer_of: Callable[[LabeledObject, LabeledImage, Vocabulary], str | None],
) -> Callable[[Task, LabeledImage, Vocabulary], list[Question]]:
    """A question about every object that is large enough to be a region and has an answer."""

    def questions(task: Task, image: LabeledImage, vocabulary: Vocabulary) -> list[Question]:
        found = []
        for thing in in_order(image.objects):
            region = region_on_image(thing.box_xyxy, image.size_wh)
            answer = answer_of(thing, image, vocabulary)
            if region is not None and answer is not None:
                found.append(_question(task, image, answer, region_xyxy=region.box_xyxy))
        return found

    return questions


def _region_outline(thing: LabeledObject, image: LabeledImage, _: Vocabulary) -> str | None:
    return _spelled_outlines([thing], image.size_wh) if thing.rings_xy else None


def _said(
    text_of: Callable[[LabeledObject], str | None],
) -> Callable[[LabeledObject, LabeledImage, Vocabulary], str | None]:
    """A text with its region behind it, as the published checkpoints answer."""

    def answer(thing: LabeledObject, image: LabeledImage, _: Vocabulary) -> str | None:
        text = text_of(thing)
        return None if not text else text + _spelled_box(thing.box_xyxy, image.size_wh)

    return answer


def _lines(image: LabeledImage) -> list[LabeledObject]:
    return _as_read(thing for thing in image.objects if thing.texts.get("text"))


def _ocr(task: Task, image: LabeledImage, _: Vocabulary) -> list[Question]:
    return [_question(task, image, "\n".join(line.texts["text"] for line in _lines(image)))]


def _ocr_with_region(task: Task, image: LabeledImage, _: Vocabulary) -> list[Question]:
    answer = "".join(
        line.texts["text"] + spelled(_quad(line), image.size_wh) for line in _lines(image)
    )
    return [_question(task, image, answer)]


def _caption(task: Task, image: LabeledImage, _: Vocabulary) -> list[Question]:
    said = (image.tags.get(name) for name in IMAGE_TEXTS[task.token])
    return [_question(task, image, text) for text in list(filter(None, said))[:1]]


_QUESTIONS: Final[Mapping[str, Callable[[Task, LabeledImage, Vocabulary], list[Question]]]] = {
    "<CAPTION>": _caption,
    "<DETAILED_CAPTION>": _caption,
    "<MORE_DETAILED_CAPTION>": _caption,
    "<OD>": _detection,
    "<DENSE_REGION_CAPTION>": _descriptions,
    "<REGION_PROPOSAL>": _proposals,
    "<CAPTION_TO_PHRASE_GROUNDING>": _groundings,
    "<OPEN_VOCABULARY_DETECTION>": _open_vocabulary,
    "<REFERRING_EXPRESSION_SEGMENTATION>": _referring,
    "<REGION_TO_SEGMENTATION>": _of_regions(_region_outline),
    "<REGION_TO_CATEGORY>": _of_regions(_said(lambda thing: thing.label)),
    "<REGION_TO_DESCRIPTION>": _of_regions(_said(lambda thing: thing.texts.get("description"))),
    "<REGION_TO_OCR>": _of_regions(_said(lambda thing: thing.texts.get("text"))),
    "<OCR>": _ocr,
    "<OCR_WITH_REGION>": _ocr_with_region,
}


def questions_about(
    image: LabeledImage, tasks: Iterable[Task], vocabulary: Vocabulary
) -> list[Question]:
    """Every question of ``tasks`` that the labels of an image answer; its own pairs if it has any.

    The objects of an image with pairs are what those say already.
    """
    if image.answers:
        return [pair_question(one.prefix, one.suffix) for one in image.answers]
    return list(
        chain.from_iterable(_QUESTIONS[task.token](task, image, vocabulary) for task in tasks)
    )


def pair_question(prefix: str, suffix: str) -> Question:
    """A pair of prefix and suffix as a question; the suffix is taken as it is.

    The prefix is a task prompt such as ``<OD>``, whose sentence is asked, or ``<DocVQA>`` with a
    text, which goes to the network as it is.
    """
    match = _FIRST_TOKEN.match(prefix.strip())
    token, text = (match[0], prefix.strip()[match.end() :]) if match else ("", prefix)
    task = _PUBLISHED.get(token.upper())
    if task is None:
        return Question(token, prefix, suffix, text, is_custom=True)
    sentence = task.sentence.replace("{input}", text.strip())
    if task.takes is TaskInput.NONE and text.strip():
        raise RequestError(
            f"{task.token} takes no text, and the prefix {prefix!r} has one; leave it out or use a "
            "task that takes text."
        )
    return Question(task.token, sentence, suffix, text.strip() or None)


_PUBLISHED: Final = {task.token: task for task in TASKS}


def sampled_questions(
    image: LabeledImage,
    tasks: Sequence[Task],
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    count: int,
) -> list[Question]:
    """``count`` questions for a training step, fewer where there are not so many.

    One of each task first, in a random order. What a caption names differs from step to step: some
    of the classes that are there, and some that are not, in a random order.
    """
    if image.answers:
        by_task = [questions_about(image, tasks, vocabulary)]
    else:
        by_task = [_sampled(image, task, vocabulary, rng) for task in tasks]
    groups = [group for group in by_task if group]
    order = rng.permutation(len(groups))
    shuffled = [[groups[at][place] for place in rng.permutation(len(groups[at]))] for at in order]
    taken: list[Question] = []
    while shuffled and len(taken) < count:
        for group in shuffled:
            taken.append(group.pop())
        shuffled = [group for group in shuffled if group]
    return taken[:count]


def _sampled(
    image: LabeledImage, task: Task, vocabulary: Vocabulary, rng: np.random.Generator
) -> list[Question]:
    if task.token == "<CAPTION_TO_PHRASE_GROUNDING>":
        return [grounding(image, _mixed_classes(image, vocabulary, rng), vocabulary)]
    if task.token != "<OPEN_VOCABULARY_DETECTION>":
        return _QUESTIONS[task.token](task, image, vocabulary)
    # Most classes are in few images: an answer of nothing must not be most of what is learned.
    present = {thing.label for thing in image.objects}
    absent = [name for name in vocabulary.classes if name not in present]
    chosen = {*present, *(str(name) for name in _some(absent, rng, max(1, len(present) // 2)))}
    asked = Vocabulary(
        tuple(name for name in vocabulary.classes if name in chosen), vocabulary.prompts
    )
    return _open_vocabulary(task, image, asked)


def _mixed_classes(
    image: LabeledImage, vocabulary: Vocabulary, rng: np.random.Generator
) -> list[str]:
    there = {thing.label for thing in image.objects}
    present = [name for name in vocabulary.classes if name in there]
    absent = [name for name in vocabulary.classes if name not in there]
    room = _MOST_PHRASES - min(len(present), _MOST_PHRASES - 1)
    named = [
        *_some(present, rng, _MOST_PHRASES - 1),
        *_some(absent, rng, int(rng.integers(0 if present else 1, room + 1))),
    ]
    return [named[int(place)] for place in rng.permutation(len(named))]


def _some(names: Sequence[str], rng: np.random.Generator, count: int) -> list[str]:
    return [names[int(place)] for place in rng.permutation(len(names))[:count]]

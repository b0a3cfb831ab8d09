"""What each answer says is where: located objects with class and tags, before any SDK form."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from florence2.engine.cascade import regions_of
from florence2.records import Box, Polygon, Quad, Result, Text
from florence2.tasks import TaskInput, find_task
from serve.label_rules import Answered, LabelRules
from serve.predict.geometry import Located
from serve.predict.naming import OBJECT_CLASS, TEXT_CLASS, class_of, clean_class_name
from serve.tags import REGION_TEXT_TAGS

_DENSE: Final = "<DENSE_REGION_CAPTION>"
# What is read in a region is no name for it.
_NAMING_TAGS: Final = ("category", "description")


@dataclass(frozen=True, slots=True)
class Found:
    """One located object.

    ``subject`` is what it was called, where its class says less. ``asked`` says that the user
    pointed at the region, so that no other object makes it superfluous.
    """

    shape: Located
    class_name: str
    tags: tuple[tuple[str, str], ...] = ()
    subject: str = ""
    asked: bool = False

    @property
    def score(self) -> float | None:
        return self.shape.score


def found_in(answered: Answered, rules: LabelRules) -> list[Found]:
    """Everything located in one answer, in its order."""
    result = answered.result
    last = find_task(result.task.rsplit("+", 1)[-1])
    tag = REGION_TEXT_TAGS.get(last.token)
    asked = answered.region is not None
    if last.takes is TaskInput.REGION and "+" in result.task:
        found = _region_step(answered, tag, rules)
    elif tag is not None:
        found = _region_texts(answered, tag, rules)
    else:
        found = [
            _found(shape, last.token, answered, rules)
            for shape in result.objects
            if not isinstance(shape, Text)
        ]
    return [replace(item, asked=True) for item in found] if asked else found


def _found(shape: Located, token: str, answered: Answered, rules: LabelRules) -> Found:
    given = clean_class_name(answered.class_name) if answered.class_name else None
    if isinstance(shape, Quad):
        return Found(shape, TEXT_CLASS, (("text", shape.label),), subject=shape.label)
    if token == _DENSE:
        name = given or _sentence_class(shape.label, rules)
        return Found(shape, name, (("description", shape.label),), subject=shape.label)
    name = given or class_of(shape.label or answered.phrase or "", rules.classes)
    return Found(shape, name)


def _sentence_class(sentence: str, rules: LabelRules) -> str:
    return clean_class_name(sentence) if rules.sentences_as_classes else OBJECT_CLASS


def _region_texts(answered: Answered, tag: str, rules: LabelRules) -> list[Found]:
    """The words about a region as a tag on it."""
    result = answered.result
    if answered.region is None:
        boxes = [shape for shape in result.objects if isinstance(shape, Box)]
    else:
        words = result.text or " ".join(found.label for found in result.objects)
        score = result.objects[0].score if result.objects else math.nan
        boxes = [Box(answered.region.box_xyxy, words, score)] if words else []
    found = []
    for box in boxes:
        name = _sentence_class(box.label if tag in _NAMING_TAGS else "", rules)
        given = clean_class_name(answered.class_name) if answered.class_name else name
        found.append(Found(box, given, ((tag, box.label),)))
    return found


def _region_step(answered: Answered, tag: str | None, rules: LabelRules) -> list[Found]:
    """What a cascade's last step said about each region.

    Class and score are those of what the step before found there; words become a tag.
    """
    result = answered.result
    finder = _step_before(result)
    token = find_task(finder.task.rsplit("+", 1)[-1]).token if finder else ""
    items: list[Found] = []
    for shape, owner in zip(result.objects, _owners(result, finder), strict=True):
        if isinstance(shape, Text):
            continue
        if owner is None:
            items.append(Found(shape, OBJECT_CLASS, ((tag, shape.label),) if tag else ()))
            continue
        found = _found(owner, token, answered, rules)
        tags = found.tags if tag is None else ((tag, shape.label),)
        score = shape.score if owner.score is None else owner.score
        items.append(replace(found, shape=replace(shape, score=score), tags=tags))
    return items


def _step_before(result: Result) -> Result | None:
    """The step that found the regions; each region has a result of its own behind it."""
    before = result.task.count("+")
    return result.steps[min(before, len(result.steps)) - 1] if result.steps else None


def _owners(result: Result, finder: Result | None) -> list[Located | None]:
    """For every object of the result the one whose region it is about, by order.

    A region has one text, or, from engines that leave out empty answers, none; or any number of
    outlines. One without an area was not asked about, so it has no answer.
    """
    count = len(result.objects)
    asked = regions_of(finder) if finder else []
    answers = result.steps[result.task.count("+") :]
    with_area = [one.located for one in asked if one.region is not None]
    if len(answers) == len(with_area):
        pairs = list(zip(with_area, answers, strict=True))
        outlined = [
            located
            for located, answer in pairs
            for found in answer.objects
            if isinstance(found, Polygon)
        ]
        if outlined and len(outlined) == count:
            return [*outlined]
        answered = [located for located, answer in pairs if answer.text]
        if answered and len(answered) == count < len(asked):
            return [*answered]
    return [one.located for one in asked] if len(asked) == count else [None] * count

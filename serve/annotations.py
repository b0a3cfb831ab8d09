"""Results of the engine as Supervisely annotations. Every label has the status AUTO.

| output | object |
| --- | --- |
| boxes | Rectangle of the label's class |
| polygons | a Polygon per ring; the rings of one object share a binding key |
| OCR quads | Polygon of class ``text``, the string in the tag ``text`` |
| captions, OCR text | image tags ``caption``, ``ocr_text`` |
| descriptions, categories and text of regions | tags on the region's Rectangle |

A sentence never becomes a class: dense captions are of class ``object`` with a ``description``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from florence2.cascade import regions_of
from florence2.records import Box, Polygon, Quad, Region, Result, SizeWh, Text
from florence2.tasks import TaskInput, find_task
from serve.geometry import (
    is_finite,
    overlap,
    points_rc_from_ring_xy,
    rectangle_tlbr_from_box_xyxy,
)
from serve.naming import (
    OBJECT_CLASS,
    TEXT_CLASS,
    class_color,
    class_of,
    clean_class_name,
    clean_text,
)
from serve.sdk import LabelingStatus, sly

# Two prompts of one class see the same object: above this overlap only the surer box is kept.
SAME_OBJECT_IOU: Final = 0.7

IMAGE_TEXT_TAGS: Final = {
    "<CAPTION>": "caption",
    "<DETAILED_CAPTION>": "caption",
    "<MORE_DETAILED_CAPTION>": "caption",
    "<OCR>": "ocr_text",
}
REGION_TEXT_TAGS: Final = {
    "<REGION_TO_CATEGORY>": "category",
    "<REGION_TO_DESCRIPTION>": "description",
    "<REGION_TO_OCR>": "text",
}
_DENSE: Final = "<DENSE_REGION_CAPTION>"

_STRING, _ON_OBJECTS = sly.TagValueType.ANY_STRING, sly.TagApplicableTo.OBJECTS_ONLY
_ON_IMAGES: Final = sly.TagApplicableTo.IMAGES_ONLY


def _tag_meta(name: str, value_type: str, on: str, color: list[int]) -> sly.TagMeta:
    return sly.TagMeta(name, value_type, color=color, applicable_to=on)


TAG_METAS: Final[dict[str, sly.TagMeta]] = {
    meta.name: meta
    for meta in (
        _tag_meta("confidence", sly.TagValueType.ANY_NUMBER, _ON_OBJECTS, [90, 140, 220]),
        _tag_meta("text", _STRING, _ON_OBJECTS, [220, 140, 60]),
        _tag_meta("description", _STRING, _ON_OBJECTS, [120, 180, 90]),
        _tag_meta("category", _STRING, _ON_OBJECTS, [180, 100, 200]),
        _tag_meta("caption", _STRING, _ON_IMAGES, [200, 90, 110]),
        _tag_meta("ocr_text", _STRING, _ON_IMAGES, [80, 170, 170]),
    )
}


@dataclass(frozen=True, slots=True)
class Answered:
    """A result and what was asked for: the class its prompt stands for, the phrase, the region."""

    result: Result
    class_name: str | None = None
    phrase: str | None = None
    region: Region | None = None


@dataclass(frozen=True, slots=True)
class LabelRules:
    """``classes`` maps ``phrase_key`` of a label to a class; boxes under ``threshold`` go."""

    classes: Mapping[str, str] = field(default_factory=dict)
    threshold: float = 0.0


@dataclass(frozen=True, slots=True)
class _Found:
    """One located object with its class and tags, before it takes the SDK's form."""

    shape: Box | Quad | Polygon
    class_name: str
    tags: tuple[tuple[str, str], ...] = ()

    @property
    def score(self) -> float | None:
        return self.shape.score


def annotation_from_answers(
    answers: Sequence[Answered], rules: LabelRules, size_wh: SizeWh
) -> sly.Annotation:
    """One ``sly.Annotation`` of everything that was answered about one image."""
    kept: list[_Found] = []
    for answered in answers:
        found = [item for item in _found_in(answered, rules) if _counts(item, rules.threshold)]
        kept = _merge_same_objects(kept, found)
    labels = [label for n, item in enumerate(kept) for label in _labels(item, n, size_wh)]
    tags = [tag for answered in answers for tag in _image_tags(answered.result)]
    return sly.Annotation((size_wh[1], size_wh[0]), labels, img_tags=tags)


def _counts(item: _Found, threshold: float) -> bool:
    return item.score is None or not item.score < threshold


def _found_in(answered: Answered, rules: LabelRules) -> list[_Found]:
    result = answered.result
    last = find_task(result.task.rsplit("+", 1)[-1])
    tag = REGION_TEXT_TAGS.get(last.token)
    if last.takes is TaskInput.REGION and "+" in result.task:
        return _region_step(answered, tag, rules)
    if tag is not None:
        return _region_texts(answered, tag)
    return [
        _found(shape, last.token, answered, rules)
        for shape in result.objects
        if not isinstance(shape, Text)
    ]


def _found(
    shape: Box | Quad | Polygon, token: str, answered: Answered, rules: LabelRules
) -> _Found:
    if isinstance(shape, Quad):
        return _Found(shape, TEXT_CLASS, (("text", shape.label),))
    if token == _DENSE:
        return _Found(shape, answered.class_name or OBJECT_CLASS, (("description", shape.label),))
    if answered.class_name:
        return _Found(shape, clean_class_name(answered.class_name))
    return _Found(shape, class_of(shape.label or answered.phrase or "", rules.classes))


def _region_texts(answered: Answered, tag: str) -> list[_Found]:
    """The words about a region as a tag on it."""
    result = answered.result
    name = clean_class_name(answered.class_name or OBJECT_CLASS)
    if answered.region is None:
        boxes = [shape for shape in result.objects if isinstance(shape, Box)]
    else:
        words = result.text or " ".join(found.label for found in result.objects)
        score = result.objects[0].score if result.objects else math.nan
        boxes = [Box(answered.region.box_xyxy, words, score)] if words else []
    return [_Found(box, name, ((tag, box.label),)) for box in boxes]


def _region_step(answered: Answered, tag: str | None, rules: LabelRules) -> list[_Found]:
    """What a cascade's last step said about each region.

    Class and score are those of what the step before found there; words become a tag.
    """
    result = answered.result
    finder = _step_before(result)
    token = find_task(finder.task.rsplit("+", 1)[-1]).token if finder else ""
    items: list[_Found] = []
    for shape, owner in zip(result.objects, _owners(result, finder), strict=True):
        if isinstance(shape, Text):
            continue
        if owner is None:
            items.append(_Found(shape, OBJECT_CLASS, ((tag, shape.label),) if tag else ()))
            continue
        found = _found(owner, token, answered, rules)
        tags = found.tags if tag is None else ((tag, shape.label),)
        score = shape.score if owner.score is None else owner.score
        items.append(_Found(replace(shape, score=score), found.class_name, tags))
    return items


def _step_before(result: Result) -> Result | None:
    """The step that found the regions; each region has a result of its own behind it."""
    before = result.task.count("+")
    return result.steps[min(before, len(result.steps)) - 1] if result.steps else None


def _owners(result: Result, finder: Result | None) -> list[Box | Quad | Polygon | None]:
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


def _merge_same_objects(kept: list[_Found], found: list[_Found]) -> list[_Found]:
    """Both lists, without the less sure of two boxes of one class on one object."""
    earlier = list(kept)
    fresh: list[_Found] = []
    for item in found:
        same = [old for old in earlier if _is_same_object(old, item)]
        if any((old.score or 0.0) >= (item.score or 0.0) for old in same):
            continue
        earlier = [old for old in earlier if old not in same]
        fresh.append(item)
    return earlier + fresh


def _is_same_object(first: _Found, second: _Found) -> bool:
    return (
        isinstance(first.shape, Box)
        and isinstance(second.shape, Box)
        and first.class_name == second.class_name
        and overlap(first.shape.box_xyxy, second.shape.box_xyxy) >= SAME_OBJECT_IOU
    )


def _labels(item: _Found, number: int, size_wh: SizeWh) -> list[sly.Label]:
    tags = [
        sly.Tag(TAG_METAS[name], text) for name, value in item.tags if (text := clean_text(value))
    ]
    if item.score is not None and is_finite([item.score]):
        tags.insert(0, sly.Tag(TAG_METAS["confidence"], round(float(item.score), 4)))
    shapes = _geometries(item.shape, size_wh)
    key = f"object-{number}" if len(shapes) > 1 else None
    return [
        sly.Label(
            shape,
            sly.ObjClass(item.class_name, type(shape), class_color(item.class_name)),
            tags=tags,
            binding_key=key,
            status=LabelingStatus.AUTO,
        )
        for shape in shapes
    ]


def _geometries(
    shape: Box | Quad | Polygon, size_wh: SizeWh
) -> list[sly.geometry.geometry.Geometry]:
    """The SDK's geometries; a shape with a coordinate that is no number has none."""
    if isinstance(shape, Box):
        if not is_finite(shape.box_xyxy):
            return []
        return [sly.Rectangle(*rectangle_tlbr_from_box_xyxy(shape.box_xyxy, size_wh))]
    rings = [shape.quad_xy] if isinstance(shape, Quad) else list(shape.rings_xy)
    return [
        sly.Polygon([sly.PointLocation(*point) for point in points_rc_from_ring_xy(ring, size_wh)])
        for ring in rings
        if len(ring) >= 6 and is_finite(ring)
    ]


def _image_tags(result: Result) -> list[sly.Tag]:
    first = find_task(result.task.split("+", 1)[0]).token
    name = IMAGE_TEXT_TAGS.get(first)
    text = clean_text(result.text or "") if name else ""
    return [sly.Tag(TAG_METAS[name], text)] if name and text else []

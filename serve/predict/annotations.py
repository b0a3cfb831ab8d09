"""Results of the engine as Supervisely annotations. Every label has the status AUTO."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np

from florence2.engine.ask import regions_of
from florence2.records import Box, Polygon, Quad, Region, Result, SizeWh, Text
from florence2.tasks import TaskInput, find_task
from serve.naming import (
    FIXED_SHAPES,
    OBJECT_CLASS,
    TEXT_CLASS,
    class_color,
    class_of,
    class_titles,
    clean_class_name,
    clean_suffix,
    clean_text,
    possible_titles,
)
from serve.predict.geometry import (
    Find,
    Located,
    area_share,
    distinct,
    drawable_rings,
    is_finite,
    known_score,
    mask_of_rings,
    outer_box,
    rectangle_tlbr_from_box_xyxy,
    rings_of,
)
from serve.sdk import LabelingStatus, sly

__all__ = [
    "IMAGE_TEXT_TAGS",
    "REGION_TEXT_TAGS",
    "SAME_OBJECT_IOU",
    "TAG_METAS",
    "Answered",
    "Found",
    "LabelRules",
    "annotation_from_answers",
    "each_once",
    "wanted_in",
]


# Two prompts of one class see the same object: from this overlap on only the surer one is kept.
SAME_OBJECT_IOU: Final = 0.7


@dataclass(frozen=True, slots=True)
class Answered:
    """A result and what was asked for: the class its prompt stands for, the phrase, the region."""

    result: Result
    class_name: str | None = None
    phrase: str | None = None
    region: Region | None = None


@dataclass(frozen=True, slots=True)
class LabelRules:
    """Which objects become labels, of which class and shape.

    ``classes`` maps ``phrase_key`` of a label to a class. ``calibration`` has, for some classes,
    pairs of a raw score and the score that takes its place, straight lines between them. An object
    goes when its score is below the threshold of its class (``class_thresholds``, else
    ``threshold``), when ``whitelist`` lacks its class, or when its box covers more than
    ``max_box_area`` of the image. Names are compared cleaned, in any case, without
    ``class_suffix``; a whitelist may have them with it too.
    ``nms_threshold`` and ``containment_threshold``: see ``serve.predict.geometry``; None is off.
    ``is_one_class``: every object is an "object", and what it was found as its category.
    ``fixed_shapes`` are the classes whose shape the readers of the annotation already know.
    """

    classes: Mapping[str, str] = field(default_factory=dict)
    threshold: float = 0.0
    class_thresholds: Mapping[str, float] = field(default_factory=dict)
    calibration: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    whitelist: frozenset[str] | None = None
    class_suffix: str = ""
    geometry: Literal["polygon", "bitmap"] = "polygon"
    max_box_area: float = 1.0
    sentences_as_classes: bool = False
    nms_threshold: float | None = SAME_OBJECT_IOU
    containment_threshold: float | None = None
    across_classes: bool = False
    is_one_class: bool = False
    fixed_shapes: Mapping[str, str] = field(default_factory=lambda: FIXED_SHAPES)

    def __post_init__(self) -> None:
        thresholds = {_key(name): value for name, value in self.class_thresholds.items()}
        object.__setattr__(self, "class_thresholds", thresholds)
        curves = {_key(name): curve for name, curve in self.calibration.items()}
        object.__setattr__(self, "calibration", curves)
        object.__setattr__(self, "class_suffix", clean_suffix(self.class_suffix))
        if self.whitelist is not None:
            object.__setattr__(self, "whitelist", frozenset(map(_key, self.whitelist)))

    def threshold_of(self, class_name: str) -> float:
        return self.class_thresholds.get(_key(class_name), self.threshold)

    def calibrated(self, score: float | None, class_name: str) -> float | None:
        """The score that counts for one that the model gave to an object of a class."""
        curve = self.calibration.get(_key(class_name))
        if curve is None or score is None or not math.isfinite(score):
            return score
        raw, right = zip(*curve, strict=True)
        return float(np.interp(score, raw, right))

    def wants(self, class_name: str, shape: str) -> bool:
        """Whether the whitelist has the class, as it is called or as its labels will be."""
        return self.whitelist is None or any(
            _key(title) in self.whitelist
            for title in (class_name, *possible_titles(class_name, shape, self.class_suffix))
        )


def _key(class_name: str) -> str:
    """What two spellings of a class share: a labeler's ``Car`` is the model's ``car``."""
    return clean_class_name(class_name).casefold()


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


def object_tags(score: float | None, texts: Iterable[tuple[str, str]]) -> list[sly.Tag]:
    """The confidence, where it is known, and every text that is not empty.

    A score is a plain float: the SDK refuses numpy's, and JSON has no NaN.
    """
    tags = [sly.Tag(TAG_METAS[name], text) for name, said in texts if (text := clean_text(said))]
    if score is not None and is_finite([score]):
        tags.insert(0, sly.Tag(TAG_METAS["confidence"], round(float(score), 4)))
    return tags


def image_tags(results: Iterable[Result]) -> list[sly.Tag]:
    """Captions and read text of the whole image; two prompts with one caption give one tag."""
    texts: dict[tuple[str, str], None] = {}
    for result in results:
        name = IMAGE_TEXT_TAGS.get(find_task(result.task.split("+", 1)[0]).token)
        if name and (text := clean_text(result.text or "")):
            texts[name, text] = None
    return [sly.Tag(TAG_METAS[name], text) for name, text in texts]


_DENSE: Final = "<DENSE_REGION_CAPTION>"
# What is read in a region is no name for it.
_NAMING_TAGS: Final = ("category", "description")


@dataclass(frozen=True, slots=True)
class Found:
    """One located object.

    ``subject`` is what it was called, where its class says less. ``asked`` says that the user
    pointed at the region, so that no other object makes it superfluous. Where its class has a
    calibration, the shape's score is a calibrated one, and ``raw_score`` the model's.
    """

    shape: Located
    class_name: str
    tags: tuple[tuple[str, str], ...] = ()
    subject: str = ""
    asked: bool = False
    raw_score: float | None = None

    @property
    def score(self) -> float | None:
        return self.shape.score

    @property
    def model_score(self) -> float | None:
        """As the model gave it."""
        return self.shape.score if self.raw_score is None else self.raw_score


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
    if rules.calibration:
        found = [_calibrated(item, rules) for item in found]
    return [replace(item, asked=True) for item in found] if asked else found


def _calibrated(item: Found, rules: LabelRules) -> Found:
    score = rules.calibrated(item.score, item.class_name)
    if score is None or math.isnan(score) or score == item.score:
        return item
    return replace(item, shape=replace(item.shape, score=score), raw_score=item.score)


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
        tokens = tuple(token for said in result.objects for token in said.tokens)
        boxes = [Box(answered.region.box_xyxy, words, score, tokens)] if words else []
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


def annotation_from_answers(
    answers: Sequence[Answered], rules: LabelRules, size_wh: SizeWh
) -> tuple[sly.Annotation, tuple[Found | None, ...]]:
    """One ``sly.Annotation`` of everything that was answered about one image.

    Beside it, for each of its labels, what the model located there; None for one that the SDK
    made, of a label over the image's edge.
    """
    found = [item for answered in answers for item in wanted_in(answered, rules, size_wh)]
    kept = each_once(found, rules)
    if rules.is_one_class:
        kept = [_as_object(item) for item in kept]
    drawn = [(item, shapes) for item in kept if (shapes := _geometries(item.shape, rules, size_wh))]
    titles = class_titles(
        ((item.class_name, _shape_name(item.shape, rules)) for item, _ in drawn),
        rules.class_suffix,
        rules.fixed_shapes,
    )
    labels = []
    located: dict[int, Found] = {}
    for number, (item, shapes) in enumerate(drawn):
        title = titles[item.class_name, _shape_name(item.shape, rules)]
        of_item = _labels(item, shapes, title, f"object-{number}")
        labels += of_item
        located |= dict.fromkeys(map(id, of_item), item)
    tags = image_tags(answered.result for answered in answers)
    annotation = sly.Annotation((size_wh[1], size_wh[0]), labels, img_tags=tags)
    return annotation, tuple(located.get(id(label)) for label in annotation.labels)


def _as_object(item: Found) -> Found:
    if item.class_name == OBJECT_CLASS:
        return item
    return replace(item, class_name=OBJECT_CLASS, tags=(("category", item.class_name), *item.tags))


def wanted_in(answered: Answered, rules: LabelRules, size_wh: SizeWh) -> list[Found]:
    """What was located in one answer, without what has no area or is not wanted by the rules."""
    return [item for item in found_in(answered, rules) if _is_wanted(item, rules, size_wh)]


def _is_wanted(item: Found, rules: LabelRules, size_wh: SizeWh) -> bool:
    if item.score is not None and item.score < rules.threshold_of(item.class_name):
        return False
    if not rules.wants(item.class_name, _shape_name(item.shape, rules)):
        return False
    if not isinstance(item.shape, Box):
        return bool(drawable_rings(item.shape, size_wh))
    box = outer_box(item.shape)
    if box is None or box[0] == box[2] or box[1] == box[3]:
        return False
    return item.asked or area_share(box, size_wh) <= rules.max_box_area


def each_once(found: Sequence[Found], rules: LabelRules) -> list[Found]:
    """What was found in an image, in order, and of several finds on one object the surest."""
    # Of two that a calibration makes equal, the one that the model was surer of stays.
    order = sorted(range(len(found)), key=lambda number: -known_score(found[number].model_score))
    kept = distinct(
        [_find(found[number], number) for number in order],
        iou=rules.nms_threshold,
        containment_share=rules.containment_threshold,
        across_classes=rules.across_classes,
    )
    return [found[number] for number in sorted(order[place] for place in kept)]


def _find(item: Found, number: int) -> Find:
    """Lines of text are the same only when they say the same; what the user asked for never is."""
    kind = type(item.shape).__name__
    if isinstance(item.shape, Quad):
        kind += item.shape.label
    if item.asked:
        kind = f"asked {number}"
    box = outer_box(item.shape) or (0.0, 0.0, 0.0, 0.0)
    return Find(box, f"{item.class_name}\n{item.subject}", item.score, kind)


def _shape_name(shape: Located, rules: LabelRules) -> str:
    if isinstance(shape, Box):
        return "rectangle"
    return rules.geometry if isinstance(shape, Polygon) else "polygon"


def _geometries(
    shape: Located, rules: LabelRules, size_wh: SizeWh
) -> list[sly.geometry.geometry.Geometry]:
    """The SDK's geometries; a shape without an area, or with no numbers for places, has none."""
    if isinstance(shape, Box):
        return [sly.Rectangle(*rectangle_tlbr_from_box_xyxy(shape.box_xyxy, size_wh))]
    rings = drawable_rings(shape, size_wh)
    if isinstance(shape, Polygon) and rules.geometry == "bitmap":
        drawn = mask_of_rings(rings_of(shape), size_wh) if rings else None
        return [sly.Bitmap(drawn[0], sly.PointLocation(*drawn[1]))] if drawn else []
    return [sly.Polygon([sly.PointLocation(*point) for point in points]) for points in rings]


def _labels(
    item: Found, shapes: Sequence[sly.geometry.geometry.Geometry], title: str, key: str
) -> list[sly.Label]:
    tags = object_tags(item.score, item.tags)
    return [
        sly.Label(
            shape,
            sly.ObjClass(title, type(shape), class_color(title)),
            tags=tags,
            binding_key=key if len(shapes) > 1 else None,
            status=LabelingStatus.AUTO,
        )
        for shape in shapes
    ]

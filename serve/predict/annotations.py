"""Results of the engine as Supervisely annotations. Every label has the status AUTO."""

from __future__ import annotations

from collections.abc import Sequence

from florence2.records import Box, Polygon, Quad, SizeWh
from serve.findings import Found, found_in
from serve.label_rules import SAME_OBJECT_IOU, Answered, LabelRules
from serve.predict.dedupe import Find, distinct
from serve.predict.geometry import (
    Located,
    area_share,
    drawable_rings,
    mask_of_rings,
    outer_box,
    rectangle_tlbr_from_box_xyxy,
    rings_of,
)
from serve.predict.naming import class_color, class_titles
from serve.sdk import LabelingStatus, sly
from serve.tags import IMAGE_TEXT_TAGS, REGION_TEXT_TAGS, TAG_METAS, image_tags, object_tags

__all__ = [
    "IMAGE_TEXT_TAGS",
    "REGION_TEXT_TAGS",
    "SAME_OBJECT_IOU",
    "TAG_METAS",
    "Answered",
    "LabelRules",
    "annotation_from_answers",
    "wanted_in",
]


def annotation_from_answers(
    answers: Sequence[Answered], rules: LabelRules, size_wh: SizeWh
) -> sly.Annotation:
    """One ``sly.Annotation`` of everything that was answered about one image."""
    found = [item for answered in answers for item in wanted_in(answered, rules, size_wh)]
    drawn = [
        (item, shapes)
        for item in _distinct(found, rules)
        if (shapes := _geometries(item.shape, rules, size_wh))
    ]
    titles = class_titles(
        ((item.class_name, _shape_name(item.shape, rules)) for item, _ in drawn),
        rules.class_suffix,
        rules.fixed_shapes,
    )
    labels = []
    for number, (item, shapes) in enumerate(drawn):
        title = titles[item.class_name, _shape_name(item.shape, rules)]
        labels += _labels(item, shapes, title, f"object-{number}")
    tags = image_tags(answered.result for answered in answers)
    return sly.Annotation((size_wh[1], size_wh[0]), labels, img_tags=tags)


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


def _distinct(found: list[Found], rules: LabelRules) -> list[Found]:
    kept = distinct(
        [_find(item, number) for number, item in enumerate(found)],
        iou=rules.nms_threshold,
        containment_share=rules.containment_threshold,
        across_classes=rules.across_classes,
    )
    return [found[number] for number in kept]


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

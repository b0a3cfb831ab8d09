"""What one answer reached of what it could reach: the parts of every figure that is a share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from florence2.evaluation.matching import count_matches
from florence2.evaluation.overlaps import outline_iou
from florence2.evaluation.questions import Question
from florence2.evaluation.texts import character_errors, has_known_words, one_spaced, plain_label
from florence2.records import Box, BoxXyxy, Polygon, Quad, Result

Mark = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Marking:
    """A figure's name, the tasks it looks at, and how it marks one answer: reached, possible."""

    name: str
    tasks: tuple[str, ...]
    mark: Callable[[Question, Result], Mark]


def fraction_boxes(result: Result) -> tuple[tuple[BoxXyxy, ...], tuple[str, ...]]:
    """Boxes, and the upright boxes around quads, in fractions of the image; and their labels."""
    boxes, labels = [], []
    width, height = result.size_wh
    for thing in result.objects:
        if isinstance(thing, Box):
            corners: tuple[float, ...] = thing.box_xyxy
        elif isinstance(thing, Quad):
            corners = thing.quad_xy
        else:
            continue
        xs, ys = corners[0::2], corners[1::2]
        boxes.append((min(xs) / width, min(ys) / height, max(xs) / width, max(ys) / height))
        labels.append(plain_label(thing.label))
    return tuple(boxes), tuple(labels)


def _true_boxes(question: Question) -> tuple[list[BoxXyxy], list[str]]:
    truth = question.truth
    boxes = [*truth.boxes_xyxy]
    for quad in truth.quads_xy:
        xs, ys = [x for x, _ in quad], [y for _, y in quad]
        boxes.append((min(xs), min(ys), max(xs), max(ys)))
    return boxes, [plain_label(label) for label in truth.labels]


def _recall(question: Question, result: Result) -> Mark:
    true_boxes, true_labels = _true_boxes(question)
    matches = count_matches(*fraction_boxes(result), true_boxes, true_labels)
    return matches, len(true_boxes)


def _precision(question: Question, result: Result) -> Mark:
    boxes, labels = fraction_boxes(result)
    return count_matches(boxes, labels, *_true_boxes(question)), len(boxes)


def _outline(question: Question, result: Result) -> Mark:
    """The outlines are compared with the full ones, not with the twelve points answers spell."""
    width, height = result.size_wh
    found = [
        [value / (height if place % 2 else width) for place, value in enumerate(ring)]
        for thing in result.objects
        if isinstance(thing, Polygon)
        for ring in thing.rings_xy
    ]
    true = [_flat(thing.outline_xy) for thing in question.truth.objects]
    return (outline_iou(found, true), 1) if true else (0, 0)


def _flat(points: Iterable[tuple[float, float]]) -> list[float]:
    return [value for point in points for value in point]


def _written(question: Question) -> str:
    return "\n".join(question.truth.labels)


def _errors(question: Question, result: Result) -> Mark:
    written = _written(question)
    return (character_errors(result.text or "", written), 1) if written else (0, 0)


def _silence(question: Question, result: Result) -> Mark:
    return (0, 0) if _written(question) else (float(not (result.text or "").strip()), 1)


def _label(question: Question, result: Result) -> Mark:
    [true] = question.truth.labels
    return float(plain_label(result.text or "") == true), 1


def _exact(question: Question, result: Result) -> Mark:
    return float(one_spaced(result.text or "") == one_spaced(question.truth.answer)), 1


_GROUNDING = ("<CAPTION_TO_PHRASE_GROUNDING>",)
_OVD = ("<OPEN_VOCABULARY_DETECTION>",)
_SEGMENTATION = ("<REFERRING_EXPRESSION_SEGMENTATION>", "<REGION_TO_SEGMENTATION>")

MARKINGS: Final = (
    Marking("grounding_recall50", _GROUNDING, _recall),
    Marking("ovd_recall50", _OVD, _recall),
    Marking("proposal_recall50", ("<REGION_PROPOSAL>",), _recall),
    Marking("segmentation_miou", _SEGMENTATION, _outline),
    Marking("ocr_cer", ("<OCR>",), _errors),
    Marking("category_accuracy", ("<REGION_TO_CATEGORY>",), _label),
    Marking("caption_exact", ("<CAPTION>",), _exact),
    Marking("grounding_precision50", _GROUNDING, _precision),
    Marking("ovd_precision50", _OVD, _precision),
    Marking("proposal_precision50", ("<REGION_PROPOSAL>",), _precision),
    Marking("dense_caption_recall50", ("<DENSE_REGION_CAPTION>",), _recall),
    Marking("ocr_lines_recall50", ("<OCR_WITH_REGION>",), _recall),
    Marking("ocr_silent_without_text", ("<OCR>",), _silence),
    Marking("region_ocr_cer", ("<REGION_TO_OCR>",), _errors),
    Marking("region_description_accuracy", ("<REGION_TO_DESCRIPTION>",), _label),
    Marking("detailed_caption_exact", ("<DETAILED_CAPTION>",), _exact),
    Marking("more_detailed_caption_exact", ("<MORE_DETAILED_CAPTION>",), _exact),
)


def is_well_formed(result: Result) -> bool:
    """Whether nothing of the answer was left out, put right or cut off."""
    return not result.notes and not result.truncated


def speaks_known_words(result: Result) -> bool:
    """Whether the answer keeps to the words of the scenes; other checkpoints need not."""
    return has_known_words(result.answer)

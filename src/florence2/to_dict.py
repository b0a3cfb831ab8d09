"""A result in the form of the reference's ``post_process_generation``, with scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from florence2.errors import RequestError
from florence2.records import Box, Object, Polygon, Quad
from florence2.tasks import OutputKind, TaskInput, find_task

if TYPE_CHECKING:
    from florence2.records import Result


def result_to_dict(result: Result) -> dict[str, Any]:
    """``{task token: answer}`` with the reference's keys and nesting; JSON-ready.

    - text tasks: the answer's string, its location tokens included, without white space around;
    - boxes: ``bboxes``, ``labels``, ``scores``; OCR: ``quad_boxes``, ``labels``, ``scores``;
    - polygons: ``polygons`` (per object a list of rings), ``labels``, ``scores``;
    - boxes or polygons: ``bboxes``, ``bboxes_labels``, ``polygons``, ``polygons_labels``, and
      ``scores`` of the boxes, then of the polygons.

    Coordinates are floats in pixels; a score is None where it is unknown. A cascade has one entry
    per step; the entry of a step that asked about regions is the list of its answers.
    """
    if not result.steps:
        return {result.task: _answer(result)}
    merged: dict[str, Any] = {}
    for step in result.steps:
        for token, answer in result_to_dict(step).items():
            if _takes_region(token):
                merged.setdefault(token, []).append(answer)
            else:
                merged[token] = answer
    return merged


def _answer(result: Result) -> str | dict[str, Any]:
    output = _output_of(result.task)
    boxes = [found for found in result.objects if isinstance(found, Box)]
    polygons = [found for found in result.objects if isinstance(found, Polygon)]
    if output is OutputKind.TEXT:
        return result.answer.strip()
    if output is OutputKind.OCR:
        quads = [found for found in result.objects if isinstance(found, Quad)]
        return {"quad_boxes": [list(quad.quad_xy) for quad in quads]} | _labels(quads)
    if output is OutputKind.POLYGONS:
        return {"polygons": [_rings(polygon) for polygon in polygons]} | _labels(polygons)
    if output is OutputKind.BOXES_OR_POLYGONS:
        return {
            "bboxes": [list(box.box_xyxy) for box in boxes],
            "bboxes_labels": [box.label for box in boxes],
            "polygons": [_rings(polygon) for polygon in polygons],
            "polygons_labels": [polygon.label for polygon in polygons],
            "scores": [box.score for box in boxes] + [polygon.score for polygon in polygons],
        }
    return {"bboxes": [list(box.box_xyxy) for box in boxes]} | _labels(boxes)


def _labels(objects: list[Box] | list[Quad] | list[Polygon]) -> dict[str, Any]:
    found: list[Object] = [*objects]
    return {
        "labels": [one.label for one in found],
        "scores": [one.score for one in found],
    }


def _rings(polygon: Polygon) -> list[list[float]]:
    return [list(ring) for ring in polygon.rings_xy]


def _output_of(token: str) -> OutputKind:
    try:
        return find_task(token).output
    except RequestError:
        # A fine-tune's own task; it answers in text.
        return OutputKind.TEXT


def _takes_region(token: str) -> bool:
    try:
        return find_task(token).takes is TaskInput.REGION
    except RequestError:
        return False

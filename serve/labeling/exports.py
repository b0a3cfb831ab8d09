"""The finished project as files of COCO and YOLO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from florence2.records import BoxXyxy, SizeWh
from serve.labeling.project import AnnotationError, GrowingProject
from serve.predict.geometry import box_xyxy_from_rectangle_tlbr, ring_area
from serve.sdk import sly

NO_ANNOTATION: Final = "images without an annotation, left out"
BAD_ANNOTATION: Final = "images whose annotation was changed to what is none, left out"
NO_AREA: Final = "labels without an area, left out"
HOLES: Final = "outlines with holes, which are filled"
_SCORE: Final = "confidence"


@dataclass(frozen=True, slots=True)
class ExportedObject:
    """One object in pixels of the image.

    ``box_xyxy`` is (x1, y1, x2, y2) with x2 and y2 past a box's last pixel, or around the rings.
    ``rings_xy`` are (x1, y1, x2, y2, ...); an object that was labeled as a box has none. ``texts``
    are its tags other than the score.
    """

    class_name: str
    box_xyxy: BoxXyxy
    rings_xy: tuple[tuple[float, ...], ...]
    area: float
    score: float | None
    texts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ExportedImage:
    """``texts`` are the image's tags as (name, value)."""

    name: str
    path: Path
    size_wh: SizeWh
    objects: Sequence[ExportedObject]
    texts: Sequence[tuple[str, Any]]


@dataclass(slots=True)
class Export:
    """Where an export is, and what it does not have as the project has it, counted or in words."""

    folder: Path
    changes: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """What to tell about the export, one line each."""
        counted = [f"{count} {what}." for what, count in self.changes.items() if count]
        return [*counted, *self.notes]


def exported_images(project: GrowingProject, changes: Counter[str]) -> Iterator[ExportedImage]:
    """The project's images by name; ``changes`` counts what cannot be exported as it is."""
    for name in sorted(project.image_names()):
        if not project.has_annotation(name):
            changes[NO_ANNOTATION] += 1
            continue
        try:
            annotation = project.read_annotation(name)
        except AnnotationError:
            changes[BAD_ANNOTATION] += 1
            continue
        height, width = annotation.img_size
        yield ExportedImage(
            name,
            project.image_path(name),
            (width, height),
            _objects(annotation.labels, changes),
            [(tag.name, tag.value) for tag in annotation.img_tags],
        )


def _objects(labels: Sequence[sly.Label], changes: Counter[str]) -> list[ExportedObject]:
    objects = []
    for parts in _same_object(labels):
        tags = {tag.name: tag.value for tag in parts[0].tags}
        score = tags.pop(_SCORE, None)
        name, shape = parts[0].obj_class.name, parts[0].geometry
        if isinstance(shape, sly.Rectangle):
            corners = (shape.top, shape.left, shape.bottom, shape.right)
            box = box_xyxy_from_rectangle_tlbr(corners)
            area = (box[2] - box[0]) * (box[3] - box[1])
            objects.append(ExportedObject(name, box, (), area, score, tags))
            continue
        drawn = [ring for part in parts for ring in _rings_rc(part.geometry, changes)]
        rings = [(ring, area) for ring in drawn if (area := ring_area(ring)) > 0]
        if not rings:
            changes[NO_AREA] += 1
            continue
        area = sum(area for _, area in rings)
        xys = tuple(
            tuple(float(value) for row, col in ring for value in (col, row)) for ring, _ in rings
        )
        objects.append(ExportedObject(name, _around(xys), xys, area, score, tags))
    return objects


def _same_object(labels: Sequence[sly.Label]) -> list[list[sly.Label]]:
    """Outlines of one object have one binding key and class; everything else is one by itself."""
    groups: dict[tuple[Any, ...], list[sly.Label]] = {}
    for number, label in enumerate(labels):
        is_part = label.binding_key is not None and not isinstance(label.geometry, sly.Rectangle)
        key = (label.binding_key, label.obj_class.name) if is_part else (number,)
        groups.setdefault(key, []).append(label)
    return list(groups.values())


def _rings_rc(
    shape: sly.geometry.geometry.Geometry, changes: Counter[str]
) -> list[list[tuple[int, int]]]:
    """A shape as rings of (row, column); lines and points, which a person may draw, have none."""
    if isinstance(shape, sly.Polygon):
        changes[HOLES] += bool(shape.interior)
        return [[(point.row, point.col) for point in shape.exterior]]
    if not isinstance(shape, sly.Bitmap):
        return []
    # Contours run through the middle of pixels; of pixels twice as large they tell the edges.
    contours = sly.Bitmap(shape.data.repeat(2, 0).repeat(2, 1)).to_contours()
    changes[HOLES] += any(contour.interior for contour in contours)
    top, left = shape.origin.row, shape.origin.col
    return [
        [(top + (point.row + 1) // 2, left + (point.col + 1) // 2) for point in contour.exterior]
        for contour in contours
    ]


def _around(rings_xy: Sequence[Sequence[float]]) -> BoxXyxy:
    xs = [x for ring in rings_xy for x in ring[0::2]]
    ys = [y for ring in rings_xy for y in ring[1::2]]
    return min(xs), min(ys), max(xs), max(ys)

"""The finished project as files of COCO and YOLO."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np
import yaml
from numpy.typing import NDArray

from florence2.records import BoxXyxy, SizeWh
from serve.labeled_data import same_objects
from serve.labeling.project import DATASET, AnnotationError, GrowingProject
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
    for parts in same_objects(labels):
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


COCO_DIR: Final = "coco"
_INSTANCES, _CAPTIONS = "coco_instances.json", "coco_captions.json"
_CAPTION_TAG: Final = "caption"


def export_coco(project: GrowingProject, folder: Path) -> Export:
    """Boxes, outlines and captions; file names are those of the project, which has the images."""
    export = Export(folder)
    annotations = folder / DATASET / "annotations"
    annotations.mkdir(parents=True, exist_ok=True)
    numbers = {one.name: number for number, one in enumerate(project.meta.obj_classes, 1)}
    categories = [
        {"id": number, "name": name, "supercategory": name} for name, number in numbers.items()
    ]
    images: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []

    def instances() -> Iterator[dict[str, Any]]:
        for number, image in enumerate(exported_images(project, export.changes), 1):
            images.append(_image(image, number))
            captions.extend(_captions(image, number))
            for found in image.objects:
                yield _instance(found, number, numbers[found.class_name])

    _write(annotations / _INSTANCES, instances(), images, categories)
    if captions:
        _write(annotations / _CAPTIONS, captions, images, categories)
    else:
        (annotations / _CAPTIONS).unlink(missing_ok=True)
    return export


def _image(image: ExportedImage, number: int) -> dict[str, Any]:
    width, height = image.size_wh
    entry = {"id": number, "file_name": image.name, "width": width, "height": height}
    texts = [(name, value) for name, value in image.texts if name != _CAPTION_TAG]
    return entry | ({"attributes": dict(texts)} if texts else {})


def _captions(image: ExportedImage, number: int) -> list[dict[str, Any]]:
    return [
        {"image_id": number, "caption": value}
        for name, value in image.texts
        if name == _CAPTION_TAG
    ]


def _instance(found: ExportedObject, image: int, category: int) -> dict[str, Any]:
    x1, y1, x2, y2 = found.box_xyxy
    entry: dict[str, Any] = {
        "image_id": image,
        "category_id": category,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": found.area,
        "iscrowd": 0,
        "segmentation": [list(ring) for ring in found.rings_xy],
    }
    if found.score is not None:
        entry["score"] = found.score
    return entry | ({"attributes": dict(found.texts)} if found.texts else {})


def _write(
    path: Path,
    annotations: Iterable[dict[str, Any]],
    images: list[dict[str, Any]],
    categories: list[dict[str, Any]],
) -> None:
    """``images`` may grow while ``annotations`` are taken: they are written after them."""
    with _replacing(path) as file:
        info = {"description": "Labels of Florence-2, from a Supervisely project", "version": "1.0"}
        file.write(f'{{"info": {json.dumps(info)}, "licenses": [],\n"annotations": [')
        for number, entry in enumerate(annotations, 1):
            file.write(",\n" if number > 1 else "\n")
            file.write(json.dumps({"id": number} | entry))
        file.write('],\n"images": ')
        file.write(json.dumps(images))
        file.write(f',\n"categories": {json.dumps(categories)}}}\n')


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A file that takes the place of ``path`` once it is whole."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        yield file
    part.replace(path)


YOLO_DIR: Final = "yolo"
VAL_FRACTION: Final = 0.2
CORNERS: Final = "boxes written as four corners, because trainers refuse boxes beside outlines"
RENAMED: Final = (
    "images have another name than in the project: no two share a label file, and trainers do not "
    "know .jfif"
)
TAGS: Final = "objects or images with tags, such as scores and texts, which YOLO files do not have"
NO_CLASSES: Final = "The project has no objects to train on, so no files were written."
NO_VAL: Final = "No image is in val, so data.yaml names train for it."

_TRAIN, _VAL = "train", "val"
_DATA: Final = "data.yaml"
# Written by earlier versions; the SDK's importer would read it as well.
_MADE: Final = ("images", "labels", "data_config.yaml")
_HEADER: Final = """\
# Paths are relative to this file's folder, as ultralytics takes them where there is no `path`; give
# it this file by its absolute path. Trainers that take paths from elsewhere (YOLOv5, YOLOv7) need
# one more line:  path: /absolute/path/of/this/folder
"""


def export_yolo(
    project: GrowingProject, folder: Path, val_fraction: float = VAL_FRACTION
) -> Export:
    """Outlines if the project has any, else boxes; ``val_fraction`` of the images are for ``val``.

    Which images those are is decided by a hash of each file, so that new images move no others.
    """
    export = Export(folder)
    folder.mkdir(exist_ok=True)
    # What is there is no data set until the new one is whole.
    (folder / _DATA).unlink(missing_ok=True)
    _remove(folder, _MADE)
    classes = [one.name for one in project.meta.obj_classes]
    if not classes:
        export.notes.append(NO_CLASSES)
        return export
    for kind in ("images", "labels"):
        for split in (_TRAIN, _VAL):
            (folder / kind / split).mkdir(parents=True)
    numbers = {name: number for number, name in enumerate(classes)}
    has_outlines = any(one.geometry_type is not sly.Rectangle for one in project.meta.obj_classes)
    names = file_names(project.image_names())
    shares: dict[str, float] = {}
    for image in exported_images(project, export.changes):
        name = names[image.name]
        shares[name] = _share(image.path)
        split = _VAL if shares[name] < val_fraction else _TRAIN
        shutil.copyfile(image.path, folder / "images" / split / name)
        lines = _lines(image, numbers, has_outlines=has_outlines)
        _label_path(folder, split, name).write_text("".join(lines), "utf-8")
        _count_changes(image, name, export, has_outlines=has_outlines)
    has_val = _fill_both(folder, shares, val_fraction)
    if not has_val:
        export.notes.append(NO_VAL)
    _write_data(folder, project, has_val=has_val)
    return export


def file_names(names: Iterable[str]) -> dict[str, str]:
    """For every image its file name here: its own, if no other one has that without its extension.

    Case and the ways to write an accent do not tell two names apart: not every disk keeps them.
    """
    chosen: dict[str, str] = {}
    taken: set[str] = set()
    rest = []
    for name in sorted(names):
        stem, extension = os.path.splitext(name)
        if (key := _key(stem)) in taken:
            rest.append((name, stem, extension))
        else:
            taken.add(key)
            chosen[name] = stem + _known(extension)
    for name, stem, extension in rest:
        wanted, number = f"{stem}_{extension[1:]}", 1
        while _key(free := wanted if number == 1 else f"{wanted}_{number}") in taken:
            number += 1
        taken.add(_key(free))
        chosen[name] = free + _known(extension)
    return chosen


def _key(stem: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", stem).casefold())


def _known(extension: str) -> str:
    """Trainers pass over JPEG files that end in .jfif."""
    return ".jpg" if extension.lower() == ".jfif" else extension


def _remove(folder: Path, names: Sequence[str]) -> None:
    """Only what exports wrote: a trainer may have put its runs beside it."""
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _share(path: Path) -> float:
    """A number from 0 to 1 that a file's bytes decide, the same in every run."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return int.from_bytes(digest[:6]) / 2**48


def _label_path(folder: Path, split: str, name: str) -> Path:
    return folder / "labels" / split / f"{os.path.splitext(name)[0]}.txt"


def _lines(image: ExportedImage, numbers: Mapping[str, int], *, has_outlines: bool) -> list[str]:
    lines = []
    for found in image.objects:
        places = _outline(found) if has_outlines else _center_and_size(found)
        scaled = places.reshape(-1, 2) / np.array(image.size_wh)
        words = " ".join(f"{value:.6f}" for value in scaled.ravel())
        lines.append(f"{numbers[found.class_name]} {words}\n")
    return lines


def _center_and_size(found: ExportedObject) -> NDArray[np.float64]:
    x1, y1, x2, y2 = found.box_xyxy
    return np.array([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])


def _outline(found: ExportedObject) -> NDArray[np.float64]:
    """One ring [points, 2], as a label file has them: it goes to further rings and back."""
    if not found.rings_xy:
        x1, y1, x2, y2 = found.box_xyxy
        return np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
    first, *others = (np.array(ring).reshape(-1, 2) for ring in found.rings_xy)
    for ring in others:
        distances = np.abs(first[:, None] - ring[None]).sum(axis=2)
        here, there = np.unravel_index(distances.argmin(), distances.shape)
        parts = (first[: here + 1], ring[there:], ring[: there + 1], first[here:])
        first = np.concatenate(parts)
    return first


def _count_changes(image: ExportedImage, name: str, export: Export, *, has_outlines: bool) -> None:
    changes = export.changes
    if has_outlines:
        changes[CORNERS] += sum(not found.rings_xy for found in image.objects)
    changes[RENAMED] += name != image.name
    changes[TAGS] += bool(image.texts)
    changes[TAGS] += sum(bool(found.texts) or found.score is not None for found in image.objects)


def _fill_both(folder: Path, shares: Mapping[str, float], val_fraction: float) -> bool:
    """Whether ``val`` has images. Of a few the hash may leave one side none: one image moves."""
    by_share = sorted(shares, key=lambda name: (shares[name], name))
    count = sum(shares[name] < val_fraction for name in by_share)
    if count == len(by_share) > 0:
        _move(folder, by_share[-1], _VAL, _TRAIN)
        return count > 1
    if not count and val_fraction and len(by_share) > 1:
        _move(folder, by_share[0], _TRAIN, _VAL)
        return True
    return count > 0


def _move(folder: Path, name: str, start: str, end: str) -> None:
    (folder / "images" / start / name).rename(folder / "images" / end / name)
    _label_path(folder, start, name).rename(_label_path(folder, end, name))


def _write_data(folder: Path, project: GrowingProject, *, has_val: bool) -> None:
    classes = project.meta.obj_classes
    data = {
        "train": f"images/{_TRAIN}",
        # Trainers refuse a data set without images to validate on.
        "val": f"images/{_VAL if has_val else _TRAIN}",
        "nc": len(classes),
        "names": [one.name for one in classes],
        "colors": [list(one.color) for one in classes],
    }
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None)
    (folder / _DATA).write_text(_HEADER + text, "utf-8")

"""The project as COCO files: ``coco/ds0/annotations/coco_instances.json``, captions beside it.

An annotation has its ``score`` where the label has one, and the label's other tags as
``attributes``. Files are written as the project is read: it may be larger than memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TextIO

from serve.labeling.exports import Export, ExportedImage, ExportedObject, exported_images
from serve.labeling.project import DATASET, GrowingProject

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

"""The finished project in other tools' formats, by the SDK's own converters."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from serve.sdk import sly

COCO_DIR: Final = "coco"
YOLO_DIR: Final = "yolo"


def export_coco(root: Path) -> Path:
    """``coco/ds0/annotations``: boxes and polygons, and captions where there are any.

    File names are those of ``ds0/img``; the images are not copied once more.
    """
    with _quiet():
        project = sly.Project(str(root), sly.OpenMode.READ)
        target = _emptied(root / COCO_DIR)
        sly.convert.project_to_coco(
            project, dest_dir=str(target), with_captions=True, log_progress=False
        )
    return target


def export_yolo(root: Path) -> Path:
    """``yolo``: outlines if every class has outlines only, boxes otherwise."""
    with _quiet():
        project = sly.Project(str(root), sly.OpenMode.READ)
        shapes = {obj_class.geometry_type for obj_class in project.meta.obj_classes}
        target = _emptied(root / YOLO_DIR)
        sly.convert.project_to_yolo(
            project,
            dest_dir=str(target),
            task_type="segment" if shapes == {sly.Polygon} else "detect",
            log_progress=False,
        )
    return target


def _emptied(folder: Path) -> Path:
    """Converters add to what is there, so an export is always made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """The SDK warns about every folder beside the dataset and reports each step."""
    before = sly.logger.level
    sly.logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        sly.logger.setLevel(before)

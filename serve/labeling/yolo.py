"""The project for YOLO trainers: images and labels in ``train`` and ``val``, and ``data.yaml``.

Trainers find an image's labels by its name without the extension, so every image has such a name
for itself. They refuse a file that has boxes and outlines, and write into image files that they
think damaged, so images are copied and never linked.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import yaml
from numpy.typing import NDArray

from serve.labeling.exports import Export, ExportedImage, ExportedObject, exported_images
from serve.labeling.project import GrowingProject
from serve.sdk import sly

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

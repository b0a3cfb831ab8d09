"""Labeled images from a folder or file, whatever they were labeled with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from florence2.errors import RequestError
from florence2.labeled.coco import coco_files, read_coco
from florence2.labeled.json_lines import json_lines_files, read_json_lines
from florence2.labeled.reading import Collector, outlines_of_mask
from florence2.labeled.records import LabeledData, LabeledImage, LabeledObject, Ring
from florence2.labeled.yolo import read_yolo, yolo_file
from florence2.records import BoxXyxy, SizeWh
from serve.labeling.images import is_image
from serve.labeling.project import project_folder
from serve.predict.geometry import box_xyxy_from_rectangle_tlbr
from serve.sdk import sly

_META: Final = "meta.json"
# Of a label that a model made: no text about the object.
_SCORE: Final = "confidence"
_NESTED: Final = "datasets"
# What the SDK raises on what is no annotation.
_BROKEN: Final = (
    LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError, OSError,
)  # fmt: skip


def open_labeled(path: Path) -> LabeledData:
    """The labeled images of a Supervisely project, COCO file, data.yaml or .jsonl file.

    ``path`` is the file or the folder it is in, or what ``florence2 label`` wrote. Raises
    RequestError for anything else, for data without labels, and for files that cannot be read.
    """
    if not path.exists():
        raise RequestError(f"Labeled data is a folder or file, and {str(path)!r} does not exist.")
    if path.is_dir() and _is_project(project := project_folder(path)):
        return read_project(project)
    if json_lines_files(path):
        return read_json_lines(path)
    if yolo_file(path):
        return read_yolo(path)
    if coco_files(path):
        return read_coco(path)
    raise RequestError(
        "Labeled data is a Supervisely project (a folder with meta.json), a COCO file (.json), "
        f"YOLO's data.yaml, or .jsonl lines of image, prefix and suffix, and {str(path)!r} is none "
        "of them; name the file itself."
    )


def _is_project(folder: Path) -> bool:
    """A folder with the classes of a project."""
    try:
        meta = json.loads((folder / _META).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(meta, dict) and "classes" in meta


def read_project(folder: Path) -> LabeledData:
    """A Supervisely project on disk: boxes and outlines, their texts, and the images' tags.

    Outlines of one object (a binding key) are one object. Raises RequestError for no labels.
    """
    try:
        meta = sly.ProjectMeta.from_json(json.loads((folder / _META).read_text("utf-8")))
    # The SDK has no class of its own for what it cannot read.
    except Exception as error:
        raise RequestError(
            f"A project has its classes in {_META}, and that of {str(folder)!r} cannot be read "
            f"({type(error).__name__}: {error}); download the project again."
        ) from error
    collector = Collector(folder, "supervisely")
    for dataset in _datasets(folder):
        name = "/".join(part for part in dataset.relative_to(folder).parts if part != _NESTED)
        _read_dataset(dataset, name, meta, collector)
    return collector.data(one.name for one in meta.obj_classes)


def _datasets(folder: Path) -> Iterator[Path]:
    """The folders with images and annotations, those inside of others too."""
    for inner in sorted(one for one in folder.iterdir() if one.is_dir()):
        if (inner / "img").is_dir() and (inner / "ann").is_dir():
            yield inner
            if (inner / _NESTED).is_dir():
                yield from _datasets(inner / _NESTED)
        elif inner.name not in ("img", "ann"):
            yield from _datasets(inner)


def _read_dataset(folder: Path, dataset: str, meta: sly.ProjectMeta, collector: Collector) -> None:
    for path in sorted((folder / "img").iterdir()):
        if not is_image(path.name):
            continue
        name = f"{dataset}/{path.name}"
        file = folder / "ann" / f"{path.name}.json"
        if not file.exists():
            # As earlier versions of the SDK named them.
            file = file.with_name(f"{path.stem}.json")
        if not file.exists():
            collector.leave_out(
                name,
                f"An image has an annotation in a file, and {path.name}.json is not there; "
                "download the project again.",
            )
            continue
        try:
            content = json.loads(file.read_text("utf-8"))
            for of_deleted in _take_deleted(content, meta):
                collector.leave_out(
                    name, f"An object has a class of {_META}, and {of_deleted!r} is none."
                )
            annotation = sly.Annotation.from_json(content, meta)
        except _BROKEN as error:
            collector.leave_out(
                name,
                f"An image has an annotation with the classes in {_META}, and this one's cannot be "
                f"read ({type(error).__name__}: {error}).",
            )
            continue
        _add(path, name, dataset, annotation, collector)


def _take_deleted(content: Any, meta: sly.ProjectMeta) -> list[str]:  # noqa: ANN401 - JSON
    """Takes objects of classes that the project does not have any more; gives the classes.

    One of them would make the SDK refuse the whole annotation.
    """
    taken = []
    kept = []
    for one in content["objects"]:
        title = one.get("classTitle")
        if isinstance(title, str) and meta.get_obj_class(title) is None:
            taken.append(title)
        else:
            kept.append(one)
    content["objects"] = kept
    return taken


def _add(
    path: Path, name: str, dataset: str, annotation: sly.Annotation, collector: Collector
) -> None:
    size_wh = collector.size_of(path, name)
    if size_wh is None:
        return
    height, width = annotation.img_size
    if (width, height) != size_wh:
        collector.leave_out(
            name,
            f"Labels are for the upright image as it is, {size_wh[0]}x{size_wh[1]}, and these are "
            f"for {width}x{height}; save the image as it was labeled.",
        )
        return
    objects = tuple(_objects(name, annotation.labels, size_wh, collector))
    tags = {tag.name: None if tag.value is None else str(tag.value) for tag in annotation.img_tags}
    collector.add(LabeledImage(path, name, size_wh, objects, tags, dataset))


def _objects(
    image: str, labels: Iterable[sly.Label], size_wh: SizeWh, collector: Collector
) -> Iterator[LabeledObject]:
    for label, box, rings in shapes_of(labels):
        if box is None and rings is None:
            collector.leave_out(
                image,
                "Boxes, polygons and masks are read, and an object of class "
                f"{label.obj_class.name!r} is a {label.geometry.geometry_name()}.",
            )
            continue
        texts = {
            tag.name: str(tag.value)
            for tag in label.tags
            if tag.value is not None and tag.name != _SCORE
        }
        found = collector.object(
            image,
            label.obj_class.name,
            size_wh,
            box_xyxy=box,
            rings_xy=rings or (),
            texts=texts,
        )
        if found is not None:
            yield found


def shapes_of(
    labels: Iterable[sly.Label],
) -> Iterator[tuple[sly.Label, BoxXyxy | None, tuple[Ring, ...] | None]]:
    """Each object's first label with its box or outlines; neither for lines, points and others."""
    for parts in same_objects(labels):
        shape = parts[0].geometry
        if isinstance(shape, sly.Rectangle):
            corners = (shape.top, shape.left, shape.bottom, shape.right)
            yield parts[0], box_xyxy_from_rectangle_tlbr(corners), None
            continue
        drawn = [_rings(part.geometry) for part in parts]
        known = [one for one in drawn if one is not None]
        rings = tuple(ring for one in known for ring in one) if len(known) == len(drawn) else None
        yield parts[0], None, rings


def same_objects(labels: Iterable[sly.Label]) -> list[list[sly.Label]]:
    """Outlines of one object have one binding key and class; everything else is one by itself."""
    groups: dict[tuple[Any, ...], list[sly.Label]] = {}
    for number, label in enumerate(labels):
        key = label.binding_key
        is_part = isinstance(key, str) and not isinstance(label.geometry, sly.Rectangle)
        group = (key, label.obj_class.name) if is_part else (number,)
        groups.setdefault(group, []).append(label)
    return list(groups.values())


def _rings(shape: sly.geometry.geometry.Geometry) -> tuple[Ring, ...] | None:
    """The outlines of a polygon or mask, holes filled; None for lines, points and others."""
    if isinstance(shape, sly.Polygon):
        points = [value for one in shape.exterior for value in (float(one.col), float(one.row))]
        return (tuple(points),)
    if isinstance(shape, sly.Bitmap):
        return outlines_of_mask(shape.data, shape.origin.col, shape.origin.row)
    return None

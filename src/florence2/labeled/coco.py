"""Labels in COCO's JSON: boxes, outlines as polygons or run lengths, and captions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from florence2.errors import RequestError, shown
from florence2.labeled.reading import Collector, find_image, load_json, outlines_of_mask
from florence2.labeled.records import (
    LabeledData,
    LabeledImage,
    LabeledObject,
    Ring,
    WantedAnswer,
)
from florence2.records import SizeWh

_HEAD_BYTES: Final = 65536
_BEGINNING: Final = re.compile(
    rb'"(annotations|categories|licenses)"\s*:\s*\[|"info"\s*:\s*\{|'
    rb'"images"\s*:\s*\[\s*\{[^}]*"file_name"'
)
_CAPTION: Final = "<CAPTION>"
# Where the images are, from the folder of the file: beside it, as published sets have them, or in
# the project that ``florence2 label --coco`` writes beside its files.
_IMAGE_FOLDERS: Final = (
    ".", "images", "img", "data", "..", "../images", "../data", "../../../project/ds0/img",
)  # fmt: skip
_SPLIT_IN_NAME: Final = re.compile(r"_(train|val|valid|test)(\d{4})?$")


def coco_files(path: Path) -> list[Path]:
    """The COCO files that a file or folder is: in it, or one or two folders below it."""
    if path.is_file():
        return [path] if is_coco(path) else []
    found = [file for depth in ("", "*/", "*/*/") for file in path.glob(f"{depth}*.json")]
    return [file for file in sorted(found) if is_coco(file)]


def is_coco(path: Path) -> bool:
    """Whether a file begins as COCO files do."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and bool(_BEGINNING.search(head))


def read_coco(source: Path) -> LabeledData:
    """A COCO file, or a folder with some, such as one for each split.

    The dataset of an image is its file's folder, or the split in its file's name. An image that is
    in several files has what all of them say. Raises RequestError for no COCO file, or no labels.
    """
    files = coco_files(source)
    if not files:
        raise RequestError(
            f"COCO's labels are a JSON file with images and annotations, and {str(source)!r} is "
            "none; name the file."
        )
    collector = Collector(source, "coco")
    classes: dict[str, None] = {}
    for file in files:
        content = load_json(file, "COCO's labels")
        if not all(isinstance(content.get(key), list) for key in ("images", "annotations")):
            if len(files) == 1:
                raise RequestError(
                    f"COCO's labels have lists of images and annotations, and {str(file)!r} lacks "
                    "one; name another file."
                )
            collector.leave_out(file.name, "The file has no lists of images and annotations.")
            continue
        classes |= dict.fromkeys(_File(source, file, content, collector).read())
    return collector.data(classes)


class _File:
    """One file's images and annotations, into a collector."""

    def __init__(
        self, source: Path, file: Path, content: Mapping[str, Any], collector: Collector
    ) -> None:
        self._content = content
        self._collector = collector
        self._dataset = ""
        split = _SPLIT_IN_NAME.search(file.stem)
        folders = [file.parent / folder for folder in _IMAGE_FOLDERS]
        if split is not None:
            self._dataset = split[1]
            folders.append(file.parent.parent / split[0][1:])
        elif source.is_dir() and file.parent != source:
            self._dataset = file.parent.relative_to(source).parts[0]
        self._folders = folders
        listed = content.get("categories")
        entries = [
            (one.get("id"), " ".join(str(one.get("name", "")).split()))
            for one in (listed if isinstance(listed, list) else ())
            if isinstance(one, dict) and isinstance(one.get("id"), int | str)
        ]
        # Numbers by their size, whether or not they are written as text.
        entries.sort(key=lambda entry: str(entry[0]).zfill(9))
        self._categories = {number: name for number, name in entries if name}

    def read(self) -> list[str]:
        """Adds everything; gives the classes in the order of their numbers."""
        of_image: dict[object, list[Mapping[str, Any]]] = {}
        for number, one in enumerate(self._content["annotations"]):
            if isinstance(one, dict) and isinstance(one.get("image_id"), int | str):
                of_image.setdefault(one["image_id"], []).append(one)
            else:
                self._collector.leave_out(
                    f"annotations[{number}]",
                    f"An annotation has an image_id, and {shown(one)} has none.",
                )
        listed: dict[object, str] = {}
        for number, image in enumerate(self._content["images"]):
            name = image.get("file_name") if isinstance(image, dict) else None
            if not isinstance(name, str) or not name or not isinstance(image.get("id"), int | str):
                self._collector.leave_out(
                    f"images[{number}]",
                    f"An image has an id and a file_name, and {shown(image)} lacks one.",
                )
                continue
            if listed.setdefault(image["id"], name) != name:
                self._collector.leave_out(
                    name,
                    f"An id is one image's, and {shown(image['id'])} is that of "
                    f"{listed[image['id']]!r} already; number the images anew.",
                )
                continue
            self._add(image, name, of_image.pop(image["id"], []))
        for identity, unplaced in of_image.items():
            self._collector.leave_out(
                f"image_id {identity}",
                f"{len(unplaced)} annotations are about an image that is not listed.",
            )
        return list(self._categories.values())

    def _add(self, image: Mapping[str, Any], name: str, annotations: Sequence[Any]) -> None:
        path = find_image(name, self._folders)
        if PureWindowsPath(name).root and path != Path(name):
            # Of another machine: here the image has no such folder, and perhaps a second entry.
            name = path.name
        unique = f"{self._dataset}/{name}" if self._dataset else name
        size_wh = self._collector.size_of(path, unique)
        if size_wh is None:
            return
        stated = image.get("width") or size_wh[0], image.get("height") or size_wh[1]
        if stated != size_wh:
            self._collector.leave_out(
                unique,
                f"Labels are for the upright image as it is, {size_wh[0]}x{size_wh[1]}, and these "
                f"are for {stated[0]}x{stated[1]}; save the image as it was labeled.",
            )
            return
        placed = [
            (bool(one.get("iscrowd")), found)
            for one in annotations
            for found in self._objects(unique, one, size_wh)
        ]
        objects = tuple(found for is_crowd, found in placed if not is_crowd)
        crowds = tuple(found for is_crowd, found in placed if is_crowd)
        answers = tuple(
            WantedAnswer(_CAPTION, " ".join(one["caption"].split()))
            for one in annotations
            if isinstance(one.get("caption"), str) and one["caption"].strip()
        )
        self._collector.add(
            LabeledImage(path, unique, size_wh, objects, {}, self._dataset, answers, crowds)
        )

    def _objects(
        self, image: str, one: Mapping[str, Any], size_wh: SizeWh
    ) -> Iterator[LabeledObject]:
        if "caption" in one:
            return
        number = one.get("category_id")
        label = self._categories.get(number) if isinstance(number, int | str) else None
        outline = one.get("segmentation")
        problem = None
        if not label:
            problem = f"category_id {shown(number)} is none of the categories"
        elif not one.get("bbox") and not outline:
            problem = f"an object of class {label!r} has neither bbox nor segmentation"
        elif one.get("bbox") and _corners(one["bbox"]) is None:
            problem = f"a bbox is [x, y, width, height] in numbers, and {shown(one['bbox'])} is not"
        rings: Sequence[Sequence[float]] = ()
        try:
            rings = () if problem else _rings(outline, size_wh)
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            problem = f"the segmentation of an object of class {label!r} is broken ({error})"
        if problem is not None or label is None:
            self._collector.leave_out(image, f"Annotation {one.get('id')}: {problem}.")
            return
        box = one.get("bbox")
        corners = _corners(box) if box else None
        texts = {name: text for name, text in _texts(one) if text}
        # The box of an outline is around it; what COCO's says is the same, rounded.
        found = self._collector.object(
            image, label, size_wh, box_xyxy=corners, rings_xy=rings, texts=texts
        )
        if found is not None:
            if one.get("iscrowd"):
                self._collector.leave_out(
                    image,
                    f"Annotation {one.get('id')}: a crowd of class {label!r} is no single object; "
                    "what is found in it counts as neither right nor wrong.",
                )
            yield found


def _corners(box: object) -> Sequence[float] | None:
    """Corners of [x, y, width, height]; None for anything else."""
    if not isinstance(box, list) or len(box) != 4:
        return None
    if not all(isinstance(value, int | float) for value in box):
        return None
    x, y, width, height = box
    return x, y, x + width, y + height


def _texts(one: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    attributes = one.get("attributes")
    if isinstance(attributes, dict):
        for name, value in attributes.items():
            if isinstance(value, str):
                yield str(name), " ".join(value.split())


def _rings(outline: object, size_wh: SizeWh) -> Sequence[Sequence[float]]:
    """Polygons as they are, run lengths as the outlines of their pixels."""
    if not outline:
        return ()
    if isinstance(outline, dict):
        return _rings_of_runs(outline, size_wh)
    if isinstance(outline, list):
        return [outline] if not isinstance(outline[0], list) else outline
    raise ValueError("it is neither polygons nor run lengths")


def _rings_of_runs(encoded: Mapping[str, Any], size_wh: SizeWh) -> tuple[Ring, ...]:
    """The outlines of a mask that COCO keeps as the lengths of its runs, column by column."""
    height, width = (int(value) for value in encoded["size"])
    if (width, height) != size_wh:
        raise ValueError(f"its mask is {width}x{height}")
    counts = encoded["counts"]
    lengths = np.array(_lengths(counts) if isinstance(counts, str) else counts, np.int64)
    if (lengths < 0).any() or lengths.sum() != width * height:
        raise ValueError("its run lengths do not fill its mask")
    values = np.arange(len(lengths)) % 2 == 1
    mask: NDArray[np.bool_] = np.repeat(values, lengths).reshape(width, height).T
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return ()
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return outlines_of_mask(part, int(columns[0]), int(rows[0]))


def _lengths(text: str) -> list[int]:
    """COCO's string of run lengths: six bits a character, from the third on as differences."""
    lengths: list[int] = []
    value = shift = 0
    for char in text.encode("ascii"):
        bits = char - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return lengths

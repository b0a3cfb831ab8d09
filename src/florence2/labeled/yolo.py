"""Labels as YOLO trainers keep them: a data.yaml, and beside each image a text file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from florence2.errors import RequestError, shown
from florence2.labeled.reading import IMAGE_SUFFIXES, Collector
from florence2.labeled.records import LabeledData, LabeledImage, LabeledObject
from florence2.records import SizeWh

SPLITS: Final = ("train", "val", "test")
_IMAGES, _LABELS = "images", "labels"


def yolo_file(path: Path) -> Path | None:
    """The data.yaml that a file or folder is; None for none."""
    if path.is_file():
        candidates = [path] if path.suffix.lower() in (".yaml", ".yml") else []
    else:
        candidates = sorted((*path.glob("*.yaml"), *path.glob("*.yml")))
        candidates.sort(key=lambda file: file.stem != "data")
    for file in candidates:
        try:
            content = yaml.safe_load(file.read_text("utf-8-sig"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(content, dict) and any(split in content for split in SPLITS):
            return file
    return None


def read_yolo(source: Path) -> LabeledData:
    """The images of all splits, each with its objects; one without a label file has none.

    Raises RequestError for no data.yaml with names and splits, or no labels.
    """
    file = yolo_file(source)
    if file is None:
        raise RequestError(
            "YOLO's labels have a data.yaml with names and folders (train, val), and "
            f"{str(source)!r} is none; name it."
        )
    text = file.read_text("utf-8-sig")
    content = yaml.safe_load(text)
    # As they are written: YAML takes on for true, and 007 for a number.
    names = _names(yaml.load(text, yaml.BaseLoader), file)
    collector = Collector(source, "yolo")
    reader = _Reader(
        Path(os.path.abspath(file.parent)), names, bool(content.get("kpt_shape")), collector
    )
    root = file.parent / str(content.get("path") or ".")
    read: set[str] = set()
    for split in SPLITS:
        listed = content.get(split)
        for place in map(str, filter(None, listed if isinstance(listed, list) else [listed])):
            # Trainers refuse data without images to validate on, so small sets name train again.
            if place not in read:
                reader.read(split, root, place)
            read.add(place)
    return collector.data(names.values())


def _names(content: Mapping[str, Any], file: Path) -> dict[int, str]:
    listed = content.get("names")
    names = dict(enumerate(listed)) if isinstance(listed, list) else listed
    numbered: dict[int, str] = {}
    if isinstance(names, dict) and all(str(key).isdecimal() for key in names):
        numbered = {int(key): " ".join(str(name).split()) for key, name in names.items()}
    if not numbered or not all(numbered.values()):
        raise RequestError(
            f"A data.yaml names its classes, and {str(file)!r} has names: "
            f"{shown(content.get('names'))}; write for example names: [dog, cat]."
        )
    return numbered


@dataclass(frozen=True, slots=True)
class _Reader:
    """``has_keypoints`` says that points follow each box."""

    base: Path
    names: Mapping[int, str]
    has_keypoints: bool
    collector: Collector

    def read(self, split: str, root: Path, place: str) -> None:
        """The images of a folder, or of a text file with a path on each line."""
        path = next((one for one in self._places(root, place) if _exists(one)), None)
        if path is None:
            self.collector.leave_out(
                f"{split}: {place}", f"{split} names {place!r}, and there is nothing."
            )
            return
        for image in _listed(path) if path.is_file() else _images_below(path):
            self._add(split, image)

    def _places(self, root: Path, place: str) -> Iterator[Path]:
        for base in (root, self.base):
            yield base / place
            # Exported as if from a folder beside it, which the trainers understand too.
            yield base / place.removeprefix("../")

    def _add(self, split: str, listed: Path) -> None:
        # One file may be written in many ways.
        path = Path(os.path.abspath(listed))
        name = _name(path, self.base)
        if self.collector.is_known(name):
            self.collector.leave_out(
                name, f"An image is in one split, and this one is again in {split}."
            )
            return
        size_wh = self.collector.size_of(path, name)
        if size_wh is None:
            return
        labels = _label_path(path)
        try:
            lines = labels.read_text("utf-8-sig").splitlines() if labels.exists() else []
        except (OSError, ValueError) as error:
            self.collector.leave_out(
                name, f"The label file {str(labels)!r} cannot be read ({error})."
            )
            return
        found = [
            one
            for number, line in enumerate(lines, 1)
            if line.strip() and (one := self._object(name, size_wh, line.split(), number))
        ]
        self.collector.add(LabeledImage(path, name, size_wh, tuple(found), {}, split))

    def _object(
        self, image: str, size_wh: SizeWh, columns: Sequence[str], number: int
    ) -> LabeledObject | None:
        try:
            label = self.names[int(float(columns[0]))]
            places = [float(value) for value in columns[1:]]
            box, ring = _scaled(places[:4] if self.has_keypoints else places, size_wh)
        except LookupError:
            problem = f"of class {columns[0]}, which is none of the {len(self.names)} names"
        except (ValueError, OverflowError):
            problem = "neither a class and a box nor a class and an outline"
        else:
            return self.collector.object(
                image, label, size_wh, box_xyxy=box, rings_xy=(ring,) if ring else ()
            )
        self.collector.leave_out(image, f"Line {number} is {problem}: {shown(' '.join(columns))}.")
        return None


def _scaled(
    places: Sequence[float], size_wh: SizeWh
) -> tuple[Sequence[float] | None, Sequence[float]]:
    """Corners of a box in pixels, or a ring; ValueError for neither."""
    scaled = [value * size_wh[place % 2] for place, value in enumerate(places)]
    if len(scaled) == 4:
        x, y, width, height = scaled
        return (x - width / 2, y - height / 2, x + width / 2, y + height / 2), ()
    if len(scaled) < 6 or len(scaled) % 2:
        raise ValueError(f"{len(scaled)} numbers")
    return None, scaled


def _images_below(folder: Path) -> list[Path]:
    # Unlike Path's own, this walk passes over folders that cannot be read.
    walked = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return sorted(path for path in walked if path.suffix.lower() in IMAGE_SUFFIXES)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        # A name too long, or with a zero byte.
        return False


def _listed(file: Path) -> Iterator[Path]:
    for line in file.read_text("utf-8-sig", "surrogateescape").splitlines():
        if line.strip():
            yield file.parent / line.strip()


def _name(path: Path, base: Path) -> str:
    """Below the folder of the data.yaml, where it is."""
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def _label_path(image: Path) -> Path:
    """The text file of an image: the last folder ``images`` on the way is ``labels`` there."""
    parts = list(image.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == _IMAGES:
            parts[place] = _LABELS
            break
    return Path(*parts).with_suffix(".txt")

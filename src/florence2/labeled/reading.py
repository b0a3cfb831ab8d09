"""What readers of every format do alike: find images, place objects, name what is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from florence2.errors import ImageError, RequestError, shown
from florence2.images import upright_size
from florence2.labeled.records import (
    LabeledData,
    LabeledImage,
    LabeledObject,
    LeftOut,
    Ring,
)
from florence2.opencv import cv2
from florence2.records import BoxXyxy, SizeWh

IMAGE_SUFFIXES: Final = frozenset((
    ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp",
))  # fmt: skip
_MOST_REASON: Final = 600


class Collector:
    """The images of one source as they are read, by their names, and what is left out of it."""

    def __init__(self, source: Path, data_format: str) -> None:
        self._source = source
        self._format = data_format
        self._images: dict[str, LabeledImage] = {}
        self._left_out: list[LeftOut] = []

    def leave_out(self, name: str, reason: str) -> None:
        """Names what is passed over; the reason becomes one line, whatever is quoted in it."""
        line = " ".join(reason.split())
        if len(line) > _MOST_REASON:
            line = f"{line[: _MOST_REASON // 2]} ... {line[-_MOST_REASON // 2 :]}"
        self._left_out.append(LeftOut(name, line))

    def size_of(self, path: Path, name: str) -> SizeWh | None:
        """The size of an upright image, from its header; None, and named, where there is none."""
        known = self._images.get(name)
        if known is not None and known.path == path:
            return known.size_wh
        try:
            return upright_size(path)
        except ImageError as error:
            self.leave_out(name, str(error))
            return None

    def object(
        self,
        image: str,
        label: str,
        size_wh: SizeWh,
        *,
        box_xyxy: Sequence[float] | None = None,
        rings_xy: Iterable[Sequence[float]] = (),
        texts: Mapping[str, str] | None = None,
    ) -> LabeledObject | None:
        """An object inside its image; None, and named, where no part of it is.

        Without ``box_xyxy`` it has the box around its outlines.
        """
        rings = [inside for ring in rings_xy if (inside := _ring_inside(ring, size_wh))]
        box = _box_inside(_around(rings) if box_xyxy is None else box_xyxy, size_wh)
        if box is None:
            received = "" if box_xyxy is None else f" and has the box {_shown_box(box_xyxy)}"
            self.leave_out(
                image,
                f"An object has an area in its image, and one of class {label!r} has none in "
                f"{size_wh[0]}x{size_wh[1]}{received}.",
            )
            return None
        return LabeledObject(label, box, tuple(rings), dict(texts or {}))

    def add(self, image: LabeledImage) -> None:
        """An image, or more about one that was added; what stands there twice is named."""
        known = self._images.get(image.name)
        if known is not None:
            tags = {**known.tags, **image.tags}
            objects = (*known.objects, *image.objects)
            answers = tuple(dict.fromkeys((*known.answers, *image.answers)))
            crowds = (*known.crowds, *image.crowds)
            image = replace(known, objects=objects, tags=tags, answers=answers, crowds=crowds)
        once: dict[tuple[str, BoxXyxy, tuple[Ring, ...]], LabeledObject] = {}
        for found in image.objects:
            key = found.label, found.box_xyxy, found.rings_xy
            if key in once:
                self.leave_out(
                    image.name,
                    f"An object is labeled once, and one of class {found.label!r} with the box "
                    f"{_shown_box(found.box_xyxy)} is there again.",
                )
            once.setdefault(key, found)
        self._images[image.name] = replace(image, objects=tuple(once.values()))

    def is_known(self, name: str) -> bool:
        """Whether an image of this name was added."""
        return name in self._images

    def data(self, classes: Iterable[str]) -> LabeledData:
        """All of it, in the order of the names.

        Raises RequestError where no image can be read, or nothing is labeled in any.
        """
        images = tuple(image for _, image in sorted(self._images.items()))
        left_out = tuple(self._left_out)
        if not images:
            reason = f"; the first of {len(left_out)}: {left_out[0].reason}" if left_out else ""
            raise RequestError(
                f"Labeled data has at least one image that can be read, and {str(self._source)!r} "
                f"has none{reason}"
            )
        if not any(image.objects or image.answers or image.tags for image in images):
            reason = f" ({left_out[0].name}: {left_out[0].reason})" if left_out else ""
            raise RequestError(
                f"Labeled data has labels, and none of the {len(images)} images of "
                f"{str(self._source)!r} has one that can be used{reason}; label some first."
            )
        named = dict.fromkeys(classes)
        found = sorted({one.label for image in images for one in image.objects} - named.keys())
        return LabeledData(self._source, self._format, images, (*named, *found), left_out)


def find_image(name: str, folders: Iterable[Path]) -> Path:
    """Where the image of a name is: in the first folder that has it, by its path or file name.

    Where none has it, where it would be in the first.
    """
    places = [Path(name), Path(PureWindowsPath(name).name)]
    candidates = [folder / place for place in places for folder in folders]
    return next((path for path in candidates if _is_file(path)), candidates[0])


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        # A name too long, or with a zero byte.
        return False


def load_json(path: Path, what: str) -> Any:  # noqa: ANN401 - whatever is in the file
    """The content of a JSON file; RequestError for a file that is none."""
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(
            f"{what} is a JSON file, and {str(path)!r} cannot be read as one ({reason}); mend it "
            "or name another one."
        ) from error


def outlines_of_mask(mask: NDArray[np.bool_], left: int, top: int) -> tuple[Ring, ...]:
    """The outer outlines of the pixels [height, width] that are set, along the edges of pixels.

    ``left`` and ``top`` say where in the image the mask begins. Holes are filled.
    """
    # Contours run through the middle of pixels; of pixels twice as large they tell the edges.
    doubled = mask.astype(np.uint8).repeat(2, 0).repeat(2, 1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    rings = [(contour.reshape(-1, 2) + 1) // 2 + (left, top) for contour in contours]
    return tuple(tuple(float(value) for value in ring.ravel()) for ring in rings)


def _ring_inside(ring: Sequence[float], size_wh: SizeWh) -> Ring | None:
    """A ring of three points or more with an area, its points moved into the image."""
    if len(ring) < 6 or len(ring) % 2 or not _are_numbers(ring):
        return None
    points = np.clip(np.array(ring, np.float64).reshape(-1, 2), 0, size_wh)
    if (np.ptp(points, axis=0) == 0).any():
        return None
    return tuple(float(value) for value in points.ravel())


def _around(rings: Sequence[Ring]) -> Sequence[float]:
    xs = [x for ring in rings for x in ring[0::2]]
    ys = [y for ring in rings for y in ring[1::2]]
    return (min(xs), min(ys), max(xs), max(ys)) if rings else ()


def _box_inside(box: Sequence[float], size_wh: SizeWh) -> BoxXyxy | None:
    """What of a box is in the image; None for no area."""
    if len(box) != 4 or not _are_numbers(box):
        return None
    width, height = size_wh
    x1, x2 = (min(max(float(x), 0.0), float(width)) for x in (box[0], box[2]))
    y1, y2 = (min(max(float(y), 0.0), float(height)) for y in (box[1], box[3]))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _are_numbers(values: Sequence[object]) -> bool:
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in values
    )


def _shown_box(box: Sequence[float]) -> str:
    if _are_numbers(box):
        return "[" + ", ".join(f"{value:g}" for value in box) + "]"
    return shown(list(box))

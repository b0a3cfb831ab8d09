"""Images with their labels drawn on: class and score beside every object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from florence2.budget import open_pixels
from florence2.errors import ImageError
from florence2.images import open_image
from florence2.opencv import cv2
from serve.labeling.project import AnnotationError, GrowingProject
from serve.sdk import sly

PREVIEWS_DIR: Final = "previews"
MAX_SIDE: Final = 1600
OPACITY: Final = 0.2
# Below, what lies between the pixels that are looked at would be lost.
_LINEAR_FROM: Final = 0.5
# A person may have drawn lines and points too.
_FILLED: Final = (sly.Rectangle, sly.Polygon, sly.Bitmap)
_WHITE: Final = (255, 255, 255)


def preview_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.jpg"


def draw_missing_previews(project: GrowingProject, folder: Path) -> list[str]:
    """Previews where there is none that is as new as the labels; a sentence about each it cannot
    draw."""
    folder.mkdir(exist_ok=True)
    problems = []
    for name in sorted(project.image_names()):
        path = preview_path(folder, name)
        if not project.has_annotation(name) or _is_current(path, project.annotation_path(name)):
            continue
        try:
            with open_image(project.image_path(name), room=open_pixels().hold) as picture:
                draw_preview(preview_pixels(picture.image), project.read_annotation(name), path)
        except (ImageError, AnnotationError) as error:
            problems.append(f"{name} has no preview: {error}")
    return problems


def _is_current(preview: Path, annotation: Path) -> bool:
    return preview.exists() and preview.stat().st_mtime_ns >= annotation.stat().st_mtime_ns


def preview_pixels(picture: Image.Image) -> NDArray[np.uint8]:
    """A copy of an RGB picture at the size of its preview, at most 1600 px a side: [H, W, 3]."""
    scale = min(1.0, MAX_SIDE / max(picture.size))
    if scale == 1:
        return np.array(picture)
    size_wh = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Pillow's own filters take ten times as long, which the model would wait for.
    how = cv2.INTER_LINEAR if scale >= _LINEAR_FROM else cv2.INTER_AREA
    shrunk: NDArray[np.uint8] = cv2.resize(np.asarray(picture), size_wh, interpolation=how)
    return shrunk


def draw_preview(pixels: NDArray[np.uint8], annotation: sly.Annotation, path: Path) -> None:
    """Writes a JPEG of what ``preview_pixels`` gave and the labels, whole or not at all.

    They are drawn on ``pixels`` itself.
    """
    height, width = pixels.shape[:2]
    if annotation.img_size != (height, width):
        annotation = annotation.resize((height, width))
    thickness = max(1, round(max(height, width) / 400))
    if all(type(label.geometry) in _FILLED for label in annotation.labels):
        _tint(pixels, annotation.labels)
        annotation.draw_contour(pixels, thickness=thickness)
    else:
        annotation.draw_pretty(pixels, thickness=thickness, opacity=OPACITY)
    canvas = Image.fromarray(pixels)
    _write_names(canvas, annotation)
    # Several are drawn at a time.
    part = path.with_name(f".{path.name}.part")
    canvas.save(part, "JPEG", quality=90)
    part.replace(path)


def _tint(pixels: NDArray[np.uint8], labels: Sequence[sly.Label]) -> None:
    """Tints what labels cover, the last one of several, in uint8 RGB [H, W, 3].

    ``Annotation.draw_pretty`` does the same with ten times the work: it mixes all pixels as floats.
    """
    numbers: dict[tuple[int, ...], int] = {}
    boxes: dict[int, list[sly.Rectangle]] = {}
    top_color = np.zeros(pixels.shape[:2], np.uint16)
    for label in labels:
        number = numbers.setdefault(tuple(label.obj_class.color), len(numbers) + 1)
        label.geometry.draw(top_color, number)
        boxes.setdefault(number, []).append(label.geometry.to_bbox())
    for color, number in numbers.items():
        rows = slice(min(b.top for b in boxes[number]), max(b.bottom for b in boxes[number]) + 1)
        columns = slice(min(b.left for b in boxes[number]), max(b.right for b in boxes[number]) + 1)
        tint = np.array(color) * OPACITY + np.arange(256)[:, None] * (1 - OPACITY)
        area = pixels[rows, columns]
        tinted = cv2.LUT(area, tint.astype(np.uint8)[None])
        cv2.copyTo(tinted, cv2.compare(top_color[rows, columns], number, cv2.CMP_EQ), area)


def _write_names(canvas: Image.Image, annotation: sly.Annotation) -> None:
    height = max(10, min(canvas.size) // 40)
    pen = _Pen(ImageDraw.Draw(canvas), _font(height))
    for label in annotation.labels:
        corner = label.geometry.to_bbox()
        pen.write(corner.left, corner.top, _title(label), tuple(label.obj_class.color))
    for row, tag in enumerate(annotation.img_tags, start=1):
        pen.write(2, row * (height + 6), f"{tag.name}: {tag.value}"[:160], (0, 0, 0))


@cache
def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=height)


def _title(label: sly.Label) -> str:
    tags = {tag.name: tag.value for tag in label.tags}
    score = tags.pop("confidence", None)
    parts = [label.obj_class.name, *(str(value)[:60] for value in tags.values())]
    if score is not None:
        parts.append(f"{score:.2f}")
    return "  ".join(parts)


@dataclass(frozen=True, slots=True)
class _Pen:
    draw: ImageDraw.ImageDraw
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont

    def write(self, left: int, bottom: int, text: str, color: tuple[int, ...]) -> None:
        """``text`` on a patch of ``color`` that ends at ``bottom``, or at the image's top."""
        box = self.draw.textbbox((0, 0), text, font=self.font)
        width, height = round(box[2]) + 4, round(box[3]) + 2
        top = max(0, bottom - height)
        self.draw.rectangle((left, top, left + width, top + height), fill=color)
        self.draw.text((left + 2, top), text, fill=_WHITE, font=self.font)

"""Images with their labels drawn on: class and score beside every object."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
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
from serve.provenance import RUN_TAG
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
    """A copy of an RGB picture at its preview's size, at most 1600 px a side: BGR [H, W, 3]."""
    scale = min(1.0, MAX_SIDE / max(picture.size))
    size_wh = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Pillow's own filters take ten times as long, which the model would wait for.
    how = cv2.INTER_LINEAR if scale >= _LINEAR_FROM else cv2.INTER_AREA
    pixels = np.asarray(picture)
    shrunk = pixels if scale == 1 else cv2.resize(pixels, size_wh, interpolation=how)
    bgr: NDArray[np.uint8] = cv2.cvtColor(shrunk, cv2.COLOR_RGB2BGR)
    return bgr


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
        for label in annotation.labels:
            label.draw_contour(pixels, color=_bgr_of(label), thickness=thickness)
    else:
        rgb = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
        annotation.draw_pretty(rgb, thickness=thickness, opacity=OPACITY)
        cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR, dst=pixels)
    _write_names(pixels, annotation)
    # The same bytes as Pillow's, without copies of the picture.
    _, encoded = cv2.imencode(".jpg", pixels, (cv2.IMWRITE_JPEG_QUALITY, 90))
    # Several are drawn at a time.
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(encoded.tobytes())
    part.replace(path)


def _tint(pixels: NDArray[np.uint8], labels: Sequence[sly.Label]) -> None:
    """Tints what labels cover, the last one of several, in uint8 BGR [H, W, 3].

    ``Annotation.draw_pretty`` does the same with ten times the work: it mixes all pixels as floats.
    """
    top_label = np.zeros(pixels.shape[:2], np.uint8 if len(labels) < 256 else np.uint16)
    for number, label in enumerate(labels, start=1):
        label.geometry.draw(top_label, number)
    for number, label in enumerate(labels, start=1):
        box = label.geometry.to_bbox()
        inside = slice(box.top, box.bottom + 1), slice(box.left, box.right + 1)
        tint = np.array(_bgr_of(label)) * OPACITY + np.arange(256)[:, None] * (1 - OPACITY)
        tinted = cv2.LUT(pixels[inside], tint.astype(np.uint8)[None])
        is_on_top = cv2.compare(top_label[inside], number, cv2.CMP_EQ)
        cv2.copyTo(tinted, is_on_top, pixels[inside])


def _bgr_of(label: sly.Label) -> tuple[int, ...]:
    return tuple(reversed(label.obj_class.color))


def _write_names(pixels: NDArray[np.uint8], annotation: sly.Annotation) -> None:
    height = max(10, min(pixels.shape[:2]) // 40)
    for label in annotation.labels:
        corner = label.geometry.to_bbox()
        _place(pixels, _patch(_title(label), _bgr_of(label), height), corner.left, corner.top)
    for row, tag in enumerate(annotation.img_tags, start=1):
        patch = _patch(f"{tag.name}: {tag.value}"[:160], (0, 0, 0), height)
        _place(pixels, patch, 2, row * (height + 6))


def _place(pixels: NDArray[np.uint8], patch: NDArray[np.uint8], left: int, bottom: int) -> None:
    """``patch`` with its end at ``bottom``, or at the image's top; the image cuts it."""
    top = max(0, bottom - len(patch) + 1)
    under = pixels[top : top + patch.shape[0], left : left + patch.shape[1]]
    under[:] = patch[: under.shape[0], : under.shape[1]]


@lru_cache(maxsize=256)
def _patch(text: str, color: tuple[int, ...], height: int) -> NDArray[np.uint8]:
    """White ``text`` on ``color``, to be read only."""
    font = _font(height)
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((0, 0), text, font=font)
    patch = Image.new("RGB", (round(box[2]) + 5, round(box[3]) + 3), color)
    ImageDraw.Draw(patch).text((2, 0), text, fill=_WHITE, font=font)
    return np.asarray(patch)


@cache
def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=height)


def _title(label: sly.Label) -> str:
    tags = {tag.name: tag.value for tag in label.tags}
    score = tags.pop("confidence", None)
    tags.pop(RUN_TAG.name, None)
    parts = [label.obj_class.name, *(str(value)[:60] for value in tags.values())]
    if score is not None:
        parts.append(f"{score:.2f}")
    return "  ".join(parts)

"""Images with their labels drawn on: class and score beside every object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from florence2.budget import open_pixels
from florence2.errors import ImageError
from florence2.images import open_image
from serve.labeling.project import AnnotationError, GrowingProject
from serve.sdk import sly

PREVIEWS_DIR: Final = "previews"
MAX_SIDE: Final = 1600
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
                draw_preview(picture.image, project.read_annotation(name), path)
        except (ImageError, AnnotationError) as error:
            problems.append(f"{name} has no preview: {error}")
    return problems


def _is_current(preview: Path, annotation: Path) -> bool:
    return preview.exists() and preview.stat().st_mtime_ns >= annotation.stat().st_mtime_ns


def draw_preview(picture: Image.Image, annotation: sly.Annotation, path: Path) -> None:
    """Writes a JPEG of at most 1600 px a side, whole or not at all."""
    scale = min(1.0, MAX_SIDE / max(picture.size))
    if scale < 1:
        size_wh = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size_wh)
        annotation = annotation.resize((size_wh[1], size_wh[0]))
    pixels = np.array(picture)
    thickness = max(1, round(max(picture.size) / 400))
    annotation.draw_pretty(pixels, thickness=thickness, opacity=0.2)
    canvas = Image.fromarray(pixels)
    _write_names(canvas, annotation)
    part = path.with_name(".part")
    canvas.save(part, "JPEG", quality=90)
    part.replace(path)


def _write_names(canvas: Image.Image, annotation: sly.Annotation) -> None:
    height = max(10, min(canvas.size) // 40)
    pen = _Pen(ImageDraw.Draw(canvas), ImageFont.load_default(size=height))
    for label in annotation.labels:
        corner = label.geometry.to_bbox()
        pen.write(corner.left, corner.top, _title(label), tuple(label.obj_class.color))
    for row, tag in enumerate(annotation.img_tags, start=1):
        pen.write(2, row * (height + 6), f"{tag.name}: {tag.value}"[:160], (0, 0, 0))


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

"""Single labels drawn on what is around them, as small JPEGs for the page about a run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Final

from PIL import Image, ImageDraw

from florence2.records import BoxXyxy
from serve.run_page.figures import LowLabel
from serve.sdk import sly

_SIDE_PX: Final = 320
# A label with what is around it, which says what it is.
_AROUND: Final = 1.6
_MIN_AROUND_PX: Final = 48
_QUALITIES: Final = (82, 50, 20)
_MAX_BYTES: Final = 40_000
"""Of one drawing; all of them have to be part of one page."""
_EDGE: Final = "#202020"
_LINE_PX: Final = 3
_SCORE: Final = "confidence"
_MAX_TEXT: Final = 160


def scores_of(annotation: sly.Annotation) -> dict[str, list[float | None]]:
    """The scores of an annotation's labels by class, None for a label without one."""
    scores: dict[str, list[float | None]] = {}
    for label in annotation.labels:
        scores.setdefault(label.obj_class.name, []).append(_score(label))
    return scores


def draw_label(picture: Image.Image, annotation: sly.Annotation, low: LowLabel) -> None:
    """Gives a label its drawing and text; none where the annotation has it no more as it was.

    ``picture`` is the upright image.
    """
    if low.class_name is None:
        low.text = " / ".join(str(tag.value) for tag in annotation.img_tags)[:_MAX_TEXT]
        low.jpeg = _jpeg(picture, (0, 0, *picture.size), [], "")
        return
    label = _find(annotation, low)
    if label is None:
        return
    height, width = annotation.img_size
    scale_xy = picture.width / width, picture.height / height
    rings = [_scaled(ring, scale_xy) for ring in _rings_xy(label.geometry)]
    texts = (tag.value for tag in label.tags if tag.meta.name in ("text", "description"))
    low.text = " / ".join(map(str, texts))[:_MAX_TEXT]
    color = "#{:02x}{:02x}{:02x}".format(*label.obj_class.color)
    low.jpeg = _jpeg(picture, _around(rings, picture.size), rings, color)


def _find(annotation: sly.Annotation, low: LowLabel) -> sly.Label | None:
    """The label in its place, or, where others came or went, the first of its class and score."""
    of_class = [label for label in annotation.labels if label.obj_class.name == low.class_name]
    in_its_place = of_class[low.index : low.index + 1]
    return next((one for one in (*in_its_place, *of_class) if _has_score(one, low.score)), None)


def _has_score(label: sly.Label, wanted: float | None) -> bool:
    found = _score(label)
    if found is None or wanted is None:
        return found is wanted
    return abs(found - wanted) < 0.001


def _score(label: sly.Label) -> float | None:
    """A project that has another tag of this name has the score under one that begins with it."""
    for tag in label.tags:
        is_number = isinstance(tag.value, int | float) and not isinstance(tag.value, bool)
        if tag.meta.name.startswith(_SCORE) and is_number:
            return float(tag.value)
    return None


def _rings_xy(shape: sly.geometry.geometry.Geometry) -> list[list[tuple[float, float]]]:
    """What to draw of a shape, as rings of (x, y); of lines and points the box around them."""
    if isinstance(shape, sly.Bitmap):
        return [_points(contour.exterior) for contour in shape.to_contours()]
    if isinstance(shape, sly.Polygon):
        return [_points(shape.exterior)]
    box = shape.to_bbox()
    right, bottom = box.right + 1, box.bottom + 1
    return [[(box.left, box.top), (right, box.top), (right, bottom), (box.left, bottom)]]


def _points(points: Sequence[sly.PointLocation]) -> list[tuple[float, float]]:
    return [(point.col, point.row) for point in points]


def _scaled(
    ring: Sequence[tuple[float, float]], scale_xy: tuple[float, float]
) -> list[tuple[float, float]]:
    return [(x * scale_xy[0], y * scale_xy[1]) for x, y in ring]


def _around(rings: Sequence[Sequence[tuple[float, float]]], size_wh: tuple[int, int]) -> BoxXyxy:
    """A square around the rings, as far as it fits into the image."""
    xs, ys = ([point[axis] for ring in rings for point in ring] for axis in (0, 1))
    if not xs:
        return (0, 0, *size_wh)
    extent = max(max(xs) - min(xs), max(ys) - min(ys))
    side = max(extent * _AROUND, _MIN_AROUND_PX)
    spans = []
    for values, length in zip((xs, ys), size_wh, strict=True):
        shown = min(side, length)
        middle = (min(values) + max(values)) / 2
        start = min(max(middle - shown / 2, 0), length - shown)
        spans.append((start, min(start + shown, length)))
    return spans[0][0], spans[1][0], spans[0][1], spans[1][1]


def _jpeg(
    picture: Image.Image,
    box_xyxy: BoxXyxy,
    rings: Sequence[Sequence[tuple[float, float]]],
    color: str,
) -> bytes:
    left, top, right, bottom = box_xyxy
    scale = _SIDE_PX / max(right - left, bottom - top)
    size = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    small = rgb.resize(size, Image.Resampling.BICUBIC, box=box_xyxy, reducing_gap=2.0)
    draw = ImageDraw.Draw(small)
    for ring in rings:
        if len(ring) < 2:
            continue
        places = [((x - left) * scale, (y - top) * scale) for x, y in (*ring, ring[0])]
        # A dark edge, for colors that are the image's own too.
        draw.line(places, fill=_EDGE, width=_LINE_PX + 2)
        draw.line(places, fill=color, width=_LINE_PX)
    for quality in _QUALITIES:
        encoded = io.BytesIO()
        small.save(encoded, "JPEG", quality=quality)
        if encoded.tell() <= _MAX_BYTES:
            break
    return encoded.getvalue()

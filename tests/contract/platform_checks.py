"""What the platform refuses: metas and annotations that do not fit each other or the image."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from serve.sdk import sly

Json = dict[str, Any]
GEOMETRIES = {"rectangle", "polygon", "bitmap", "point", "line", "graph", "any", "oriented_bbox"}
VALUE_TYPES = {"none", "any_number", "any_string", "oneof_string", "date"}


class Refused(Exception):  # noqa: N818
    """An answer that is not 200."""

    def __init__(self, text: str, *, status: int = 400, kind: str = "VALIDATION") -> None:
        super().__init__(text)
        self.status, self.kind = status, kind


def check_meta(meta: Json) -> None:
    for kind, key in (("classes", "title"), ("tags", "name")):
        names = [item.get(key) for item in meta.get(kind, [])]
        for name in names:
            check_name(name)
        if len(set(names)) != len(names):
            raise Refused(f"Names of {kind} repeat: {sorted(names)}.", kind="NONUNIQUE")
    for item in meta.get("classes", []):
        if item.get("shape") not in GEOMETRIES:
            raise Refused(f"Class {item['title']!r} has shape {item.get('shape')!r}.")
    for item in meta.get("tags", []):
        if item.get("value_type") not in VALUE_TYPES:
            raise Refused(f"Tag {item['name']!r} has type {item.get('value_type')!r}.")


def check_name(name: Any) -> None:
    if not isinstance(name, str) or not name.strip() or name != name.strip():
        raise Refused(f"A name is a text without blanks around it, not {name!r}.")
    if len(name) > 128 or any(ord(letter) < 32 for letter in name):
        raise Refused(f"A name has up to 128 printable characters, not {name!r}.")


def check_annotation(annotation: Json, meta: Json, size_wh: tuple[int, int]) -> None:
    """An annotation as it is uploaded: subpixel coordinates, classes and tags of the project."""
    width, height = size_wh
    size = annotation.get("size") or {}
    if (size.get("width"), size.get("height")) != (width, height):
        raise Refused(f"The annotation is for an image of {size}, the image is {width}x{height}.")
    check_tags(annotation.get("tags", []), meta, "imagesOnly")
    for figure in annotation.get("objects", []):
        check_figure(figure, meta, size_wh)


def check_figure(figure: Json, meta: Json, size_wh: tuple[int, int]) -> None:
    shapes = {item["title"]: item["shape"] for item in meta["classes"]}
    title, geometry = figure.get("classTitle"), figure.get("geometryType")
    if title not in shapes:
        raise Refused(f"Class {title!r} is not in the project, which has {sorted(shapes)}.")
    if shapes[title] not in ("any", geometry):
        raise Refused(f"Class {title!r} holds {shapes[title]}, not {geometry}.")
    for x, y in _points(figure):
        if not (math.isfinite(x) and math.isfinite(y)):
            raise Refused(f"Coordinates are numbers, not {(x, y)}.")
        if not (0 <= x <= size_wh[0] and 0 <= y <= size_wh[1]):
            raise Refused(f"Point {(x, y)} of {title!r} is outside the image of {size_wh}.")
    check_tags(figure.get("tags", []), meta, "objectsOnly")


def _points(figure: Json) -> Iterable[tuple[float, float]]:
    if figure["geometryType"] != "bitmap":
        points = figure["points"]
        return [
            tuple(point) for part in (points["exterior"], *points["interior"]) for point in part
        ]
    left, top = figure["bitmap"]["origin"]
    height, width = sly.Bitmap.base64_2_data(figure["bitmap"]["data"]).shape
    return [(left, top), (math.floor(left) + width, math.floor(top) + height)]


def check_tags(tags: list[Json], meta: Json, only: str) -> None:
    metas = {item["name"]: item for item in meta["tags"]}
    for tag in tags:
        if tag.get("name") not in metas:
            raise Refused(f"Tag {tag.get('name')!r} is not in the project: {sorted(metas)}.")
        check_tag(tag.get("value"), metas[tag["name"]], only)


def check_tag(value: Any, meta: Json, only: str) -> None:
    applicable = meta.get("applicable_type", "all")
    if applicable not in ("all", only):
        raise Refused(f"Tag {meta['name']!r} is {applicable}, it was given to {only}.")
    fits = {
        "none": value is None,
        "any_number": isinstance(value, (int, float)) and math.isfinite(value),
        "any_string": isinstance(value, str),
        "date": isinstance(value, str),
        "oneof_string": value in meta.get("values", []),
    }[meta["value_type"]]
    if not fits:
        raise Refused(f"Tag {meta['name']!r} is {meta['value_type']}, its value is {value!r}.")

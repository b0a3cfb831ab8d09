"""Boxes in a request: our own lists, the SDK's rectangles, and a reference's box."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NoReturn

from florence2.errors import RequestError
from florence2.prompts import check_region
from florence2.records import BoxXyxy
from serve.settings.values import refuse, shown, whole

MAX_REGIONS: Final = 1000
LIMIT: Final = 10_000_000


def box(name: str, value: object) -> BoxXyxy:
    """(left, top, right, bottom) from [x1, y1, x2, y2], "x1,y1,x2,y2", or an SDK rectangle.

    The SDK counts the last row and column as inside, so these move out by one pixel.
    """
    if isinstance(value, Mapping):
        return _from_points(name, value)
    values = _numbers(value.split(",") if isinstance(value, str) else value)
    if len(values) != 4:
        _refuse_box(name, value)
    return check_region(values, name)


def boxes(name: str, value: object) -> tuple[BoxXyxy, ...]:
    """One box or a list of boxes, each as ``box`` takes it."""
    if not isinstance(value, list | tuple) or _is_number(value[0]):
        return (box(name, value),)
    if len(value) > MAX_REGIONS:
        raise RequestError(
            f"{name} has at most {MAX_REGIONS} boxes, and {len(value)} were received; "
            "split the request."
        )
    return tuple(box(name, one) for one in value)


def reference_box(name: str, value: object) -> BoxXyxy:
    """A box from [top, left, bottom, right] in whole pixels, the last ones included."""
    values = value.split(",") if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or len(values) != 4:
        refuse(name, "[top, left, bottom, right] in whole pixels", value, "[20, 10, 180, 200]")
    top, left, bottom, right = (whole(f"A side of {name}", one, -LIMIT, LIMIT) for one in values)
    ys, xs = sorted((top, bottom)), sorted((left, right))
    return float(xs[0]), float(ys[0]), float(xs[1] + 1), float(ys[1] + 1)


def _from_points(name: str, value: Mapping[object, object]) -> BoxXyxy:
    points = value.get("points")
    exterior = points.get("exterior") if isinstance(points, Mapping) else None
    corners = exterior if isinstance(exterior, list | tuple) else ()
    pairs = [_numbers(corner) for corner in corners]
    if len(pairs) < 2 or any(len(pair) != 2 for pair in pairs):
        _refuse_box(name, value)
    xs, ys = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if any(value % 1 for value in (*xs, *ys)):
        # Whole pixels by the SDK's rule; the pixel that is added would hide a box of shares.
        check_region((min(xs), min(ys), max(xs), max(ys)), name)
    return min(xs), min(ys), max(xs) + 1, max(ys) + 1


def _numbers(value: object) -> list[float]:
    """All of the numbers, or none of them when one is no coordinate."""
    if not isinstance(value, list | tuple):
        return []
    try:
        read = [float(one) for one in value if _is_number(one) or isinstance(one, str)]
    except (ValueError, OverflowError):
        return []
    return read if len(read) == len(value) and all(abs(one) <= LIMIT for one in read) else []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_box(name: str, value: object) -> NoReturn:
    raise RequestError(
        f"{name} is a box [x1, y1, x2, y2] in pixels with x1 < x2 and y1 < y2, and "
        f"{shown(value)} was received; write for example [10, 20, 200, 180]."
    )

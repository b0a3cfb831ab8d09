"""Tiling: our own key, and the sliding window that other clients know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from florence2.errors import RequestError
from serve.settings.model import Tiling
from serve.settings.values import flag, nearest, shown, table, whole

# The model looks at 768 x 768 pixels, so a window of this size is not scaled down.
DEFAULT_SIZE: Final = 768
DEFAULT_OVERLAP: Final = 128
SMALLEST: Final = 32
LARGEST: Final = 100_000

_ENTRIES: Final = ("width", "height", "overlap", "full_image")
_EXAMPLE: Final = "{width: 1024, height: 1024, overlap: 128}"


def tiling(name: str, value: object) -> Tiling | None:
    """Windows from a mapping, or from one number for both sides; None for off."""
    if value is False or (isinstance(value, str) and value.strip().lower() in ("off", "false")):
        return None
    if isinstance(value, int | float) or (isinstance(value, str) and value.strip().isdigit()):
        value = {"width": value, "height": value}
    entries = table(name, value, _EXAMPLE)
    for key in entries:
        if key not in _ENTRIES:
            raise RequestError(nearest(f"entry of {name}", key, _ENTRIES))
    width = _side(f"{name}.width", entries.get("width"))
    height = _side(f"{name}.height", entries.get("height"))
    look = entries.get("full_image")
    return _checked(
        name,
        (width, height),
        _overlaps(f"{name}.overlap", entries.get("overlap"), (width, height)),
        full_image=True if look is None else flag(f"{name}.full_image", look),
    )


def sliding_window(name: str, value: object) -> Tiling:
    """The windows of ``sliding_window_params``; as in the SDK, nothing but the windows."""
    entries: Mapping[object, object] = {} if value is None else table(name, value, "{}")
    width = _side(f"{name}.windowWidth", entries.get("windowWidth"))
    height = _side(f"{name}.windowHeight", entries.get("windowHeight"))
    x = whole(f"{name}.overlapX", entries.get("overlapX") or 0, 0, LARGEST)
    y = whole(f"{name}.overlapY", entries.get("overlapY") or 0, 0, LARGEST)
    return _checked(name, (width, height), (x, y), full_image=False)


def _side(name: str, value: object) -> int:
    return DEFAULT_SIZE if value in (None, "") else whole(name, value, SMALLEST, LARGEST)


def _overlaps(name: str, value: object, size_wh: tuple[int, int]) -> tuple[int, int]:
    if value in (None, ""):
        return min(DEFAULT_OVERLAP, size_wh[0] // 4), min(DEFAULT_OVERLAP, size_wh[1] // 4)
    pair = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    return whole(name, pair[0], 0, LARGEST), whole(name, pair[1], 0, LARGEST)


def _checked(
    name: str, size_wh: tuple[int, int], overlap_wh: tuple[int, int], *, full_image: bool
) -> Tiling:
    if overlap_wh[0] >= size_wh[0] or overlap_wh[1] >= size_wh[1]:
        raise RequestError(
            f"Windows of {name} overlap by less than their size, and an overlap of "
            f"{shown(overlap_wh)} of windows of {shown(size_wh)} was received; make the overlap "
            "smaller."
        )
    return Tiling(size_wh=size_wh, overlap_wh=overlap_wh, full_image=full_image)

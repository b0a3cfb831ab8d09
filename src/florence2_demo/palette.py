"""Colours: shades of the named object colours and background colours, as RGB 0..255."""

from __future__ import annotations

import colorsys
from typing import Final

import numpy as np

Rgb = tuple[int, int, int]

_Span = tuple[float, float]
_OBJECT_HSV: Final[dict[str, tuple[_Span, _Span, _Span]]] = {
    "red": ((-6, 6), (0.8, 0.98), (0.72, 0.95)),
    "orange": ((24, 32), (0.85, 1.0), (0.92, 1.0)),
    "yellow": ((49, 57), (0.75, 0.98), (0.9, 1.0)),
    "green": ((105, 145), (0.65, 0.95), (0.42, 0.75)),
    "blue": ((208, 230), (0.75, 0.98), (0.6, 0.95)),
    "purple": ((274, 296), (0.55, 0.85), (0.5, 0.8)),
    "white": ((0, 360), (0.0, 0.03), (0.95, 1.0)),
    "black": ((0, 360), (0.0, 0.2), (0.1, 0.2)),
}
_BACKGROUND_HSV: Final[dict[str, tuple[_Span, _Span, _Span]]] = {
    "white": ((0, 360), (0.0, 0.04), (0.94, 0.99)),
    "grey": ((0, 360), (0.0, 0.06), (0.5, 0.72)),
    "black": ((0, 360), (0.0, 0.25), (0.1, 0.2)),
    "blue": ((195, 220), (0.2, 0.42), (0.75, 0.92)),
    "green": ((90, 140), (0.2, 0.42), (0.62, 0.85)),
    "pink": ((330, 350), (0.18, 0.36), (0.85, 0.97)),
    "brown": ((22, 36), (0.35, 0.55), (0.5, 0.7)),
}


def _shade(spans: tuple[_Span, _Span, _Span], rng: np.random.Generator) -> Rgb:
    hue, saturation, value = (float(rng.uniform(low, high)) for low, high in spans)
    red, green, blue = colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def object_shade(colour: str, rng: np.random.Generator) -> Rgb:
    """A random shade that still deserves the colour's name."""
    return _shade(_OBJECT_HSV[colour], rng)


def background_shade(colour: str, rng: np.random.Generator) -> Rgb:
    """A random shade of a background colour: paler or duller than the object of that name."""
    return _shade(_BACKGROUND_HSV[colour], rng)


def mixed(rgb: Rgb, other: Rgb, share: float) -> Rgb:
    """``rgb`` with ``share`` (0..1) of ``other`` mixed in."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(rgb, other, strict=True))
    return red, green, blue


def luminance(rgb: Rgb) -> float:
    """Perceived lightness, 0..255."""
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


WHITE: Final[Rgb] = (255, 255, 255)
BLACK: Final[Rgb] = (0, 0, 0)


def tone_rgb(base: Rgb, tone: str) -> Rgb:
    """The colour of a painted detail on a thing of colour ``base``."""
    dark = luminance(base) < 60
    fixed: dict[str, Rgb] = {
        "glass": (198, 226, 240),
        "wood": (120, 78, 42),
        "tyre": (30, 30, 34),
        "hub": (225, 225, 225),
        "hole": mixed(base, BLACK, 0.75) if not dark else (150, 150, 150),
        "core": (250, 214, 70) if base[2] > 110 or base[1] < 140 else (245, 245, 245),
    }
    if tone in fixed:
        return fixed[tone]
    if tone == "outline":
        return mixed(base, BLACK, 0.6) if not dark else (5, 5, 8)
    if tone == "shine":
        pale = luminance(base) > 225
        return mixed(base, BLACK, 0.1) if pale else mixed(base, WHITE, 0.35 if dark else 0.5)
    share = {"dim": 0.18, "mark": 0.38}[tone]
    return mixed(base, WHITE, share) if dark else mixed(base, BLACK, share)

"""Backgrounds: what is behind the objects, described in fractions and drawn at any size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from florence2.opencv import cv2
from florence2_demo.lexicon import PATTERNS
from florence2_demo.palette import BLACK, WHITE, Rgb, background_shade, luminance, mixed

Pixels = NDArray[np.uint8]
Plane = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Background:
    """Two shades of one named colour in a pattern.

    ``period`` is the pattern's repeat as a fraction of the image's height; ``angle`` in radians.
    """

    colour: str
    pattern: str
    rgb: Rgb
    other_rgb: Rgb
    period: float
    angle: float
    seed: int


def make_background(colour: str, rng: np.random.Generator) -> Background:
    """A random background of a named colour."""
    rgb = background_shade(colour, rng)
    share = float(rng.uniform(0.07, 0.16))
    lighter = luminance(rgb) < 90 or (luminance(rgb) < 205 and rng.random() < 0.5)
    return Background(
        colour=colour,
        pattern=str(rng.choice(PATTERNS)),
        rgb=rgb,
        other_rgb=mixed(rgb, WHITE if lighter else BLACK, share),
        period=float(rng.uniform(0.1, 0.3)),
        angle=float(rng.uniform(0, math.pi)),
        seed=int(rng.integers(1 << 31)),
    )


@lru_cache(maxsize=16)
def unit_grid(size_wh: tuple[int, int]) -> tuple[Plane, Plane]:
    """Pixel centres as (x [1, w], y [h, 1]) in fractions 0..1 of the image."""
    width, height = size_wh
    xs = ((np.arange(width) + 0.5) / width).astype(np.float32)[None, :]
    ys = ((np.arange(height) + 0.5) / height).astype(np.float32)[:, None]
    return xs, ys


def _ramp(height: Plane) -> Plane:
    """0 below -0.5, 1 above 0.5, straight in between."""
    return np.asarray(np.clip(height + 0.5, 0, 1), np.float32)


def _waves(distance: Plane, softness: float) -> Plane:
    """A 0..1 square wave of period 1 with edges ``softness`` wide, without aliasing."""
    triangle = np.abs((distance % 1.0) * 2 - 1)
    return _ramp((triangle - 0.5) / max(softness, 1e-3))


def _share(background: Background, size_wh: tuple[int, int], aspect: float) -> Plane:
    """How much of the second shade each pixel has, 0..1; ``aspect`` is the true width/height."""
    xs, ys = unit_grid(size_wh)
    period = background.period
    cos, sin = math.cos(background.angle), math.sin(background.angle)
    softness = 4.0 / (period * size_wh[1])
    if background.pattern == "shaded":
        ramp = xs * cos + ys * sin
        low = min(cos, 0.0)
        return np.asarray((ramp - low) / (abs(cos) + sin), np.float32)
    if background.pattern == "striped":
        along = np.float32(cos * aspect / period) * xs + np.float32(sin / period) * ys
        return _waves(along, softness)
    if background.pattern == "checkered":
        across, down = _waves(xs * (aspect / period), softness), _waves(ys / period, softness)
        return across + down - 2 * across * down
    if background.pattern == "spotted":
        columns = xs * (aspect / period) % 1.0 - 0.5
        rows = ys / period % 1.0 - 0.5
        distance = np.sqrt(columns * columns + rows * rows)
        return _ramp((0.3 - distance) / softness)
    cells = np.random.default_rng(background.seed).random((7, 7), dtype=np.float32)
    cloud = cv2.resize(cells, size_wh, interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(cloud * 1.4 - 0.2, 0, 1), np.float32)


def draw_background(background: Background, size_wh: tuple[int, int], aspect: float) -> Pixels:
    """The background as [h, w, 3] uint8 RGB; ``aspect`` is the scene's own width over height."""
    width, height = size_wh
    if background.pattern == "plain":
        return np.full((height, width, 3), background.rgb, np.uint8)
    levels = np.arange(256, dtype=np.float32)[:, None] / 255
    first, second = (np.array(rgb, np.float32) for rgb in (background.rgb, background.other_rgb))
    table = np.round(first + levels * (second - first)).astype(np.uint8)
    share = _share(background, size_wh, aspect)
    return np.take(table, (share * 255).astype(np.uint8), axis=0)

"""Pixels of a scene: drawn at twice the size and reduced, so that edges are smooth."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from florence2.opencv import cv2
from florence2_demo import placing
from florence2_demo.backgrounds import Pixels, draw_background, unit_grid
from florence2_demo.palette import Rgb, tone_rgb
from florence2_demo.placing import SUBPIXEL_BITS, Size
from florence2_demo.scene import Finish, Scene, SceneObject
from florence2_demo.shapes import Points, shapes
from florence2_demo.signs import TextLine, ink_mask

_NOISE_TILE_PX: Final = 512


def draw_scene(scene: Scene, size_wh: Size | None = None) -> Image.Image:
    """The scene as an RGB image of ``size_wh`` pixels (its own size by default).

    Another aspect squashes the picture, like the network's own preprocessing does.
    """
    return Image.fromarray(draw_pixels(scene, size_wh))


def draw_pixels(scene: Scene, size_wh: Size | None = None) -> Pixels:
    """``draw_scene`` as an [h, w, 3] uint8 RGB array."""
    width, height = size_wh or scene.size_wh
    aspect = scene.size_wh[0] / scene.size_wh[1]
    behind = draw_background(scene.background, (width, height), aspect)
    canvas = behind.repeat(2, axis=0).repeat(2, axis=1)
    for thing in scene.objects:
        draw_object(canvas, thing, scene.size_wh)
    for line in scene.texts:
        draw_text(canvas, line)
    pixels = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    return _finished(np.asarray(pixels, np.uint8), scene.finish)


def draw_object(canvas: Pixels, thing: SceneObject, scene_wh: Size) -> None:
    """Paint one object on ``canvas``, whose pixels cover the whole image."""
    size_wh = (canvas.shape[1], canvas.shape[0])
    shape = shapes()[thing.kind]
    scale = np.array(size_wh)
    outline_px = placing.posed(shape.outline, thing.pose, scene_wh) * scale
    _fill(canvas, outline_px, tone_rgb(thing.rgb, "outline"))
    extent_px = min(thing.pose.extent_wh) * min(size_wh)
    stroke_px = min(max(1.6, 0.035 * extent_px), 0.1 * extent_px)
    body_px = inset(outline_px, stroke_px)
    layer, origin = _body_layer(canvas, body_px)
    if layer.size == 0:
        return
    mask = np.zeros(layer.shape[:2], np.uint8)
    _fill(mask, body_px - origin, (1, 1, 1))
    painted = _shaded_fill(layer.shape, thing.rgb, thing.shading)
    for detail in shape.details:
        points = placing.posed(detail.points, thing.pose, scene_wh) * scale - origin
        _fill(painted, points, _darker(tone_rgb(thing.rgb, detail.tone), thing.shading / 2))
    np.copyto(layer, painted, where=mask[:, :, None].astype(bool))


def _body_layer(canvas: Pixels, body_px: Points) -> tuple[Pixels, NDArray[np.int64]]:
    """The part of the canvas around a body (a view), and its top-left corner in pixels."""
    size_wh = np.array([canvas.shape[1], canvas.shape[0]])
    low = np.clip(np.floor(body_px.min(axis=0)) - 1, 0, size_wh).astype(np.int64)
    high = np.clip(np.ceil(body_px.max(axis=0)) + 2, 0, size_wh).astype(np.int64)
    return canvas[low[1] : high[1], low[0] : high[0]], low


def _shaded_fill(shape: tuple[int, ...], rgb: Rgb, shading: float) -> Pixels:
    """The body's paint: lighter at the top, darker at the bottom."""
    height, width = shape[:2]
    falloff = 1 - shading * np.linspace(0, 1, height, dtype=np.float32)[:, None] ** 1.5
    column = (falloff * np.array(rgb, np.float32)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(column[:, None], (height, width, 3)))


def _darker(rgb: Rgb, share: float) -> Rgb:
    return round(rgb[0] * (1 - share)), round(rgb[1] * (1 - share)), round(rgb[2] * (1 - share))


def inset(points: Points, distance: float) -> Points:
    """A polygon moved inwards by ``distance`` (same units), corners mitred up to a limit."""
    clockwise = 1.0 if placing.area(points) > 0 else -1.0
    edges = np.roll(points, -1, axis=0) - points
    lengths = np.maximum(np.hypot(edges[:, 0], edges[:, 1]), 1e-9)[:, None]
    normals = clockwise * np.stack([-edges[:, 1], edges[:, 0]], axis=1) / lengths
    before = np.roll(normals, 1, axis=0)
    bisector = normals + before
    # |bisector|^2 = 2 (1 + cos): dividing by half of it gives the exact mitre.
    strength = np.maximum((bisector**2).sum(axis=1, keepdims=True) / 2, 0.35)
    moved: Points = points + bisector * (distance / strength)
    return moved


def _fill(canvas: Pixels, points_px: Points, rgb: Rgb) -> None:
    fixed = np.round((points_px - 0.5) * (1 << SUBPIXEL_BITS)).astype(np.int32)
    cv2.fillPoly(canvas, [fixed], rgb, shift=SUBPIXEL_BITS)


def draw_text(canvas: Pixels, line: TextLine) -> None:
    """Paint a plate and its word."""
    size = np.array([canvas.shape[1], canvas.shape[0]])
    plate_px = np.array(line.plate_xy) * size
    edge = inset(plate_px, 0.04 * float(np.abs(plate_px[0] - plate_px[3]).max()))
    _fill(canvas, plate_px, line.ink_rgb)
    _fill(canvas, edge, line.plate_rgb)
    low = np.clip(np.floor(plate_px.min(axis=0)), 0, size).astype(int)
    high = np.clip(np.ceil(plate_px.max(axis=0)), 0, size).astype(int)
    layer = canvas[low[1] : high[1], low[0] : high[0]]
    ink = ink_mask(line.text, line.font)
    height, width = ink.shape
    pad = 0.04 * height
    source = np.array([[-pad, -pad], [width + pad, -pad], [width + pad, height + pad]], np.float32)
    target = (np.array(line.quad_xy[:3]) * size - low - 0.5).astype(np.float32)
    matrix = cv2.getAffineTransform(source - 0.5, target)
    layer_wh = (layer.shape[1], layer.shape[0])
    share = cv2.warpAffine(ink, matrix, layer_wh, flags=cv2.INTER_LINEAR)[:, :, None]
    mixed = layer + (np.array(line.ink_rgb, np.float32) - layer) * (share / np.float32(255))
    layer[:] = mixed.astype(np.uint8)


@lru_cache(maxsize=1)
def _noise_tile() -> NDArray[np.float32]:
    """Grain of standard deviation 1, [2 n, 2 n, 1]: slightly soft, alike in all channels."""
    raw = np.random.default_rng(7).normal(size=(_NOISE_TILE_PX, _NOISE_TILE_PX))
    soft = cv2.GaussianBlur(raw.astype(np.float32), (0, 0), 0.6)
    return np.tile(soft / soft.std(), (2, 2))[:, :, None].astype(np.float32)


def _finished(pixels: Pixels, finish: Finish) -> Pixels:
    """Blur, uneven light and grain."""
    height, width = pixels.shape[:2]
    sigma = finish.blur * min(width, height)
    if sigma > 0.3:
        pixels = np.asarray(cv2.GaussianBlur(pixels, (0, 0), sigma), np.uint8)
    if finish.light == 0 and finish.noise == 0:
        return pixels
    result = pixels.astype(np.float32)
    if finish.light > 0:
        xs, ys = unit_grid((width, height))
        cos, sin = math.cos(finish.light_angle), math.sin(finish.light_angle)
        ramp = (xs - 0.5) * cos + (ys - 0.5) * sin + np.float32(0.7)
        result *= (1 - finish.light * np.clip(ramp / 1.4, 0, 1))[:, :, None]
    if finish.noise > 0:
        rng = np.random.default_rng(finish.seed)
        x, y = rng.integers(_NOISE_TILE_PX, size=2)
        tile = _noise_tile()
        repeats = (math.ceil(height / _NOISE_TILE_PX), math.ceil(width / _NOISE_TILE_PX), 1)
        grain = tile[y : y + height, x : x + width]
        if grain.shape[:2] != (height, width):
            grain = np.tile(tile, repeats)[y : y + height, x : x + width]
        result += finish.noise * grain
    return np.clip(result, 0, 255).astype(np.uint8)

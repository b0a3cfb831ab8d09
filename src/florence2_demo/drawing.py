"""Pixels of a scene: drawn at twice the size and reduced, so that edges are smooth."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from florence2.opencv import cv2
from florence2.records import SizeWh
from florence2_demo import geometry
from florence2_demo.geometry import Points, fill_polygon
from florence2_demo.palette import Rgb, tone_rgb
from florence2_demo.scene import Background, Finish, Scene, SceneObject
from florence2_demo.shapes import shape_of
from florence2_demo.signs import TextLine, ink_mask

Pixels = NDArray[np.uint8]
Plane = NDArray[np.float32]

_NOISE_TILE_PX: Final = 512


def draw_scene(scene: Scene, size_wh: SizeWh | None = None) -> Image.Image:
    """The scene as an RGB image of ``size_wh`` pixels (its own size by default).

    Another aspect squashes the picture, like the network's own preprocessing does.
    """
    return Image.fromarray(draw_pixels(scene, size_wh))


def draw_pixels(scene: Scene, size_wh: SizeWh | None = None) -> Pixels:
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


def draw_object(canvas: Pixels, thing: SceneObject, scene_wh: SizeWh) -> None:
    """Paint one object on ``canvas``, whose pixels cover the whole image."""
    size_wh = (canvas.shape[1], canvas.shape[0])
    shape = shape_of(thing.kind)
    scale = np.array(size_wh)
    outline_px = geometry.posed(shape.outline, thing.pose, scene_wh) * scale
    fill_polygon(canvas, outline_px, tone_rgb(thing.rgb, "outline"))
    extent_px = min(thing.pose.extent_wh) * min(size_wh)
    stroke_px = min(max(1.6, 0.035 * extent_px), 0.1 * extent_px)
    body_px = inset(outline_px, stroke_px)
    layer, origin = _body_layer(canvas, body_px)
    if layer.size == 0:
        return
    mask = np.zeros(layer.shape[:2], np.uint8)
    fill_polygon(mask, body_px - origin, (1, 1, 1))
    painted = _shaded_paint(layer.shape, thing.rgb, thing.shading)
    for detail in shape.details:
        points = geometry.posed(detail.points, thing.pose, scene_wh) * scale - origin
        fill_polygon(painted, points, _darker(tone_rgb(thing.rgb, detail.tone), thing.shading / 2))
    np.copyto(layer, painted, where=mask[:, :, None].astype(bool))


def _body_layer(canvas: Pixels, body_px: Points) -> tuple[Pixels, NDArray[np.int64]]:
    """The part of the canvas around a body (a view), and its top-left corner in pixels."""
    size_wh = np.array([canvas.shape[1], canvas.shape[0]])
    low = np.clip(np.floor(body_px.min(axis=0)) - 1, 0, size_wh).astype(np.int64)
    high = np.clip(np.ceil(body_px.max(axis=0)) + 2, 0, size_wh).astype(np.int64)
    return canvas[low[1] : high[1], low[0] : high[0]], low


def _shaded_paint(shape: tuple[int, ...], rgb: Rgb, shading: float) -> Pixels:
    """The body's paint: lighter at the top, darker at the bottom."""
    height, width = shape[:2]
    falloff = 1 - shading * np.linspace(0, 1, height, dtype=np.float32)[:, None] ** 1.5
    column = (falloff * np.array(rgb, np.float32)).astype(np.uint8)
    return np.repeat(column[:, None], width, axis=1)


def _darker(rgb: Rgb, share: float) -> Rgb:
    return round(rgb[0] * (1 - share)), round(rgb[1] * (1 - share)), round(rgb[2] * (1 - share))


def inset(points: Points, distance: float) -> Points:
    """A polygon moved inwards by ``distance`` (same units), corners mitred up to a limit."""
    clockwise = 1.0 if geometry.area(points) > 0 else -1.0
    edges = np.roll(points, -1, axis=0) - points
    lengths = np.maximum(np.hypot(edges[:, 0], edges[:, 1]), 1e-9)[:, None]
    normals = clockwise * np.stack([-edges[:, 1], edges[:, 0]], axis=1) / lengths
    before = np.roll(normals, 1, axis=0)
    bisector = normals + before
    # |bisector|^2 = 2 (1 + cos): dividing by half of it gives the exact mitre.
    strength = np.maximum((bisector**2).sum(axis=1, keepdims=True) / 2, 0.35)
    moved: Points = points + bisector * (distance / strength)
    return moved


def draw_text(canvas: Pixels, line: TextLine) -> None:
    """Paint a plate and its word."""
    size = np.array([canvas.shape[1], canvas.shape[0]])
    plate_px = np.array(line.plate_xy) * size
    edge = inset(plate_px, 0.04 * float(np.abs(plate_px[0] - plate_px[3]).max()))
    fill_polygon(canvas, plate_px, line.ink_rgb)
    fill_polygon(canvas, edge, line.plate_rgb)
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

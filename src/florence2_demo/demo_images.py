"""Writes the pictures that the demo, the tests and the documentation use.

``python -m florence2_demo.demo_images FOLDER`` makes them again: drawn scenes, and two pictures
that look photographed (soft light, shading, grain), unlike the flat training scenes. Those are
painted at twice the size and reduced; coordinates are fractions of the picture's width and height;
light comes from the upper left.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from florence2.opencv import cv2
from florence2.records import SizeWh
from florence2_demo.drawing import Plane, draw_scene, unit_grid
from florence2_demo.palette import Rgb
from florence2_demo.scene import make_scene
from florence2_demo.signs import ink_mask

Canvas = NDArray[np.float32]
"""[h, w, 3] RGB in 0..255."""
Corners = tuple[tuple[float, float], ...]

FIRST_DEMO_SEED: Final = 900_000
"""Below the training seeds, so that no demo picture was trained on."""


_SCENES: Final[tuple[tuple[str, int, SizeWh], ...]] = (
    ("scene_bike.png", 22, (640, 480)),
    ("scene_city.jpg", 26, (640, 480)),
    ("scene_night.jpg", 25, (640, 480)),
    ("scene_street.jpg", 29, (640, 480)),
    ("scene_home.jpg", 37, (720, 480)),
    ("scene_garden.jpg", 42, (512, 512)),
    ("scene_bread.jpg", 46, (640, 480)),
    ("scene_arrows.jpg", 30, (480, 640)),
)


def write_demo_images(folder: Path) -> list[Path]:
    """Eight drawn scenes and two photograph-like pictures, about 1 MB together."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        name: draw_scene(make_scene(FIRST_DEMO_SEED + seed, size_wh=size_wh))
        for name, seed, size_wh in _SCENES
    }
    pictures["photo_meadow.jpg"] = Image.fromarray(landscape((800, 600), seed=1))
    pictures["photo_table.jpg"] = Image.fromarray(still_life((800, 600), seed=2))
    for name, picture in pictures.items():
        picture.save(folder / name, quality=86, optimize=True)
    return [folder / name for name in pictures]


def clouds(size_wh: SizeWh, rng: np.random.Generator, cells: int, octaves: int) -> Plane:
    """Smooth random relief, 0..1, [h, w]."""
    total = np.zeros((size_wh[1], size_wh[0]), np.float32)
    for octave in range(octaves):
        count = cells * 2**octave
        grid = rng.random((count, count), dtype=np.float32)
        total += cv2.resize(grid, size_wh, interpolation=cv2.INTER_CUBIC) / 2**octave
    return np.asarray((total - total.min()) / np.ptp(total), np.float32)


class Painter:
    """A canvas with a few brushes; every brush is deterministic for the generator's state."""

    def __init__(self, size_wh: SizeWh, rng: np.random.Generator) -> None:
        self.size_wh = (size_wh[0] * 2, size_wh[1] * 2)
        self.rng = rng
        self.xs, self.ys = unit_grid(self.size_wh)
        self.canvas: Canvas = np.zeros((*self.size_wh[::-1], 3), np.float32)

    def paint(self, mask: Plane, colour: Canvas | Rgb) -> None:
        """Lay a colour over the canvas where ``mask`` (0..1) says."""
        paint = np.asarray(colour, np.float32)
        self.canvas += (paint - self.canvas) * mask[:, :, None]

    def ramp(self, top: Rgb, bottom: Rgb) -> Canvas:
        """A vertical ramp over the whole picture."""
        first, last = np.array(top, np.float32), np.array(bottom, np.float32)
        column = first + self.ys[:, :, None] * (last - first)
        return np.broadcast_to(column, self.canvas.shape).astype(np.float32)

    def textured(self, rgb: Rgb, strength: float, cells: int = 48) -> Canvas:
        """A colour with irregular lighter and darker patches; ``strength`` 0..1."""
        relief = clouds(self.size_wh, self.rng, cells, 3) - np.float32(0.5)
        return np.asarray(
            np.array(rgb, np.float32) * (1 + strength * relief)[:, :, None], np.float32
        )

    def region(self, corners: Corners, soft: float = 0.0) -> Plane:
        """The mask of a polygon; ``soft`` is a blur as a fraction of the height."""
        mask = np.zeros(self.size_wh[::-1], np.uint8)
        points = np.round(np.array(corners) * self.size_wh).astype(np.int32)
        cv2.fillPoly(mask, [points], 255, cv2.LINE_AA)
        plane: Plane = np.asarray(mask / np.float32(255), np.float32)
        if soft > 0:
            plane = cv2.GaussianBlur(plane, (0, 0), soft * self.size_wh[1])
        return plane

    def oval(self, x: float, y: float, rx: float, ry: float, soft: float = 0.0) -> Plane:
        """The mask of an ellipse with radii in fractions of the picture's height."""
        aspect = self.size_wh[0] / self.size_wh[1]
        angles = np.linspace(0, 2 * np.pi, 120, endpoint=False)
        points = zip(x + rx / aspect * np.cos(angles), y + ry * np.sin(angles), strict=True)
        return self.region(tuple((float(a), float(b)) for a, b in points), soft)

    def patch(
        self, corners: Corners, rgb: Rgb, strength: float, cells: int = 48, *, soft: float = 0.0
    ) -> None:
        """Lay an irregular colour over a polygon."""
        self.paint(self.region(corners, soft), self.textured(rgb, strength, cells))

    def shadow(self, mask: Plane, strength: float) -> None:
        """Darken the canvas under a mask."""
        self.canvas *= 1 - strength * mask[:, :, None]

    def sphere(self, x: float, y: float, radius: float, rgb: Rgb) -> None:
        """A glossy ball with its shadow; ``radius`` in fractions of the height."""
        self.shadow(
            self.oval(x + radius * 0.35, y + radius * 0.86, radius * 1.25, radius * 0.3, 0.02), 0.6
        )
        aspect = self.size_wh[0] / self.size_wh[1]
        across, down = (self.xs - x) * aspect / radius, (self.ys - y) / radius
        depth = np.sqrt(np.maximum(1 - across * across - down * down, 0))
        light = np.maximum(-0.5 * across - 0.6 * down + 0.62 * depth, 0)
        shade = 0.28 + 0.85 * light
        gloss = 200 * np.maximum(light, 0) ** 28
        colour = np.array(rgb, np.float32) * shade[:, :, None] + gloss[:, :, None]
        self.paint(self.oval(x, y, radius, radius), np.asarray(colour, np.float32))

    def sign(self, text: str, corners: Corners, ink: Rgb, plate: Rgb) -> None:
        """A board with a word, seen in perspective; corners clockwise from the top left."""
        self.patch(corners, plate, 0.12)
        mask = ink_mask(text, "duplex")
        height, width = mask.shape
        margin = 0.45 * height
        x1, y1, x2, y2 = -margin, -margin, width + margin, height + margin
        source = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.float32)
        target = (np.array(corners) * self.size_wh).astype(np.float32)
        matrix = cv2.getPerspectiveTransform(source, target)
        warped = cv2.warpPerspective(mask, matrix, self.size_wh)
        self.paint(warped.astype(np.float32) / 255 * 0.92, ink)

    def developed(self, blur: float, grain: float) -> NDArray[np.uint8]:
        """The finished picture at its own size: lens blur, vignette, grain."""
        radius = (self.xs - 0.5) ** 2 + (self.ys - 0.5) ** 2
        picture = self.canvas * (1 - 0.55 * radius)[:, :, None]
        size = (self.size_wh[0] // 2, self.size_wh[1] // 2)
        picture = cv2.GaussianBlur(picture, (0, 0), blur)
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        noise = self.rng.normal(0, grain, picture.shape).astype(np.float32)
        noise = cv2.GaussianBlur(noise, (0, 0), 0.7) * np.float32(1.6)
        return np.asarray(np.clip(picture + noise, 0, 255), np.uint8)


def _hills(painter: Painter, base: float, height: float, rgb: Rgb, cells: int) -> None:
    ridge = clouds((painter.size_wh[0], 8), painter.rng, cells, 3)[4]
    above = painter.ys - (base - height * ridge[None, :])
    mask = np.clip(above * painter.size_wh[1], 0, 1).astype(np.float32)
    painter.paint(mask, painter.textured(rgb, 0.25))


def _cottage(painter: Painter, x: float, y: float, scale: float) -> None:
    """A house seen from a corner; (x, y) is the foot of its front's left edge."""

    def at(*pairs: tuple[float, float]) -> Corners:
        return tuple((x + scale * a, y + scale * b) for a, b in pairs)

    painter.shadow(painter.region(at((0, 0), (1.0, 0), (1.35, 0.09), (0.3, 0.1)), 0.012), 0.5)
    front = at((0, 0), (0, -0.62), (0.31, -1.05), (0.62, -0.62), (0.62, 0))
    side = at((0.62, 0), (0.62, -0.62), (1.0, -0.58), (1.0, -0.03))
    roof = at((0.25, -1.08), (0.7, -1.0), (1.06, -0.54), (0.6, -0.57))
    painter.patch(front, (196, 62, 48), 0.3, 90)
    painter.patch(side, (128, 38, 32), 0.3, 90)
    painter.patch(roof, (92, 46, 40), 0.45, 90)
    painter.patch(at((-0.05, -0.57), (0.31, -1.1), (0.37, -1.08), (0.02, -0.57)), (74, 36, 32), 0.3)
    for left, top in ((0.09, -0.46), (0.42, -0.46)):
        frame = at((left, top), (left + 0.13, top), (left + 0.13, top + 0.17), (left, top + 0.17))
        painter.patch(frame, (188, 208, 222), 0.35, soft=0.001)
    door = at((0.25, 0), (0.25, -0.27), (0.38, -0.27), (0.38, 0))
    painter.patch(door, (70, 44, 30), 0.4)


def landscape(size_wh: SizeWh, seed: int) -> NDArray[np.uint8]:
    """A meadow with a red house, an orange ball and a sign."""
    painter = Painter(size_wh, np.random.default_rng(seed))
    painter.canvas = painter.ramp((96, 148, 206), (226, 232, 232))
    sky = np.clip(clouds(painter.size_wh, painter.rng, 4, 5) * 2.2 - 0.9, 0, 1)
    painter.paint(
        np.asarray(sky * np.clip(1.1 - painter.ys * 1.6, 0, 1), np.float32), (250, 250, 250)
    )
    _hills(painter, 0.5, 0.16, (128, 152, 168), 4)
    _hills(painter, 0.55, 0.1, (98, 128, 104), 6)
    painter.canvas = cv2.GaussianBlur(painter.canvas, (0, 0), 3)
    meadow = np.clip((painter.ys - 0.54) * painter.size_wh[1] / 6, 0, 1)
    grass = painter.textured((112, 140, 70), 0.4, 60) * (0.75 + 0.35 * painter.ys)[:, :, None]
    painter.paint(np.broadcast_to(meadow, painter.size_wh[::-1]).astype(np.float32), grass)
    blades = clouds(painter.size_wh, painter.rng, 220, 2)[:, :, None]
    painter.canvas *= 1 + (blades - 0.5) * 0.35 * meadow[:, :, None]
    _cottage(painter, 0.12, 0.74, 0.34)
    painter.paint(
        painter.region(((0.785, 0.5), (0.8, 0.5), (0.8, 0.78), (0.785, 0.78))), (96, 70, 48)
    )
    board = ((0.68, 0.4), (0.91, 0.415), (0.905, 0.545), (0.682, 0.535))
    painter.sign("OPEN", board, (40, 34, 30), (236, 230, 212))
    painter.sphere(0.6, 0.83, 0.1, (236, 118, 26))
    return painter.developed(1.6, 7)


def still_life(size_wh: SizeWh, seed: int) -> NDArray[np.uint8]:
    """A blue ball, a green box and a yellow ball on a wooden table."""
    painter = Painter(size_wh, np.random.default_rng(seed))
    painter.canvas = painter.textured((196, 188, 176), 0.1, 3)
    painter.canvas *= (1.12 - 0.45 * painter.xs)[:, :, None]
    table = painter.region(((0, 0.56), (1, 0.56), (1, 1), (0, 1)), 0.003)
    painter.paint(table, painter.textured((150, 102, 62), 0.25, 6))
    grain = clouds((8, painter.size_wh[1]), painter.rng, 90, 2)[:, 4][:, None, None]
    painter.canvas *= 1 + (grain - 0.5) * 0.25 * table[:, :, None]
    painter.shadow(painter.region(((0.58, 0.8), (0.9, 0.76), (0.97, 0.84), (0.64, 0.9)), 0.02), 0.6)
    front = ((0.56, 0.46), (0.78, 0.49), (0.78, 0.86), (0.56, 0.8))
    side = ((0.78, 0.49), (0.89, 0.44), (0.89, 0.76), (0.78, 0.86))
    lid = ((0.56, 0.46), (0.67, 0.42), (0.89, 0.44), (0.78, 0.49))
    for face, rgb in ((front, (52, 142, 66)), (side, (30, 86, 40)), (lid, (96, 186, 104))):
        painter.patch(face, rgb, 0.12, 30)
    painter.sphere(0.28, 0.66, 0.17, (40, 88, 200))
    painter.sphere(0.45, 0.83, 0.085, (242, 204, 40))
    return painter.developed(1.8, 6)


if __name__ == "__main__":
    write_demo_images(Path(sys.argv[1]))

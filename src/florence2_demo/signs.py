"""Words as ink masks, in the fonts that Pillow and OpenCV carry themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from florence2.opencv import cv2
from florence2.records import SizeWh
from florence2_demo import geometry
from florence2_demo.geometry import FractionBox, Points, QuadXy
from florence2_demo.lexicon import SIGN_WORDS
from florence2_demo.palette import Rgb

FONTS: Final[dict[str, int]] = {
    "pillow": -1,
    "simplex": cv2.FONT_HERSHEY_SIMPLEX,
    "duplex": cv2.FONT_HERSHEY_DUPLEX,
    "triplex": cv2.FONT_HERSHEY_TRIPLEX,
}
_INK_HEIGHT_PX: Final = 48


def _pillow_mask(text: str) -> NDArray[np.uint8]:
    font = ImageFont.load_default(size=_INK_HEIGHT_PX * 1.35)
    left, top, right, bottom = font.getbbox(text)
    canvas = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8))
    drawing = ImageDraw.Draw(canvas)
    drawing.text((4 - left, 4 - top), text, fill=255, font=font, stroke_width=1)
    return np.asarray(canvas)


def _hershey_mask(text: str, face: int) -> NDArray[np.uint8]:
    thickness = 5 if face == cv2.FONT_HERSHEY_TRIPLEX else 7
    (width, height), baseline = cv2.getTextSize(text, face, 2.2, thickness)
    canvas = np.zeros((height + baseline + 24, width + 24), np.uint8)
    cv2.putText(canvas, text, (12, height + 12), face, 2.2, 255, thickness, cv2.LINE_AA)
    return canvas


@lru_cache(maxsize=1024)
def ink_mask(text: str, font: str) -> NDArray[np.uint8]:
    """The word's ink, 0..255, cropped to the ink and about 48 px high."""
    mask = _pillow_mask(text) if font == "pillow" else _hershey_mask(text, FONTS[font])
    rows, columns = np.flatnonzero(mask.max(axis=1)), np.flatnonzero(mask.max(axis=0))
    ink = np.ascontiguousarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    ink.flags.writeable = False
    return ink


def ink_aspect(text: str, font: str) -> float:
    """Width over height of the word's ink."""
    height, width = ink_mask(text, font).shape
    return float(width / height)


TEXT_SHARE: Final = 0.4
_PLATES: Final[tuple[tuple[Rgb, Rgb], ...]] = (
    ((20, 20, 24), (250, 250, 248)),
    ((30, 30, 60), (248, 236, 170)),
    ((120, 20, 20), (244, 240, 230)),
    ((20, 50, 110), (225, 236, 246)),
    ((250, 250, 250), (28, 30, 36)),
    ((250, 245, 225), (24, 52, 104)),
    ((250, 250, 250), (110, 22, 30)),
    ((245, 250, 240), (20, 78, 46)),
)
"""Pairs of ink and plate colour, dark on light and light on dark."""


@dataclass(frozen=True, slots=True)
class TextLine:
    """A word on a plate. ``quad_xy`` is tight around the ink, ``plate_xy`` the painted plate;
    corners clockwise from the text's own top left, in fractions of the image.
    """

    text: str
    quad_xy: QuadXy
    plate_xy: QuadXy
    font: str
    ink_rgb: Rgb
    plate_rgb: Rgb

    @property
    def box_xyxy(self) -> FractionBox:
        """The upright box around the quad."""
        return geometry.tight_box(np.array(self.quad_xy))


def make_texts(rng: np.random.Generator, size_wh: SizeWh) -> tuple[TextLine, ...]:
    """No text in most scenes, else one or two lines, top to bottom by their centres."""
    if rng.random() >= TEXT_SHARE:
        return ()
    words = [str(word) for word in rng.choice(SIGN_WORDS, size=2, replace=False)]
    first = _random_line(rng, size_wh, words[0])
    if rng.random() < 0.62:
        return (first,)
    for _ in range(8):
        second = _random_line(rng, size_wh, words[1])
        apart = abs(_centre_y(first) - _centre_y(second)) > 0.06
        boxes = [geometry.tight_box(np.array(line.plate_xy)) for line in (first, second)]
        if apart and not geometry.boxes_touch(boxes[0], boxes[1]):
            return tuple(sorted((first, second), key=_centre_y))
    return (first,)


def _centre_y(line: TextLine) -> float:
    return sum(y for _, y in line.quad_xy) / 4


def _random_line(rng: np.random.Generator, size_wh: SizeWh, text: str) -> TextLine:
    width_px, height_px = size_wh
    font = str(rng.choice(list(FONTS)))
    aspect = ink_aspect(text, font)
    ink_px = height_px * math.exp(rng.uniform(math.log(0.07), math.log(0.16)))
    ink_px = min(ink_px, 0.72 * width_px / aspect)
    tilt = rng.uniform(-12, 12) if rng.random() < 0.2 else rng.uniform(-4, 4)
    half_wh = np.array([ink_px * aspect / 2, ink_px / 2])
    quad_px = _corners(half_wh + 0.04 * ink_px, math.radians(tilt))
    plate_px = _corners(half_wh + ink_px * rng.uniform(0.28, 0.5), math.radians(tilt))
    reach = np.abs(plate_px).max(axis=0) + 1
    size = np.array(size_wh)
    centre = reach + rng.random(2) * np.maximum(size - 2 * reach, 0)
    ink_rgb, plate_rgb = _PLATES[int(rng.integers(len(_PLATES)))]
    quad, plate = (_as_quad((points + centre) / size) for points in (quad_px, plate_px))
    return TextLine(text, quad, plate, font, ink_rgb, plate_rgb)


def _corners(half_wh: Points, angle: float) -> Points:
    signs = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    cos, sin = math.cos(angle), math.sin(angle)
    corners: Points = (signs * half_wh) @ np.array([[cos, sin], [-sin, cos]])
    return corners


def _as_quad(points: Points) -> QuadXy:
    first, second, third, fourth = geometry.as_pairs(points)
    return first, second, third, fourth

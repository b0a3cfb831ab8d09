"""Words as ink masks, in the fonts that Pillow and OpenCV carry themselves."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from florence2.opencv import cv2

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

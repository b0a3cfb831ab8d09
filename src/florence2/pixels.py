"""From a picture to the network's input: Pillow's scaling, and a table of values."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from florence2.errors import CheckpointError
from florence2.opencv import cv2
from florence2.records import SizeWh

logger = logging.getLogger(__name__)


Pixels = np.ndarray[Any, np.dtype[np.float32]]
Scaled = np.ndarray[Any, np.dtype[np.uint8]]

SHARED_FROM_PIXELS: Final = 3_000_000
"""Scaling takes some 6 ms per million pixels; below this, sharing it would gain too little."""


# More make the wait for the last one shorter, and cost more where they are joined.
_BANDS: Final = 8

LUT_MAX_PIXELS: Final = 2**18 - 1
"""OpenCV hands larger arrays to threads of its own, which would take the cores from the model's."""


@dataclass(frozen=True, slots=True, eq=False)
class PreparedImage:
    """What the network needs of an image.

    ``size_wh`` of the original in pixels, after the EXIF rotation; ``scaled`` uint8
    ``[height, width, 3]`` at the network's size, which ``ImageProcessor.normalise`` or the device
    turns into the network's values. ``content_hash`` has 32 hex digits that are equal for equal
    ``scaled`` of equal ``size_wh``: for images with the same features and the same answers.
    """

    size_wh: SizeWh
    content_hash: str
    scaled: Scaled

    @property
    def num_pixels(self) -> int:
        """Of ``scaled``."""
        return int(self.scaled.shape[0] * self.scaled.shape[1])


def look_up(scaled: Scaled, table: Pixels, out: Pixels | None = None) -> Pixels:
    """Each value of uint8 ``[H, W, 3]`` through its channel's row of ``table`` ``[3, 256]``.

    Gives float32 ``[H, W, 3]``: ``out``, which is contiguous, or a new array.
    """
    if out is None:
        out = np.empty(scaled.shape, np.float32)
    if out.shape != scaled.shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(
            f"Pixels of shape {list(scaled.shape)} go into contiguous float32 of that shape, and "
            f"{out.dtype} {list(out.shape)} was given."
        )
    values = np.ascontiguousarray(table.T)[None]
    step = max(1, LUT_MAX_PIXELS // max(1, scaled.shape[1]))
    for top in range(0, len(scaled), step):
        # Written in place, because the part of ``out`` has the type and shape of the result.
        cv2.LUT(scaled[top : top + step], values, dst=out[top : top + step])
    return out


def _narrow_band(
    image: Image.Image, narrow: Image.Image, top: int, bottom: int, filter_: Image.Resampling
) -> None:
    rows = image.crop((0, top, image.width, bottom))
    narrow.paste(rows.resize((narrow.width, bottom - top), filter_), (0, top))


def _work_off(take: Callable[[], Callable[[], None]]) -> None:
    while True:
        try:
            work = take()
        except IndexError:
            return
        work()


PROCESSOR_FILES: Final = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class ImageProcessor:
    """An image to the network's pixels: squashed to ``size_wh``, scaled and normalised.

    The aspect ratio is not kept and nothing is cropped; every task was trained that way.
    """

    size_wh: SizeWh = (768, 768)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resample: int = Image.Resampling.BICUBIC
    rescale: float = 1 / 255

    @classmethod
    def from_folder(cls, folder: Path) -> ImageProcessor:
        """Read the checkpoint's processor file; without one, the published values hold.

        Raises CheckpointError for a damaged file or for steps this class does not do.
        """
        path = image_processor_file(folder)
        settings = None if path is None else _image_settings(path)
        return cls() if path is None or settings is None else _from_settings(settings, path)

    def resize(self, image: Image.Image, helpers: Executor | None = None) -> Scaled:
        """An 8-bit RGB image at the network's size, by Pillow's filter: uint8 ``[H, W, 3]``.

        A large image is scaled by this thread and, if one is free, one of ``helpers``, which meet
        somewhere between its ends. The pixels are the same: Pillow scales each row by itself,
        rounds, and then each column.
        """
        filter_ = Image.Resampling(self.resample)
        width, height = image.size
        if helpers is None or width * height < SHARED_FROM_PIXELS:
            return np.asarray(image.resize(self.size_wh, filter_), dtype=np.uint8)
        narrow = Image.new("RGB", (self.size_wh[0], height))
        edges = [height * band // _BANDS for band in range(_BANDS + 1)]
        bands = deque(
            partial(_narrow_band, image, narrow, top, bottom, filter_)
            for top, bottom in pairwise(edges)
            if bottom > top
        )
        helper: Future[None] | None = None
        try:
            helper = helpers.submit(_work_off, bands.pop)
        except RuntimeError:
            logger.debug("The helpers were sent home: the work is all this thread's")
        try:
            _work_off(bands.popleft)
        finally:
            # A helper that never comes may be handed this for long, so it must hold no pixels.
            bands.clear()
            if helper is not None and not helper.cancel():
                helper.result()
        return np.asarray(narrow.resize(self.size_wh, filter_), dtype=np.uint8)

    @cached_property
    def lookup_table(self) -> Pixels:
        """The normalised value of each 8-bit value of each channel: float32 ``[3, 256]``."""
        values = (np.arange(256, dtype=np.float64) * self.rescale).astype(np.float32)
        mean = np.asarray(self.mean, np.float32)[:, None]
        std = np.asarray(self.std, np.float32)[:, None]
        return (values - mean) / std

    def normalise(self, scaled: Scaled) -> Pixels:
        """The network's values for uint8 ``[height, width, 3]``: float32 ``[3, height, width]``.

        A view of memory in the order height, width, channel, which the network computes in;
        ``np.stack`` keeps that order.
        """
        return look_up(scaled, self.lookup_table).transpose(2, 0, 1)

    def pixels(self, image: Image.Image) -> Pixels:
        """The network's input for an 8-bit RGB image, as ``normalise`` gives it."""
        return self.normalise(self.resize(image))


def image_processor_file(folder: Path) -> Path | None:
    """The file of a checkpoint that says how images are prepared; None where none does."""
    paths = (Path(folder) / name for name in PROCESSOR_FILES)
    return next((p for p in paths if p.is_file() and _image_settings(p) is not None), None)


def _image_settings(path: Path) -> dict[str, Any] | None:
    """The image part of a processor file, or None if the file has no such part."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is cut or damaged; download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a processor file; download it again.")
    nested = content.get("image_processor")
    if isinstance(nested, dict):
        return nested
    return content if "size" in content or "image_mean" in content else None


def _from_settings(settings: dict[str, Any], path: Path) -> ImageProcessor:
    plain = ImageProcessor()
    try:
        size_wh = _size_of(settings.get("size", {"height": 768, "width": 768}))
        if not settings.get("do_resize", True):
            raise ValueError("do_resize is false")
        crops = settings.get("do_center_crop", False)
        if crops and _size_of(settings.get("crop_size", {})) != size_wh:
            raise ValueError("do_center_crop cuts the image")
        normalises = settings.get("do_normalize", True)
        return ImageProcessor(
            size_wh=size_wh,
            mean=_triple(settings.get("image_mean", plain.mean)) if normalises else (0.0, 0.0, 0.0),
            std=_triple(settings.get("image_std", plain.std)) if normalises else (1.0, 1.0, 1.0),
            resample=Image.Resampling(settings.get("resample", plain.resample)),
            rescale=float(settings.get("rescale_factor", plain.rescale))
            if settings.get("do_rescale", True)
            else 1.0,
        )
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} asks for image steps that Florence-2 does not have ({error}); "
            "use the published file."
        ) from error


def _size_of(size: int | dict[str, int]) -> SizeWh:
    if isinstance(size, int):
        size = {"height": size, "width": size}
    width, height = int(size["width"]), int(size["height"])
    if width < 1 or height < 1:
        raise ValueError(f"size {size}")
    return width, height


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue

"""Whatever a caller has (a path, bytes, a picture, an array) as upright 8-bit RGB pixels."""

from __future__ import annotations

import io
import math
import os
import re
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Final

import numpy as np
from PIL import Image, ImageFile, _imaging

from florence2.bit_depth import Depth, full_colours, memory_factor, read_depth, to_8_bits
from florence2.budget import Hold
from florence2.errors import ImageError
from florence2.placeholders import HEAD_BYTES, find_placeholder
from florence2.records import SizeWh

MAX_PIXELS: Final = 200_000_000

Room = Callable[[int], Hold]
"""Holds so many pixels of a budget, once there is room for them."""

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray

_ORIENTATION_TAG: Final = 0x0112

_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Those that make the width the height.
_LYING: Final = frozenset(turn for number, turn in _TURNS.items() if number >= 5)

_URL_PATTERN: Final = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+://|data:)")

# Pillow takes memory in blocks of 16 MB, which glibc keeps for the thread that gave them back: each
# thread that once opened a large image would hold on to all of it. Blocks over 32 MB go back to the
# system at once.
if "PILLOW_BLOCK_SIZE" not in os.environ:
    _imaging.set_block_size(64 * 2**20)

# What Pillow's decoders raise on damaged data, found by feeding them random bytes.
_DAMAGE: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    AttributeError,
    MemoryError,
    struct.error,
    zlib.error,
)


class LoadedImage:
    """An upright picture in 8-bit RGB. ``image`` must not be changed afterwards.

    One that was opened with ``room`` holds its pixels of a budget until it is closed.
    """

    def __init__(self, image: Image.Image, hold: Hold | None = None) -> None:
        self._image: Image.Image | None = image
        self._size_wh = image.size
        self._hold = hold

    @property
    def image(self) -> Image.Image:
        """The pixels; ImageError once they were given up."""
        image = self._image
        if image is None:
            raise ImageError("An image that was closed has no pixels any more; open it again.")
        return image

    @property
    def size_wh(self) -> SizeWh:
        """Width and height in pixels, after the EXIF rotation; also when closed."""
        return self._size_wh

    def close(self, kept_pixels: int = 0) -> None:
        """Gives up the pixels, and of the budget all but ``kept_pixels`` for what was made of them.

        Closing it again gives up those too.
        """
        self._image = None
        if self._hold is not None:
            self._hold.resize(kept_pixels)

    def __getstate__(self) -> dict[str, Any]:
        """In another process it holds nothing of a budget."""
        return {**self.__dict__, "_hold": None}

    def __enter__(self) -> LoadedImage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ImagePart(LoadedImage):
    """A box (x1, y1, x2, y2) of an open image, cut out whenever its pixels are asked for."""

    def __init__(self, whole: LoadedImage, box_xyxy: tuple[int, int, int, int]) -> None:
        self._whole = whole
        self._box_xyxy = box_xyxy

    @property
    def image(self) -> Image.Image:
        """The pixels, a copy each time; ImageError once those of the whole were given up."""
        return self._whole.image.crop(self._box_xyxy)

    @property
    def size_wh(self) -> SizeWh:
        """Width and height of the box in pixels."""
        x1, y1, x2, y2 = self._box_xyxy
        return x2 - x1, y2 - y1

    def close(self, kept_pixels: int = 0) -> None:
        """The pixels are those of the whole, which is closed by who opened it."""


def identity(image: object) -> object:
    """Equal for what is certainly the same image: the same path, bytes or object."""
    if isinstance(image, os.PathLike) and isinstance(path := os.fspath(image), str):
        return path
    return image if isinstance(image, str | bytes) else id(image)


def open_image(
    source: ImageSource | LoadedImage, max_pixels: int = MAX_PIXELS, room: Room | None = None
) -> LoadedImage:
    """Open an image and turn it into upright 8-bit RGB.

    ``source`` is a path, an image file's bytes, a ``PIL.Image``, or a uint8 RGB array
    ``[height, width, 3]``. The EXIF rotation is applied, transparency is dropped, and of an
    animation or a document the first frame or page is taken. Of values of more than 8 bits the
    upper 8 of those in use count, see ``florence2.bit_depth``. The size is checked in the file's
    header, before anything is decoded.

    ``room`` is asked for the image's pixels then, for more than there are where opening takes more
    memory (colours of more than 8 bits), and what it holds is released when the image is
    closed or cannot be opened; what it raises comes through. A LoadedImage is given back as it is.

    Raises ImageError with one plain sentence for anything that is not such an image.
    """
    if isinstance(source, LoadedImage):
        return source
    if isinstance(source, Image.Image):
        return _from_picture(source, "the image", max_pixels, room, is_ours=False)
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels, room)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_file(io.BytesIO(source), "the image data", max_pixels, room)
    if isinstance(source, (str, os.PathLike)):
        with _opened_path(source) as (file, name):
            return _from_file(file, name, max_pixels, room)
    raise ImageError(
        "An image is a path, bytes, a PIL image or a uint8 RGB array [height, width, 3], "
        f"and {type(source).__name__} was received; convert it first."
    )


def check_header(file: BinaryIO, name: str = "the image", max_pixels: int = MAX_PIXELS) -> SizeWh:
    """Width and height in pixels as an image file's header has them; nothing is decoded.

    Raises ImageError for no image, or more than ``max_pixels``.
    """
    with _opened(file, name) as picture:
        _check_size(picture.size, name, max_pixels)
        return picture.size


def upright_size(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> SizeWh:
    """Width and height in pixels that ``open_image`` will give a file's image; nothing is decoded.

    Raises ImageError for no image, or more than ``max_pixels``.
    """
    with _opened_path(path) as (file, name), _opened(file, name) as picture:
        _check_size(picture.size, name, max_pixels)
        width, height = picture.size
        # Pillow gives a TIFF's size as it will be when it is loaded.
        is_upright = picture.format == "TIFF"
        turn = None if is_upright else _turn_of(picture, Image.Image.getexif)
        return (height, width) if turn in _LYING else (width, height)


def file_format(path: str | os.PathLike[str]) -> str | None:
    """Pillow's name of what lies in an image file, as "JPEG"; None for a file that is no image."""
    try:
        with _strict_decoding(), Image.open(path) as picture:
            return picture.format
    except _DAMAGE:
        return None


def has_more_frames(path: str | os.PathLike[str]) -> bool:
    """Whether an image file has pages or frames after the one that ``open_image`` takes.

    The further pictures in a camera's JPEG (MPO) do not count: they show the same from elsewhere,
    or are smaller copies. False for a file that is no image.
    """
    try:
        with _strict_decoding(), Image.open(path) as picture:
            return picture.format != "MPO" and bool(getattr(picture, "is_animated", False))
    except _DAMAGE:
        return False


@contextmanager
def _opened_path(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, str]]:
    """An image's file and what to call it; ImageError for a path that leads to none."""
    path = os.fspath(path)
    if not isinstance(path, str):
        raise ImageError("The path of an image must be text, not bytes; decode it first.")
    if _URL_PATTERN.match(path):
        raise ImageError(
            f"Images are not downloaded, and the address {path[:100]!r} was received; "
            "save the image and give its path."
        )
    # Without the middle of one that is too long to be a path.
    name = repr(path if len(path) <= 1000 else f"{path[:150]}...{path[-150:]}")
    try:
        with open(path, "rb") as file:
            yield file, name
    except FileNotFoundError as error:
        raise ImageError(f"There is no image {name}; check the path.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"The image {name} cannot be read: {reason}.") from error


def _from_file(file: BinaryIO, name: str, max_pixels: int, room: Room | None) -> LoadedImage:
    with _opened(file, name) as picture:
        return _from_picture(picture, name, max_pixels, room, is_ours=True)


def _opened(file: BinaryIO, name: str) -> Image.Image:
    head = file.read(HEAD_BYTES)
    if not head:
        raise ImageError(f"An image file must have content, and {name} is empty; send it again.")
    file.seek(0)
    try:
        with _strict_decoding():
            return Image.open(file)
    except _DAMAGE as error:
        found = find_placeholder(head)
        what = "is in none or is damaged" if found is None else found.is_what
        remedy = "convert it or send it again" if found is None else found.remedy
        raise ImageError(
            f"An image must be in a known format such as JPEG or PNG, and {name} {what}; {remedy}."
        ) from error


def _from_picture(
    picture: Image.Image, name: str, max_pixels: int, room: Room | None, *, is_ours: bool
) -> LoadedImage:
    _check_size(picture.size, name, max_pixels)
    try:
        factor = memory_factor(picture)
    except _DAMAGE:
        # Whether it can be opened all the same shows when it is.
        factor = 1
    with _held(math.prod(picture.size) * factor, room) as hold:
        rgb = _decoded(picture, name, max_pixels, is_ours=is_ours)
        if hold is not None:
            hold.resize(math.prod(rgb.size))
        return LoadedImage(rgb, hold)


@contextmanager
def _held(num_pixels: int, room: Room | None) -> Iterator[Hold | None]:
    """What holds these pixels, to be kept; released where they cannot be had."""
    hold = None if room is None else room(num_pixels)
    try:
        yield hold
    except BaseException:
        if hold is not None:
            hold.release()
        raise


def _decoded(picture: Image.Image, name: str, max_pixels: int, *, is_ours: bool) -> Image.Image:
    try:
        with _strict_decoding():
            depth = read_depth(picture)
            picture.load()
    except _DAMAGE as error:
        raise ImageError(
            f"An image must be complete, and {name} is cut or damaged; send it again."
        ) from error
    # A decoder may learn the true size only from the data itself.
    _check_size(picture.size, name, max_pixels)
    turn = _turn_of(picture, type(picture).getexif)
    try:
        with _strict_decoding():
            rgb = _to_rgb(picture, depth, is_ours=is_ours)
    except _DAMAGE as error:
        raise ImageError(
            f"The colours of an image must be convertible to RGB, and {name} has mode "
            f"{picture.mode!r}; convert it to 8-bit RGB."
        ) from error
    return rgb if turn is None else rgb.transpose(turn)


def _turn_of(picture: Image.Image, getexif: Callable[[Any], Image.Exif]) -> Image.Transpose | None:
    """What turns a picture upright. A PNG's own ``getexif`` decodes it to its end."""
    try:
        orientation = getexif(picture).get(_ORIENTATION_TAG)
    except _DAMAGE:
        # Damaged metadata is no reason to refuse pixels that are whole.
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _from_array(array: np.ndarray[Any, Any], max_pixels: int, room: Room | None) -> LoadedImage:
    if array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(
            "An image array must have the shape [height, width, 3], and "
            f"{list(array.shape)} was received; convert it to RGB."
        )
    if array.dtype != np.uint8:
        raise ImageError(
            f"An image array must hold uint8 values from 0 to 255, and {array.dtype} was "
            "received; scale and convert it."
        )
    height, width, _ = array.shape
    _check_size((width, height), "the image array", max_pixels)
    with _held(width * height, room) as hold:
        return LoadedImage(Image.fromarray(np.array(array, order="C", copy=True)), hold)


def _check_size(size_wh: SizeWh, name: str, max_pixels: int) -> None:
    width, height = size_wh
    if width < 1 or height < 1:
        raise ImageError(
            f"An image must have at least one pixel, and {name} is {width}x{height}; "
            "send another one."
        )
    if width * height > max_pixels:
        raise ImageError(
            f"An image can have at most {max_pixels / 1e6:g} million pixels, and {name} is "
            f"{width}x{height}; make it smaller or cut it into parts."
        )


def _to_rgb(picture: Image.Image, depth: Depth, *, is_ours: bool) -> Image.Image:
    """Never a picture that its caller may go on drawing on: that is copied if it is RGB already."""
    colours = full_colours(picture, depth)
    if colours is not None:
        return Image.fromarray(to_8_bits(colours, depth))
    if picture.mode == "RGB" and is_ours:
        # Pillow's convert() copies, 48 MB for 12 megapixels. The opened file itself would do, but
        # it may hold on to the file's content.
        return picture._new(picture.im)
    if picture.mode.startswith("I;16") or picture.mode == "I":
        return Image.fromarray(to_8_bits(np.asarray(picture), depth)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if picture.mode in ("La", "RGBa"):
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    return picture.convert("RGB")


_strict_lock: Final = threading.Lock()
_strict_depth = 0
_loose_settings: tuple[bool, int | None] = (False, None)


@contextmanager
def _strict_decoding() -> Iterator[None]:
    """Pillow's process-wide switches as this module needs them, put back afterwards.

    The platform's SDK makes Pillow accept cut files, whose missing part would be labeled as if
    it were grey; and Pillow's own size limit is off in favour of the one checked here.
    Threads may decode side by side: the first one in sets the switches, the last one out resets.
    """
    global _strict_depth, _loose_settings
    with _strict_lock:
        if _strict_depth == 0:
            _loose_settings = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
            ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, None
        _strict_depth += 1
    try:
        yield
    finally:
        with _strict_lock:
            _strict_depth -= 1
            if _strict_depth == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = _loose_settings

"""Values of more than 8 bits: how many bits are in use, and the 8 bits that the network sees.

A file of 16 bits a value often holds fewer: thermal and industrial cameras give 10, 12 or 14. What
the file says decides (PNG's sBIT, TIFF's BitsPerSample and MaxSampleValue). A file that does not
say has the fewest bits, 8 to 16, that hold its largest value; but values that all are 8-bit ones
times 256 or 257 were 8 bits stretched to 16.
"""

from __future__ import annotations

import io
import re
import struct
import sys
from dataclasses import dataclass
from typing import IO, Any, Final

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

Values = np.ndarray[Any, np.dtype[Any]]


_FULL_BITS: Final = 16

# Measured: up to 18 and 13 bytes a pixel, against 8.
_FACTOR_OF_DEEP_COLOURS: Final = 3
_FACTOR_OF_WIDE_VALUES: Final = 2

# Their decoders have copies of their own: up to 16 bytes a pixel.
_FACTORS_OF_FORMATS: Final = {"WEBP": 2, "JPEG2000": 2, "AVIF": 2}

# 8 bits are stretched to 16 by doubling the byte, or by a zero byte below it.
_STRETCHES: Final = (257, 256)

_COLOURS: Final = ("RGB", "RGBA")

# Pillow's names of how the values of colours lie in a file: (R|G|B|A|X)...;16 and their byte order.
_PLAIN_COLOURS: Final = re.compile(r"[RGBAX]{1,4};16[BLN]")
_OTHER_ORDER: Final = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_SWAPPED: Final = {"LA;16B": "RGBA"}

_BITS_PER_SAMPLE: Final = 258
_PHOTOMETRIC: Final = 262
_MAX_SAMPLE_VALUE: Final = 281
_WHITE_IS_ZERO: Final = 0

_PNG_BIT_DEPTH_AT: Final = 24
_PNG_CHUNKS_AT: Final = 8


@dataclass(frozen=True, slots=True)
class Depth:
    """What a file says about its values. ``bits`` is None where it says nothing.

    ``may_be_scaled``: the values may have been scaled up to 16 bits, as PNG wants it.
    ``is_inverted``: 0 is white. ``content`` is the file of a picture in colours of more than 8
    bits, of which Pillow gives the upper 8 only.
    """

    bits: int | None = None
    may_be_scaled: bool = False
    is_inverted: bool = False
    content: bytes | None = None


def read_depth(picture: Image.Image) -> Depth:
    """To be called before the picture is decoded, which may close its file."""
    if not isinstance(picture, ImageFile.ImageFile):
        return Depth()
    if picture.format == "PNG":
        return _of_png(picture)
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return _of_tiff(picture)
    # Pillow scales the values of these formats up by the depth they name.
    is_scaled = picture.format == "JPEG2000" or (
        picture.format == "PPM" and any(tile.codec_name != "raw" for tile in picture.tile)
    )
    return Depth(_FULL_BITS) if is_scaled else Depth()


def to_8_bits(values: Values, depth: Depth) -> Values:
    """The upper 8 of the bits in use: uint8 in the shape of ``values``.

    Raises ValueError for values below 0 or above 65535.
    """
    largest = int(values.max())
    if values.min() < 0 or largest > 0xFFFF:
        raise ValueError("32-bit pixels have no agreed range")
    bits = _bits_in_use(values, largest, depth)
    eight: Values = np.empty(values.shape, np.uint8)
    np.right_shift(values, bits - 8, out=eight, casting="unsafe")
    return 255 - eight if depth.is_inverted else eight


def full_colours(picture: Image.Image, depth: Depth) -> Values | None:
    """The whole values ``[height, width, 3]`` of a decoded picture where its upper bytes are not
    all that counts; None where they are, or are all that can be had."""
    if depth.content is None:
        return None
    extremes: Any = picture.getextrema()
    if max(int(high) for _, high in extremes[:3]) > 0x7F:
        return None
    lower = _lower_bytes(depth.content)
    if lower is None:
        return None
    whole: Values = np.asarray(picture)[:, :, :3].astype(np.uint16)
    # In place: each copy would be six bytes a pixel.
    whole <<= 8
    whole |= lower
    return whole


def memory_factor(picture: Image.Image) -> int:
    """How many times the memory of a picture of 8 bits a value one takes while it is opened.

    To be called before the picture is decoded.
    """
    if picture.mode in _COLOURS and _is_deep(picture):
        return _FACTOR_OF_DEEP_COLOURS
    if picture.mode in ("I", "F"):
        return _FACTOR_OF_WIDE_VALUES
    return _FACTORS_OF_FORMATS.get(picture.format or "", 1)


def _is_deep(picture: Image.Image) -> bool:
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return _largest_of(picture, _BITS_PER_SAMPLE) > 8
    tiles = picture.tile if isinstance(picture, ImageFile.ImageFile) else []
    return any(";16" in _rawmode(tile) for tile in tiles if tile.args)


def _lower_bytes(content: bytes) -> Values | None:
    """Those of a file's colours, or of its grey; None where they cannot be had."""
    with Image.open(io.BytesIO(content)) as again:
        if isinstance(again, TiffImagePlugin.TiffImageFile):
            _mend_planes(again)
        tiles = [_of_lower_bytes(tile) for tile in again.tile]
        if None in tiles:
            return None
        again.tile = [tile for tile in tiles if tile is not None]
        lower: Values = np.asarray(again)
    # Grey with alpha has been read as its four bytes.
    is_grey = tiles[0] is not None and _rawmode(tiles[0]) == "RGBA"
    return lower[:, :, 1:2] if is_grey else lower[:, :, :3]


def _of_lower_bytes(tile: Any) -> Any:  # noqa: ANN401 - Pillow's own, which has no public type
    """The tile with its bytes the other way round, so that Pillow keeps the lower ones."""
    rawmode = _rawmode(tile)
    if rawmode in _SWAPPED:
        return _in_rawmode(tile, _SWAPPED[rawmode])
    if _PLAIN_COLOURS.fullmatch(rawmode):
        return _in_rawmode(tile, rawmode[:-1] + _OTHER_ORDER[rawmode[-1]])
    return None


def _in_rawmode(tile: Any, rawmode: str) -> Any:  # noqa: ANN401
    is_plain = isinstance(tile.args, str)
    return tile._replace(args=rawmode if is_plain else (rawmode, *tile.args[1:]))


def _rawmode(tile: Any) -> str:  # noqa: ANN401
    return str(tile.args if isinstance(tile.args, str) else tile.args[0])


def _bits_in_use(values: Values, largest: int, depth: Depth) -> int:
    needed = max(largest.bit_length(), 8)
    if needed == _FULL_BITS:
        return _FULL_BITS
    if depth.bits is not None:
        if depth.may_be_scaled and _is_scaled(values, needed, depth.bits):
            return _FULL_BITS
        return max(depth.bits, needed)
    is_stretched = needed > 8 and any(_divides(factor, values) for factor in _STRETCHES)
    return _FULL_BITS if is_stretched else needed


def _is_scaled(values: Values, needed: int, bits: int) -> bool:
    """Whether values of ``bits`` bits lie in the upper bits; the ones below then repeat them."""
    below = (1 << (_FULL_BITS - bits)) - 1
    return needed > bits or not any((row & below).any() for row in values)


def _divides(factor: int, values: Values) -> bool:
    # Row by row: the first one mostly tells, and no copy of all is needed.
    return not any((row % factor).any() for row in values)


def _of_png(picture: ImageFile.ImageFile) -> Depth:
    file = picture.fp
    is_deep = picture.mode in _COLOURS or picture.mode.startswith("I")
    if file is None or not picture.tile or not is_deep:
        return Depth()
    before = file.tell()
    try:
        file.seek(_PNG_BIT_DEPTH_AT)
        if file.read(1) != bytes((_FULL_BITS,)):
            return Depth()
        bits = _significant_bits(file)
        content = _whole(file) if picture.mode in _COLOURS else None
        return Depth(bits, may_be_scaled=True, content=content)
    finally:
        file.seek(before)


def _significant_bits(file: IO[bytes]) -> int | None:
    """The largest of a PNG's sBIT chunk that is not about transparency."""
    start = _PNG_CHUNKS_AT
    while True:
        file.seek(start)
        head = file.read(8)
        if len(head) < 8:
            return None
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT":
            return None
        if kind == b"sBIT" and 1 <= length <= 4:
            found = file.read(length)
            bits = max(found[: 1 if length < 3 else 3], default=0)
            return bits if 8 <= bits <= _FULL_BITS else None
        start += length + 12


def _of_tiff(picture: TiffImagePlugin.TiffImageFile) -> Depth:
    tags = picture.tag_v2
    stored = _largest_of(picture, _BITS_PER_SAMPLE)
    if not 8 < stored <= _FULL_BITS:
        return Depth()
    largest = _largest_of(picture, _MAX_SAMPLE_VALUE)
    # The largest number that fits is what this tag has where nobody set it.
    named = max(largest.bit_length(), 8) if 0 < largest < 0xFFFF else None
    # Of a picture that its caller has decoded the file is closed.
    file = picture.fp if picture.tile else None
    _mend_planes(picture)
    return Depth(
        bits=named if stored == _FULL_BITS else stored,
        is_inverted=tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO,
        content=_whole(file) if picture.mode in _COLOURS and file is not None else None,
    )


def _mend_planes(picture: TiffImagePlugin.TiffImageFile) -> None:
    """Pillow takes the values of uncompressed planes of 16 bits for twice as many of 8 bits."""
    tags = picture.tag_v2
    if _largest_of(picture, _BITS_PER_SAMPLE) == _FULL_BITS:
        order = "L" if tags.prefix == b"II" else "B"
        picture.tile = [
            _in_rawmode(tile, f"{_rawmode(tile)};16{order}")
            if tile.codec_name == "raw" and _rawmode(tile) in "RGBA"
            else tile
            for tile in picture.tile
        ]


def _largest_of(picture: TiffImagePlugin.TiffImageFile, tag: int) -> int:
    value = picture.tag_v2.get(tag)
    listed = value if isinstance(value, tuple) else (value,)
    return max((one for one in listed if isinstance(one, int)), default=0)


def _whole(file: IO[bytes]) -> bytes:
    before = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(before)
    return content

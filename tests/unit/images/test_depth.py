"""One picture, however deep its file: the 8 bits that are looked at are the same."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from image_tools import RNG, encoded, noise, rgb_of
from PIL import Image, TiffImagePlugin

from florence2.errors import ImageError
from florence2.images import open_image

COLOURS = noise(30, 20)
GREY = COLOURS[:, :, 0]
GREY3 = np.repeat(GREY[:, :, None], 3, axis=2)
DEPTHS = range(9, 17)


def deepened(picture, bits):
    """The picture in ``bits`` bits, as a camera that gives so many would have it."""
    return np.round(picture / 255 * (2**bits - 1)).astype(np.uint16)


def file_of(values, suffix, alpha=None):
    planes = values[:, :, ::-1] if values.ndim == 3 else values
    if alpha is not None:
        planes = np.dstack([planes, np.full(values.shape[:2], alpha, np.uint16)])
    return cv2.imencode(suffix, planes)[1].tobytes()


def tiff_of(values, **tags):
    """A grey TIFF with ``tags`` by their numbers, as t281=4095."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[int(name[1:])] = value
    return encoded(Image.fromarray(values), "TIFF", tiffinfo=info)


def png_of(values, significant=None):
    """A 16-bit PNG of grey, grey and alpha, colours, or colours and alpha."""
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, data):
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)),
            b"" if significant is None else chunk(b"sBIT", bytes([significant] * channels)),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


def planar_tiff(values):
    """Colours of 16 bits, one plane after another."""
    height, width = values.shape[:2]
    planes = [values[:, :, place].astype("<u2").tobytes() for place in range(3)]
    first = 8
    starts = [first + place * len(planes[0]) for place in range(3)]
    extra = first + sum(map(len, planes))
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, extra), (259, 3, 1, 1),
            (262, 3, 1, 2), (273, 4, 3, extra + 8), (277, 3, 1, 3), (278, 4, 1, height),
            (279, 4, 3, extra + 20), (284, 3, 1, 2)]  # fmt: skip
    tail = struct.pack("<4H3I3I", 16, 16, 16, 0, *starts, *(len(plane) for plane in planes))
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    header = b"II*\0" + struct.pack("<I", extra + len(tail))
    return header + b"".join(planes) + tail + directory + struct.pack("<I", 0)


FILES = {
    "grey PNG": lambda bits: file_of(deepened(GREY, bits), ".png"),
    "grey TIFF": lambda bits: file_of(deepened(GREY, bits), ".tif"),
    "colour PNG": lambda bits: file_of(deepened(COLOURS, bits), ".png"),
    "colour TIFF": lambda bits: file_of(deepened(COLOURS, bits), ".tif"),
    "colour TIFF in planes": lambda bits: planar_tiff(deepened(COLOURS, bits)),
    "colours and alpha": lambda bits: file_of(deepened(COLOURS, bits), ".png", alpha=0xFFFF),
    "grey and alpha": lambda bits: png_of(
        np.dstack([deepened(GREY, bits), np.full(GREY.shape, 2**bits - 1)])
    ),
    "grey picture": lambda bits: Image.fromarray(deepened(GREY, bits)),
    "grey picture in 32 bits": lambda bits: Image.fromarray(deepened(GREY, bits).astype(np.int32)),
    "opened picture": lambda bits: Image.open(io.BytesIO(file_of(deepened(COLOURS, bits), ".png"))),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("bits", DEPTHS)
def test_a_picture_of_any_depth_gives_the_pixels_of_the_8_bit_one(kind, bits):
    expected = COLOURS if "olour" in kind or kind == "opened picture" else GREY3
    assert np.array_equal(rgb_of(FILES[kind](bits)), expected)


@pytest.mark.parametrize("bits", DEPTHS)
def test_values_that_were_shifted_up_give_them_too(bits):
    shifted = GREY.astype(np.uint16) << (bits - 8)
    assert np.array_equal(rgb_of(Image.fromarray(shifted)), GREY3)


DARK = GREY // 8
DARK3 = np.repeat(DARK[:, :, None], 3, axis=2)
NOISE = RNG.integers(0, 2, GREY.shape).astype(np.uint16)

DARK_COLOURS = deepened(COLOURS // 8, 12) | 1
FEW = np.array([[3, 900]], np.uint16)

SAYS = {
    "PNG, lower bits": (png_of(deepened(DARK, 12) | NOISE, significant=12), DARK3),
    "PNG, upper bits": (png_of(deepened(DARK, 12) << 4, significant=12), DARK3),
    "PNG, all bits": (png_of((DARK.astype(np.uint16) << 8) | NOISE, significant=16), DARK3),
    "PNG, colours": (png_of(DARK_COLOURS, significant=12), DARK_COLOURS >> 4),
    "PNG, colours with noise below": (
        png_of(COLOURS.astype(np.uint16) << 8 | 255 - COLOURS),
        COLOURS,
    ),
    "TIFF, largest value": (tiff_of(deepened(DARK, 14) | NOISE, t281=(1 << 14) - 1), DARK3),
    "TIFF, a largest value that nobody set": (tiff_of(deepened(GREY, 12), t281=0xFFFF), GREY3),
    "TIFF, a largest value of another picture": (tiff_of(deepened(GREY, 12), t281=255), GREY3),
    "8 bits, doubled": (png_of(DARK.astype(np.uint16) * 257), DARK3),
    "8 bits, moved up": (tiff_of(DARK.astype(np.uint16) << 8), DARK3),
    "nothing, so as bright as the largest value allows": (
        Image.fromarray(FEW),
        np.repeat(FEW[:, :, None] >> 2, 3, axis=2),
    ),
    "black": (png_of(np.zeros((4, 4, 3), np.uint16)), np.zeros((4, 4, 3))),
    "black, not said": (Image.fromarray(np.zeros((4, 4), np.uint16)), np.zeros((4, 4, 3))),
    # Pillow turns 8 bits over when it writes them, and deeper ones not.
    "TIFF, zero is white": (tiff_of(GREY, t262=0), GREY3),
    "TIFF, zero is white, deep": (tiff_of(deepened(255 - GREY, 16), t262=0), GREY3),
}


@pytest.mark.parametrize(("source", "expected"), SAYS.values(), ids=SAYS)
def test_a_picture_is_as_dark_as_its_file_says(source, expected):
    assert np.array_equal(rgb_of(source), expected)


def test_a_pgm_names_its_depth():
    dark = deepened(DARK, 10)
    data = b"P5 30 20 1023\n" + dark.astype(">u2").tobytes()
    difference = rgb_of(data)[:, :, 0].astype(int) - DARK
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_picture_that_its_caller_decoded_is_taken_as_it_is(suffix):
    file = io.BytesIO(file_of(deepened(COLOURS, 16), suffix))
    with Image.open(file) as picture:
        picture.load()
    file.close()
    assert np.array_equal(rgb_of(picture), COLOURS)


def test_a_damaged_deep_file_is_refused_like_any_other():
    data = FILES["colour PNG"](12)
    with pytest.raises(ImageError, match="must be complete"):
        open_image(data[: len(data) // 2])

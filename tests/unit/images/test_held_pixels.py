"""Open images hold their pixels of a budget, known from the header, until they are closed."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from image_tools import encoded
from PIL import Image

from florence2 import images
from florence2.errors import ImageError, NoRoomError
from florence2.images import ImagePart, check_header, open_image


def blank(kind="PNG", mode="RGB", size_wh=(40, 30), **options):
    return encoded(Image.new(mode, size_wh), kind, **options)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return blank("JPEG", exif=exif)


def deep(channels):
    return cv2.imencode(".png", np.zeros((30, 40, channels), np.uint16))[1].tobytes()


PNG = blank()
# Each with how many times its pixels are asked for while it is opened.
SOURCES = {
    "a file": (lambda path: path, 1),
    "bytes": (lambda _: PNG, 1),
    "a picture": (lambda path: Image.open(path), 1),
    "an array": (lambda _: np.zeros((30, 40, 3), np.uint8), 1),
    "grey": (lambda _: blank(mode="L"), 1),
    "deep grey": (lambda _: blank(mode="I;16"), 1),
    "with an alpha channel": (lambda _: blank(mode="RGBA"), 1),
    "turned by EXIF": (lambda _: turned(), 1),
    "deep colours": (lambda _: deep(3), 3),
    "deep colours and alpha": (lambda _: deep(4), 3),
    "32 bits": (lambda _: blank("TIFF", "I"), 2),
    "WebP": (lambda _: blank("WEBP"), 2),
    "JPEG 2000": (lambda _: blank("JPEG2000"), 2),
}


@pytest.mark.parametrize(("source", "factor"), SOURCES.values(), ids=SOURCES)
def test_an_open_image_holds_its_pixels_until_it_is_closed(tmp_path, budget, source, factor):
    """And what takes more memory to open asks for more room until it is open."""
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    asked = []

    def room(pixels):
        asked.append(pixels)
        return budget.hold(pixels)

    with open_image(source(path), room=room) as opened:
        assert (asked, budget.held) == ([1200 * factor], 1200)
        size_wh = opened.size_wh
    assert budget.held == 0
    assert opened.size_wh == size_wh
    with pytest.raises(ImageError, match="open it again"):
        _ = opened.image


def broken_entries():
    """A TIFF with values of an entry behind the end of the file."""
    data = bytearray(blank("TIFF"))
    entry = data.index(struct.pack("<HH", 258, 3))
    data[entry + 8 : entry + 12] = struct.pack("<I", 2**31)
    return bytes(data)


NO_IMAGES = {
    "cut": PNG[:-30],
    "cut in the header": PNG[:20],
    "no image": b"x",
    "too large": blank(size_wh=(200, 100)),
    "unreadable entries": broken_entries(),
}


@pytest.mark.parametrize("source", NO_IMAGES.values(), ids=NO_IMAGES)
def test_what_cannot_be_opened_holds_nothing(budget, source):
    with pytest.raises(ImageError):
        open_image(source, max_pixels=15_000, room=budget.hold)
    assert budget.held == 0


def test_nothing_is_decoded_before_there_is_room(budget):
    budget.hold(9_500)
    with pytest.raises(NoRoomError):
        open_image(PNG[:-30], room=lambda pixels: budget.hold(pixels, wait_s=0))
    assert budget.held == 9_500


def test_a_depth_that_cannot_be_told_is_no_error_of_its_own(budget, monkeypatch):
    def fail(picture):
        raise struct.error

    monkeypatch.setattr(images, "memory_factor", fail)
    with open_image(PNG, room=budget.hold):
        assert budget.held == 1200


def test_an_array_that_cannot_be_copied_holds_nothing(budget, monkeypatch):
    array = np.zeros((30, 40, 3), np.uint8)
    monkeypatch.setattr(np, "array", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_image(array, room=budget.hold)
    assert budget.held == 0


def test_what_was_made_of_an_image_stays_counted_until_it_goes(budget):
    opened = open_image(PNG, room=budget.hold)
    opened.close(kept_pixels=48)
    assert budget.held == 48
    opened.close()
    assert budget.held == 0


def test_a_part_is_cut_when_it_is_looked_at_and_goes_with_the_whole(budget):
    pixels = np.arange(30 * 40 * 3, dtype=np.uint16).astype(np.uint8).reshape(30, 40, 3)
    whole = open_image(pixels, room=budget.hold)
    part = ImagePart(whole, (5, 6, 15, 10))
    assert part.size_wh == (10, 4)
    assert np.array_equal(np.asarray(part.image), pixels[6:10, 5:15])
    part.close()
    assert budget.held == 1200
    whole.close()
    with pytest.raises(ImageError):
        _ = part.image


@pytest.mark.parametrize(
    ("size_wh", "is_fine"), [((40, 30), True), ((20_000, 10_000), True), ((20_001, 10_000), False)]
)
def test_a_header_tells_the_size_without_decoding(size_wh, is_fine):
    # Only the header says so; there are no such pixels behind it.
    data = bytearray(PNG)
    data[16:24] = struct.pack(">II", *size_wh)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    if is_fine:
        assert check_header(io.BytesIO(data)) == size_wh
        return
    with pytest.raises(ImageError, match="at most 200 million pixels"):
        check_header(io.BytesIO(data))


MEMORY = """
import io, resource, threading
from PIL import Image
from florence2.images import open_image

file = io.BytesIO()
Image.new("L", (6000, 5000)).save(file, "PNG")

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

def work(barrier):
    for turn in range(4):
        barrier.wait()
        if turn == int(threading.current_thread().name):
            open_image(file.getvalue()).close()
    barrier.wait()
    barrier.wait()

before, barrier = resident_mib(), threading.Barrier(5)
threads = [threading.Thread(target=work, args=[barrier], name=str(n)) for n in range(4)]
for thread in threads:
    thread.start()
for _ in range(5):
    barrier.wait()
print(resident_mib() - before)
barrier.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own count")
def test_memory_of_closed_images_goes_back_whichever_thread_opened_them():
    """Four threads with 30 megapixels each, 120 MB, one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 150

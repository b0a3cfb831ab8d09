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
from PIL import Image
from preparing_tools import SIZE_WH

import florence2.engine.encoding
from florence2 import images
from florence2.budget import Budget
from florence2.engine.encoding import PreparedImage
from florence2.errors import ImageError, NoRoomError
from florence2.images import ImagePart, check_header, open_image


def png(size_wh=(40, 30), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size_wh).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def budget():
    return Budget(10_000, "pixels")


def turned():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(file, "JPEG", exif=exif)
    return file.getvalue()


SOURCES = {
    "a file": lambda path: path,
    "bytes": lambda path: path.read_bytes(),
    "a picture": lambda path: Image.open(path),
    "an array": lambda path: np.zeros((30, 40, 3), np.uint8),
    "grey": lambda path: png(mode="L"),
    "deep grey": lambda path: png(mode="I;16"),
    "with an alpha channel": lambda path: png(mode="RGBA"),
    "turned by EXIF": lambda path: turned(),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_an_open_image_holds_its_pixels_until_it_is_closed(tmp_path, budget, source):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    with open_image(source(path), room=budget.hold) as opened:
        assert budget.held == 1200
        size_wh = opened.size_wh
    assert budget.held == 0
    assert opened.size_wh == size_wh
    with pytest.raises(ImageError, match="open it again"):
        _ = opened.image


NO_IMAGES = {
    "cut": lambda: png()[:-30],
    "cut in the header": lambda: png()[:20],
    "no image": lambda: b"x",
    "too large": lambda: png((200, 100)),
}


@pytest.mark.parametrize("source", NO_IMAGES.values(), ids=NO_IMAGES)
def test_what_cannot_be_opened_holds_nothing(budget, source):
    with pytest.raises(ImageError):
        open_image(source(), max_pixels=15_000, room=budget.hold)
    assert budget.held == 0


def test_nothing_is_decoded_before_there_is_room(budget):
    budget.hold(9_500)
    cut = png()[:-30]
    with pytest.raises(NoRoomError):
        open_image(cut, room=lambda pixels: budget.hold(pixels, wait_s=0))
    assert budget.held == 9_500


def deep(channels):
    values = np.zeros((30, 40, channels), np.uint16)
    return cv2.imencode(".png", values)[1].tobytes()


def wide():
    file = io.BytesIO()
    Image.new("I", (40, 30)).save(file, "TIFF")
    return file.getvalue()


def saved(kind):
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, kind)
    return file.getvalue()


FACTORS = {
    "8 bits": (png, 1),
    "8 bits and alpha": (lambda: png(mode="RGBA"), 1),
    "deep grey": (lambda: png(mode="I;16"), 1),
    "deep colours": (lambda: deep(3), 3),
    "deep colours and alpha": (lambda: deep(4), 3),
    "32 bits": (wide, 2),
    "WebP": (lambda: saved("WEBP"), 2),
    "JPEG 2000": (lambda: saved("JPEG2000"), 2),
    "JPEG": (lambda: saved("JPEG"), 1),
}


@pytest.mark.parametrize(("make_file", "factor"), FACTORS.values(), ids=FACTORS)
def test_what_takes_more_memory_to_open_asks_for_more_room_until_it_is_open(
    budget, make_file, factor
):
    asked = []

    def room(pixels):
        asked.append(pixels)
        return budget.hold(pixels)

    with open_image(make_file(), room=room):
        assert budget.held == 1200
    assert asked == [1200 * factor]
    assert budget.held == 0


def test_a_file_whose_entries_cannot_be_read_is_refused_as_an_image(budget):
    data = bytearray(saved("TIFF"))
    entry = data.index(struct.pack("<HH", 258, 3))
    # Its values lie behind the end of the file.
    data[entry + 8 : entry + 12] = struct.pack("<I", 2**31)
    with pytest.raises(ImageError):
        open_image(bytes(data), room=budget.hold)
    assert budget.held == 0


def test_a_depth_that_cannot_be_told_is_no_error_of_its_own(budget, monkeypatch):
    def fail(picture):
        raise struct.error

    monkeypatch.setattr(images, "memory_factor", fail)
    with open_image(png(), room=budget.hold):
        assert budget.held == 1200


def test_an_array_that_cannot_be_copied_holds_nothing(budget, monkeypatch):
    array = np.zeros((30, 40, 3), np.uint8)
    monkeypatch.setattr(np, "array", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_image(array, room=budget.hold)
    assert budget.held == 0


def test_what_was_made_of_an_image_stays_counted_until_it_goes(budget):
    opened = open_image(png(), room=budget.hold)
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
    assert budget.held == 1200
    whole.close()
    with pytest.raises(ImageError):
        _ = part.image


def test_an_image_prepared_by_the_engine_holds_only_while_it_is_scaled(make, monkeypatch, budget):
    monkeypatch.setattr(florence2.engine.encoding, "open_pixels", lambda: budget)
    preparer = make()
    for source in (png(), png((50, 20)), png()[:-30], png((9_000, 1))):
        preparer.take(source)
        assert budget.held == 0


def test_a_prepared_image_is_taken_as_it_is(make):
    prepared = make().prepare(open_image(png()))
    preparer = make()
    preparer.ahead([prepared])
    assert preparer.take(prepared) is prepared


def test_one_prepared_for_another_checkpoint_is_refused(make):
    width, height = SIZE_WH
    other = PreparedImage((40, 30), "0" * 32, np.zeros((height + 1, width, 3), np.uint8))
    assert "prepare it again" in str(make().take(other))


@pytest.mark.parametrize(
    ("size_wh", "is_fine"), [((40, 30), True), ((20_000, 10_000), True), ((20_001, 10_000), False)]
)
def test_a_header_tells_the_size_without_decoding(size_wh, is_fine):
    # Only the header says so; there are no such pixels behind it.
    data = bytearray(png())
    data[16:24] = size_wh[0].to_bytes(4, "big") + size_wh[1].to_bytes(4, "big")

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    if is_fine:
        assert check_header(io.BytesIO(data)) == size_wh
    else:
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

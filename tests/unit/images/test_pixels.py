"""Scaling in two parts is Pillow's scaling, and the table is looked up in place."""

from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from florence2 import pixels
from florence2.pixels import look_up, scale

RNG = np.random.default_rng(5)
TABLE = RNG.standard_normal((3, 256)).astype(np.float32)


def noise(width, height):
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


class Helpers(Executor):
    """Does at once what it is given, or nothing at all; counts what was given."""

    def __init__(self, *, is_idle=True):
        self.is_idle = is_idle
        self.given = 0

    def submit(self, fn, /, *args, **kwargs):
        self.given += 1
        if self.is_idle:
            fn(*args, **kwargs)
        return Future()


@pytest.fixture
def shared(monkeypatch):
    monkeypatch.setattr(pixels, "SHARED_FROM_PIXELS", 1)


SIZES = [
    ("smaller", (97, 61), (24, 20)),
    ("larger", (7, 5), (48, 40)),
    ("wider and lower", (11, 90), (48, 13)),
    ("the same width", (48, 90), (48, 13)),
    ("the same height", (90, 13), (48, 13)),
    ("the same size", (48, 13), (48, 13)),
    ("a column", (1, 40), (8, 8)),
    ("two rows", (40, 2), (8, 8)),
    ("one row", (40, 1), (8, 8)),
    ("much smaller", (1500, 1100), (10, 7)),
]


@pytest.mark.parametrize("is_idle", [True, False], ids=["helpers idle", "helpers busy"])
@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(("size_wh", "to_wh"), [s[1:] for s in SIZES], ids=[s[0] for s in SIZES])
def test_two_parts_are_the_whole(size_wh, to_wh, resample, is_idle, shared):
    image = noise(*size_wh)
    helpers = Helpers(is_idle=is_idle)
    whole = np.asarray(image.resize(to_wh, Image.Resampling(resample)))
    assert np.array_equal(scale(image, to_wh, resample, helpers), whole)
    assert helpers.given == 1


def test_small_images_are_not_shared():
    helpers = Helpers()
    scale(noise(1000, 800), (8, 8), 3, helpers)
    assert helpers.given == 0
    scale(noise(2000, 2000), (8, 8), 3, helpers)
    assert helpers.given == 1


def test_helpers_that_were_sent_home_are_done_without(shared):
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    image = noise(90, 60)
    assert np.array_equal(
        scale(image, (20, 10), 3, pool), np.asarray(image.resize((20, 10), Image.Resampling(3)))
    )


@pytest.mark.parametrize("at_once", [1, 39, 40, 100, 2**18 - 1])
def test_every_value_is_looked_up_in_its_channel(at_once, monkeypatch):
    monkeypatch.setattr(pixels, "_LOOKED_UP_AT_ONCE_PIXELS", at_once)
    scaled = RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    expected = np.stack([TABLE[c][scaled[..., c]] for c in range(3)], axis=-1)
    assert np.array_equal(look_up(scaled, TABLE), expected)
    batch = np.zeros((3, 30, 40, 3), np.float32)
    look_up(scaled, TABLE, batch[1])
    assert np.array_equal(batch[1], expected)
    assert not batch[[0, 2]].any()


def test_opencv_gets_too_little_at_once_for_threads_of_its_own(monkeypatch):
    sizes = []
    real = pixels.cv2.LUT

    def noted(part, values, dst):
        sizes.append(part.shape[0] * part.shape[1])
        return real(part, values, dst=dst)

    monkeypatch.setattr(pixels.cv2, "LUT", noted)
    look_up(np.zeros((768, 768, 3), np.uint8), TABLE)
    assert sum(sizes) == 768 * 768
    assert max(sizes) < 2**18


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((4, 5, 3)),
        np.zeros((5, 4, 3), np.float32),
        np.zeros((3, 4, 5), np.float32).transpose(1, 2, 0),
    ],
    ids=["float64", "turned", "channels first"],
)
def test_a_place_that_does_not_fit_is_refused(out):
    with pytest.raises(ValueError, match=r"\[4, 5, 3\] go into contiguous float32"):
        look_up(np.zeros((4, 5, 3), np.uint8), TABLE, out)

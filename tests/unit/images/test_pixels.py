"""The network's pixels equal the reference's; processor files of every layout are understood."""

import json
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from image_tools import RNG, encoded, noise
from PIL import Image

from florence2 import pixels
from florence2.errors import CheckpointError
from florence2.images import open_image
from florence2.pixels import ImageProcessor, look_up

PLAIN = ImageProcessor()
TABLE = RNG.standard_normal((3, 256)).astype(np.float32)


def picture(width, height):
    return Image.fromarray(noise(width, height))


def check_against_the_reference(reference, image, opened):
    ours = PLAIN.pixels(opened)
    theirs = reference.image_processor(image, return_tensors="np")["pixel_values"][0]
    assert (ours.dtype, ours.shape) == (np.float32, (3, 768, 768))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "size_wh", [(768, 768), (1280, 720), (333, 1000), (31, 17), (1, 1), (2000, 3)]
)
def test_pixels_equal_the_reference(size_wh, reference):
    image = picture(*size_wh)
    check_against_the_reference(reference, image, image)


FILES = {
    "JPEG 4:2:0": ("RGB", "JPEG", {"subsampling": 2}),
    "JPEG 4:2:2": ("RGB", "JPEG", {"subsampling": 1}),
    "JPEG 4:4:4": ("RGB", "JPEG", {"subsampling": 0}),
    "JPEG, progressive": ("RGB", "JPEG", {"progressive": True}),
    "JPEG, restart markers": ("RGB", "JPEG", {"restart_marker_rows": 1}),
    "JPEG, poor": ("RGB", "JPEG", {"quality": 5}),
    "JPEG, grey": ("L", "JPEG", {}),
    "JPEG, CMYK": ("CMYK", "JPEG", {}),
    "PNG": ("RGB", "PNG", {}),
    "PNG, palette": ("P", "PNG", {}),
    "WebP": ("RGB", "WEBP", {}),
}


@pytest.mark.parametrize("size_wh", [(1001, 333), (64, 48)])
@pytest.mark.parametrize(("mode", "kind", "options"), FILES.values(), ids=FILES)
def test_a_file_gives_the_pixels_of_the_reference(size_wh, mode, kind, options, reference):
    smooth = np.asarray(picture(12, 9).resize(size_wh, Image.Resampling.BICUBIC))
    grain = RNG.integers(-9, 10, smooth.shape)
    photo = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
    opened = open_image(encoded(photo.convert(mode), kind, **options)).image
    check_against_the_reference(reference, opened, opened)


def test_pixels_are_the_resized_image_through_the_table_as_the_network_reads_them():
    processor, image = ImageProcessor(size_wh=(40, 30)), picture(60, 50)
    resized, one = processor.resize(image), processor.pixels(image)
    assert resized.shape == (30, 40, 3)
    for channel, row in enumerate(processor.lookup_table):
        assert np.array_equal(one[channel], row[resized[..., channel]])
    assert one.transpose(1, 2, 0).flags.c_contiguous
    assert np.stack([one, one]).transpose(0, 2, 3, 1).flags.c_contiguous


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


SIZES = {
    "smaller": ((97, 61), (24, 20)),
    "larger": ((7, 5), (48, 40)),
    "wider and lower": ((11, 90), (48, 13)),
    "the same width": ((48, 90), (48, 13)),
    "the same height": ((90, 13), (48, 13)),
    "the same size": ((48, 13), (48, 13)),
    "a column": ((1, 40), (8, 8)),
    "two rows": ((40, 2), (8, 8)),
    "one row": ((40, 1), (8, 8)),
    "much smaller": ((1500, 1100), (10, 7)),
}


@pytest.fixture
def shared(monkeypatch):
    monkeypatch.setattr(pixels, "SHARED_FROM_PIXELS", 1)


@pytest.mark.parametrize("is_idle", [True, False], ids=["helpers idle", "helpers busy"])
@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(("size_wh", "to_wh"), SIZES.values(), ids=SIZES)
def test_an_image_scaled_by_two_threads_is_the_same(size_wh, to_wh, resample, is_idle, shared):
    image, helpers = picture(*size_wh), Helpers(is_idle=is_idle)
    processor = ImageProcessor(size_wh=to_wh, resample=resample)
    assert np.array_equal(processor.resize(image, helpers), processor.resize(image))
    assert helpers.given == 1


@pytest.mark.parametrize("is_shut_down", [False, True])
def test_helpers_at_work_or_sent_home_change_nothing(is_shut_down, shared):
    image, processor = picture(90, 60), ImageProcessor(size_wh=(20, 10))
    with ThreadPoolExecutor(1) as pool:
        if is_shut_down:
            pool.shutdown()
        for _ in range(50):
            assert np.array_equal(processor.resize(image, pool), processor.resize(image))


def test_a_fault_while_scaling_is_raised_and_leaves_no_work_to_helpers(shared, monkeypatch):
    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(Image.Image, "crop", fail)
    with ThreadPoolExecutor(1) as pool, pytest.raises(MemoryError, match="no room"):
        PLAIN.resize(picture(90, 60), pool)


def test_small_images_are_not_shared():
    helpers = Helpers()
    for size_wh, given in (((1000, 800), 0), ((2000, 2000), 1)):
        ImageProcessor(size_wh=(8, 8)).resize(picture(*size_wh), helpers)
        assert helpers.given == given


@pytest.mark.parametrize("at_once", [1, 39, 40, 100, pixels.LUT_MAX_PIXELS])
def test_every_value_is_looked_up_in_its_channel(at_once, monkeypatch):
    monkeypatch.setattr(pixels, "LUT_MAX_PIXELS", at_once)
    scaled = noise(40, 30)
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


NO_PLACES = {
    "float64": np.zeros((4, 5, 3)),
    "turned": np.zeros((5, 4, 3), np.float32),
    "channels first": np.zeros((3, 4, 5), np.float32).transpose(1, 2, 0),
}


@pytest.mark.parametrize("out", NO_PLACES.values(), ids=NO_PLACES)
def test_a_place_that_does_not_fit_is_refused(out):
    with pytest.raises(ValueError, match=r"\[4, 5, 3\] go into contiguous float32"):
        look_up(np.zeros((4, 5, 3), np.uint8), TABLE, out)


ORIGINAL = {
    "size": {"height": 768, "width": 768},
    "crop_size": {"height": 768, "width": 768},
    "do_center_crop": False,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "image_seq_length": 577,
}


def published(**changes):
    return {"preprocessor_config.json": {**ORIGINAL, **changes}}


RAW = {"do_rescale": False, "do_normalize": False}
LAYOUTS = {
    "no file": ({}, {}),
    "original": (published(), {}),
    "native, nested": ({"processor_config.json": {"image_processor": ORIGINAL}}, {}),
    "native, no image part": ({"processor_config.json": {"post_processor_config": {}}}, {}),
    "another size": (published(size={"height": 96, "width": 128}), {"size_wh": (128, 96)}),
    "one number as size": (published(size=96), {"size_wh": (96, 96)}),
    "unscaled": (published(**RAW), {"rescale": 1.0, "mean": (0.0,) * 3, "std": (1.0,) * 3}),
    "bilinear": (published(resample=2), {"resample": 2}),
    "a crop that cuts nothing": (published(do_center_crop=True), {}),
}


@pytest.mark.parametrize(("files", "changes"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tmp_path, files, changes):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert ImageProcessor.from_folder(tmp_path) == replace(PLAIN, **changes)


def test_what_the_reference_saves_is_read(native_folder):
    assert ImageProcessor.from_folder(native_folder) == PLAIN


DAMAGES = {
    "cut": ('{"size": ', "is cut or damaged"),
    "a list": ("[]", "not a processor file"),
    "shortest edge": ('{"size": {"shortest_edge": 224}}', "does not have"),
    "no resize": ('{"size": 768, "do_resize": false}', "do_resize is false"),
    "a real crop": (
        '{"size": 768, "do_center_crop": true, "crop_size": 224}',
        "do_center_crop cuts the image",
    ),
    "two channels": ('{"size": 768, "image_mean": [0.5, 0.5]}', "does not have"),
    "no such filter": ('{"size": 768, "resample": 99}', "does not have"),
    "nothing to see": ('{"size": 0}', "does not have"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_names_the_file(tmp_path, content, message):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json .*{message}"):
        ImageProcessor.from_folder(tmp_path)

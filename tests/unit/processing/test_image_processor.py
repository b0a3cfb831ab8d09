"""The network's pixels equal the reference's; processor files of every layout are understood."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from florence2.errors import CheckpointError
from florence2.images import open_image
from florence2.pixels import ImageProcessor

RNG = np.random.default_rng(11)
SIZES = [(768, 768), (1280, 720), (333, 1000), (31, 17), (1, 1), (2000, 3)]


@pytest.mark.parametrize("size_wh", SIZES)
def test_pixels_equal_the_reference(size_wh, reference):
    image = Image.fromarray(RNG.integers(0, 256, (size_wh[1], size_wh[0], 3), dtype=np.uint8))
    ours = ImageProcessor().pixels(image)
    theirs = reference.image_processor(image, return_tensors="np")["pixel_values"][0]
    assert ours.dtype == np.float32
    assert ours.shape == (3, 768, 768)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_pixels_lie_in_memory_as_the_network_reads_them():
    image = Image.fromarray(RNG.integers(0, 256, (50, 60, 3), dtype=np.uint8))
    processor = ImageProcessor(size_wh=(40, 30))
    one = processor.pixels(image)
    batch = np.stack([one, one])
    assert one.transpose(1, 2, 0).flags.c_contiguous
    assert batch.transpose(0, 2, 3, 1).flags.c_contiguous


def photo(size_wh):
    coarse = Image.fromarray(RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size_wh, Image.Resampling.BICUBIC)).astype(np.int16)
    noise = RNG.integers(-9, 10, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


FILES = [
    ("JPEG 4:2:0", "RGB", "JPEG", {"subsampling": 2}),
    ("JPEG 4:2:2", "RGB", "JPEG", {"subsampling": 1}),
    ("JPEG 4:4:4", "RGB", "JPEG", {"subsampling": 0}),
    ("JPEG, progressive", "RGB", "JPEG", {"progressive": True}),
    ("JPEG, restart markers", "RGB", "JPEG", {"restart_marker_rows": 1}),
    ("JPEG, poor", "RGB", "JPEG", {"quality": 5}),
    ("JPEG, grey", "L", "JPEG", {}),
    ("JPEG, CMYK", "CMYK", "JPEG", {}),
    ("PNG", "RGB", "PNG", {}),
    ("PNG, palette", "P", "PNG", {}),
    ("WebP", "RGB", "WEBP", {}),
]


@pytest.mark.parametrize("size_wh", [(1001, 333), (64, 48)])
@pytest.mark.parametrize(
    ("mode", "kind", "options"), [x[1:] for x in FILES], ids=[x[0] for x in FILES]
)
def test_a_file_gives_the_pixels_of_the_reference(size_wh, mode, kind, options, reference):
    file = io.BytesIO()
    photo(size_wh).convert(mode).save(file, kind, **options)
    ours = ImageProcessor().pixels(open_image(file.getvalue()).image)
    with Image.open(file) as opened:
        theirs = reference.image_processor(opened.convert("RGB"), return_tensors="np")
    np.testing.assert_allclose(ours, theirs["pixel_values"][0], rtol=0, atol=1e-6)


def test_pixels_are_the_resized_image_through_the_table():
    processor = ImageProcessor(size_wh=(40, 30))
    image = Image.fromarray(RNG.integers(0, 256, (50, 60, 3), dtype=np.uint8))
    resized, pixels = processor.resize(image), processor.pixels(image)
    assert resized.shape == (30, 40, 3)
    assert processor.lookup_table.shape == (3, 256)
    for channel in range(3):
        assert np.array_equal(
            pixels[channel], processor.lookup_table[channel][resized[..., channel]]
        )


ORIGINAL = {
    "size": {"height": 768, "width": 768},
    "crop_size": {"height": 768, "width": 768},
    "do_center_crop": False,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "image_seq_length": 577,
}
PLAIN = ImageProcessor()


def published(**changes):
    return {"preprocessor_config.json": {**ORIGINAL, **changes}}


RAW = {"do_rescale": False, "do_normalize": False}
LAYOUTS = [
    ("no file", {}, {}),
    ("original", published(), {}),
    ("native, nested", {"processor_config.json": {"image_processor": ORIGINAL}}, {}),
    ("native, no image part", {"processor_config.json": {"post_processor_config": {}}}, {}),
    ("another size", published(size={"height": 96, "width": 128}), {"size_wh": (128, 96)}),
    ("one number as size", published(size=96), {"size_wh": (96, 96)}),
    ("unscaled", published(**RAW), {"rescale": 1.0, "mean": (0.0,) * 3, "std": (1.0,) * 3}),
    ("bilinear", published(resample=2), {"resample": 2}),
    ("a crop that cuts nothing", published(do_center_crop=True), {}),
]


@pytest.mark.parametrize(
    ("files", "changes"), [x[1:] for x in LAYOUTS], ids=[x[0] for x in LAYOUTS]
)
def test_layouts(tmp_path, files, changes):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert ImageProcessor.from_folder(tmp_path) == replace(PLAIN, **changes)


def test_what_the_reference_saves_is_read(native_folder):
    assert ImageProcessor.from_folder(native_folder) == PLAIN


DAMAGES = [
    ("cut", '{"size": ', "is cut or damaged"),
    ("a list", "[]", "not a processor file"),
    ("shortest edge", '{"size": {"shortest_edge": 224}}', "does not have"),
    ("no resize", '{"size": 768, "do_resize": false}', "do_resize is false"),
    ("a real crop", '{"size": 768, "do_center_crop": true, "crop_size": 224}', "do_center_crop"),
    ("two channels", '{"size": 768, "image_mean": [0.5, 0.5]}', "does not have"),
    ("no such filter", '{"size": 768, "resample": 99}', "does not have"),
    ("nothing to see", '{"size": 0}', "does not have"),
]


@pytest.mark.parametrize(
    ("content", "message"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES]
)
def test_damage_names_the_file(tmp_path, content, message):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        ImageProcessor.from_folder(tmp_path)
    assert "preprocessor_config.json" in str(raised.value)

"""Every kind of picture becomes upright 8-bit RGB; everything else is one plain sentence."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_tools import encoded, noise, rgb_of
from PIL import Image, ImageFile

from florence2.errors import ImageError
from florence2.images import MAX_PIXELS, file_format, has_more_frames, open_image, upright_size

PIXELS = noise(30, 20)
RGB = Image.fromarray(PIXELS)
GREY = RGB.convert("L")


def test_every_source_gives_the_same_pixels(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(RGB))
    data = path.read_bytes()
    sources = [path, str(path), data, bytearray(data), memoryview(data), RGB, PIXELS]
    for source in sources:
        loaded = open_image(source)
        assert loaded.image.mode == "RGB"
        assert loaded.size_wh == (30, 20)
        assert np.array_equal(np.asarray(loaded.image), PIXELS)
    assert open_image(loaded) is loaded


def test_a_changed_source_does_not_change_what_was_opened():
    array, picture = PIXELS.copy(), RGB.copy()
    opened = [open_image(array), open_image(picture)]
    array[:] = 0
    picture.paste((0, 0, 0), (0, 0, 30, 20))
    assert all(np.array_equal(np.asarray(one.image), PIXELS) for one in opened)


KINDS = ["JPEG", "PNG", "WEBP", "TIFF", "GIF"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_opened_is_apart_from_its_file(kind):
    loaded = open_image(encoded(RGB, kind))
    # An image of a file format keeps hold of the file.
    assert type(loaded.image) is Image.Image
    assert not any(isinstance(value, io.BytesIO) for value in vars(loaded.image).values())


def test_the_pixels_of_a_file_are_not_copied(monkeypatch):
    copied = []
    monkeypatch.setattr(Image.Image, "copy", lambda self: copied.append(self) or self)
    open_image(encoded(RGB, "JPEG"))
    assert copied == []


def test_arrays_may_be_views():
    assert np.array_equal(rgb_of(PIXELS[::-1, ::2]), PIXELS[::-1, ::2])


DEEP_GREY = np.asarray(GREY).astype(np.uint16) * 256 + 77
PALETTE = RGB.quantize(16)
GREY3 = np.repeat(np.asarray(GREY)[:, :, None], 3, axis=2)
BIT = np.asarray(GREY) > 127

MODES = [
    ("grey", encoded(GREY), GREY3),
    ("grey and alpha", encoded(GREY.convert("LA")), GREY3),
    ("transparent", encoded(Image.fromarray(np.dstack([PIXELS, noise(30, 20)[..., 0]]))), PIXELS),
    ("palette", encoded(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    ("palette, transparent", encoded(PALETTE, transparency=3), np.asarray(PALETTE.convert("RGB"))),
    ("one bit", encoded(Image.fromarray(BIT)), np.where(BIT[:, :, None], 255, [0, 0, 0])),
    ("16-bit grey PNG", encoded(Image.fromarray(DEEP_GREY)), GREY3),
    ("16-bit grey TIFF", encoded(Image.fromarray(DEEP_GREY), "TIFF"), GREY3),
    ("8-bit grey in 32 bits", Image.fromarray(np.asarray(GREY).astype(np.int32)), GREY3),
    ("8-bit grey in 16 bits", Image.fromarray(np.asarray(GREY).astype(np.uint16)), GREY3),
    ("12-bit grey in 16 bits", encoded(Image.fromarray(DEEP_GREY >> 4)), GREY3),
    ("12-bit grey in 32 bits", Image.fromarray(DEEP_GREY.astype(np.int32) >> 4), GREY3),
    ("32-bit grey in 16 bits", Image.fromarray(DEEP_GREY.astype(np.int32)), GREY3),
    ("CMYK TIFF", encoded(RGB.convert("CMYK"), "TIFF"), PIXELS),
    ("YCbCr", RGB.convert("YCbCr"), np.asarray(RGB.convert("YCbCr").convert("RGB"))),
    ("HSV", RGB.convert("HSV"), np.asarray(RGB.convert("HSV").convert("RGB"))),
    ("premultiplied", RGB.convert("RGBA").convert("RGBa"), PIXELS),
]  # fmt: skip


@pytest.mark.parametrize(("source", "expected"), [m[1:] for m in MODES], ids=[m[0] for m in MODES])
def test_modes(source, expected):
    assert np.array_equal(rgb_of(source), expected)


def test_a_cmyk_jpeg_keeps_its_colours():
    flat = Image.new("RGB", (16, 16), (200, 40, 60))
    result = rgb_of(encoded(flat.convert("CMYK"), "JPEG", quality=95)).astype(int)
    assert np.abs(result - (200, 40, 60)).max() < 8


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken_and_further_ones_are_known(tmp_path, kind):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(tmp_path / "one", kind, **options)
    frames[0].save(tmp_path / "all", kind, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(rgb_of(tmp_path / "all"), np.asarray(frames[0]))
    assert [has_more_frames(tmp_path / name) for name in ("one", "all")] == [False, True]
    assert file_format(tmp_path / "one") == kind


def test_the_other_pictures_of_a_camera_are_no_frames(tmp_path):
    RGB.save(tmp_path / "one", "MPO", save_all=True, append_images=[RGB])
    assert not has_more_frames(tmp_path / "one")
    (tmp_path / "none").write_bytes(b"no image")
    assert not has_more_frames(tmp_path / "none")
    assert file_format(tmp_path / "none") is None


TURNS = {
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.transpose(a, (1, 0, 2)),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(np.transpose(a, (1, 0, 2)), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", [*range(10), 65535])
def test_exif_rotation_is_applied_where_it_makes_sense(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = open_image(encoded(RGB, exif=exif))
    turned = TURNS.get(orientation, np.asarray)(PIXELS)
    assert np.array_equal(np.asarray(loaded.image), turned)
    assert loaded.size_wh == turned.shape[1::-1]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_picture():
    data = encoded(RGB, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    assert np.array_equal(rgb_of(data), PIXELS)


def test_one_pixel_is_an_image():
    assert open_image(np.full((1, 1, 3), 9, np.uint8)).size_wh == (1, 1)
    assert open_image(encoded(Image.new("RGB", (1, 1)), "JPEG")).size_wh == (1, 1)


REFUSED = [
    (
        "a pointer",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 75\n",
        "is a Git LFS pointer, not the file itself; run `git lfs pull`",
    ),
    ("a page", b"<!DOCTYPE html><title>404</title>", "is a web page, not the file itself"),
    ("a drawing", b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "is in none"),
    ("empty bytes", b"", "is empty"),
    ("not an image", b"hello there, no picture", "known format"),
    ("only a header", encoded(RGB)[:30], "is in none|is cut"),
    ("cut PNG", encoded(RGB)[:-200], "must be complete"),
    ("cut JPEG", encoded(RGB, "JPEG")[:-80], "must be complete"),
    ("cut GIF", encoded(RGB, "GIF")[:-80], "must be complete"),
    ("cut WebP", encoded(RGB, "WEBP")[:-80], "damaged"),
    ("cut TIFF", encoded(RGB, "TIFF")[:-300], "damaged"),
    ("float picture", Image.fromarray(np.zeros((4, 4), np.float32)), "mode 'F'"),
    ("32-bit picture", Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "mode 'I'"),
    ("picture of no size", Image.new("RGB", (0, 5)), "at least one pixel"),
    ("float array", np.zeros((4, 4, 3)), "float64 was received"),
    ("16-bit array", np.zeros((4, 4, 3), np.uint16), "uint16 was received"),
    ("grey array", np.zeros((4, 4), np.uint8), r"\[4, 4\] was received"),
    ("transparent array", np.zeros((4, 4, 4), np.uint8), r"\[4, 4, 4\] was received"),
    ("channels first", np.zeros((3, 4, 5), np.uint8), r"\[3, 4, 5\] was received"),
    ("array of no size", np.zeros((0, 4, 3), np.uint8), "4x0"),
    ("address", "https://example.com/a.jpg", "not downloaded"),
    ("data address", "data:image/png;base64,AAAA", "not downloaded"),
    ("no such file", "no/such/file.jpg", "There is no image 'no/such/file.jpg'"),
    ("NUL in a path", "a\0b.jpg", "cannot be read"),
    ("bytes path", type("P", (), {"__fspath__": lambda self: b"a"})(), "must be text"),
    ("number", 7, "int was received"),
    ("nothing", None, "NoneType was received"),
    ("list", [[[1, 2, 3]]], "list was received"),
]


@pytest.mark.parametrize(
    ("source", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refused_with_one_sentence(source, message):
    with pytest.raises(ImageError, match=message) as raised:
        open_image(source)
    text = str(raised.value)
    assert text.endswith(".")
    assert "\n" not in text


def test_a_folder_and_an_empty_file_are_refused(tmp_path):
    with pytest.raises(ImageError, match="cannot be read: Is a directory"):
        open_image(tmp_path)
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ImageError, match=r"a\.jpg' is empty"):
        open_image(tmp_path / "a.jpg")


def png_claiming(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    return start + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 1 << 20) + b"IDAT"


def test_a_huge_image_is_refused_by_its_header():
    with pytest.raises(ImageError, match="200 million pixels, and the image data is 20000x20000"):
        open_image(png_claiming(20_000, 20_000))


def test_the_limit_is_exact_and_can_be_set(recwarn, monkeypatch):
    assert open_image(PIXELS, max_pixels=600).size_wh == (30, 20)
    for source in (PIXELS, RGB, encoded(RGB)):
        with pytest.raises(ImageError, match="30x20"):
            open_image(source, max_pixels=599)
    # Within the limit here, over Pillow's own, whose warning would only confuse.
    with pytest.raises(ImageError, match="must be complete"):
        open_image(png_claiming(MAX_PIXELS // 20, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    assert np.array_equal(rgb_of(encoded(RGB)), PIXELS)
    assert not recwarn.list


@pytest.mark.parametrize("loose", [True, False])
def test_cut_files_are_refused_whatever_others_told_pillow(monkeypatch, loose):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", loose)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 123)
    with pytest.raises(ImageError, match="must be complete"):
        open_image(encoded(RGB, "JPEG")[:-80])
    assert loose is ImageFile.LOAD_TRUNCATED_IMAGES
    assert Image.MAX_IMAGE_PIXELS == 123


SEEDS = [encoded(RGB, kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO")]
EDITS = st.lists(st.tuples(st.integers(0), st.binary(max_size=4)))


@st.composite
def damaged_files(draw):
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for place, replacement in draw(EDITS):
        start = place % len(data)
        data[start : start + len(replacement)] = replacement
    return bytes(data)


@given(data=damaged_files() | st.binary(max_size=64))
def test_damaged_files_and_junk_open_or_are_refused(data):
    with contextlib.suppress(ImageError):
        assert open_image(data, max_pixels=1_000_000).image.mode == "RGB"


ODD_PATHS = ["~nobody_of_this_name/a.jpg", "n" * 5000, "n/" * 3000, "\ud800.jpg", "\udce9.jpg"]


@pytest.mark.parametrize("path", ODD_PATHS)
def test_an_odd_path_is_one_short_sentence(path):
    with pytest.raises(ImageError, match=r"There is no image|cannot be read") as raised:
        open_image(path)
    assert len(str(raised.value)) < 400
    str(raised.value).encode()


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_the_upright_size_is_that_of_the_open_image(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    RGB.save(path, exif=exif)
    assert upright_size(path) == open_image(path).size_wh

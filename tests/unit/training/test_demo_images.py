"""The demo pictures: all readable, small together, and the same when made again."""

from pathlib import Path

from PIL import Image

from florence2_demo.demo_images import write_demo_images

COMMITTED = Path(__file__).parents[3] / "demo" / "images"


def test_pictures_are_small_and_as_committed(tmp_path):
    written = write_demo_images(tmp_path)
    assert sum(path.stat().st_size for path in written) < 1_500_000
    assert {path.suffix for path in written} == {".png", ".jpg"}
    for path in written:
        with Image.open(path) as picture, Image.open(COMMITTED / path.name) as committed:
            assert picture.mode == "RGB"
            assert picture.size == committed.size
            assert min(picture.size) >= 480

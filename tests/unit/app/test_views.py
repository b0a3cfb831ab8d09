"""The parts of an image that are looked at: all of it, a rectangle, or tiles of either."""

from __future__ import annotations

import numpy as np
import pytest

from florence2.errors import RequestError
from florence2.images import open_image
from serve.predict.tiling import views_of
from serve.settings import Tiling


@pytest.fixture
def picture():
    pixels = np.arange(100 * 200 * 3, dtype=np.uint32).reshape(100, 200, 3) % 251
    return open_image(pixels.astype(np.uint8))


def boxes(views):
    return [view.box_xyxy for view in views]


def test_the_whole_image_is_the_picture_itself(picture):
    [view] = views_of(picture, None, None)
    assert view.picture is picture
    assert view.box_xyxy == (0, 0, 200, 100)


def test_a_view_holds_the_pixels_of_its_box(picture):
    [view] = views_of(picture, (20.4, 10, 60, 50.6), None)
    assert view.box_xyxy == (20, 10, 60, 51)
    assert view.offset_xy == (20, 10)
    expected = np.asarray(picture.image)[10:51, 20:60]
    assert np.array_equal(np.asarray(view.picture.image), expected)


def test_a_rectangle_is_cut_at_the_images_edges(picture):
    assert boxes(views_of(picture, (150, -20, 900, 40), None)) == [(150, 0, 200, 40)]


@pytest.mark.parametrize("box", [(200, 0, 210, 9), (-9, -9, 0, 0), (-9, -9, 0.6, 50)])
def test_a_rectangle_without_a_pixel_of_the_image_is_refused(picture, box):
    with pytest.raises(RequestError, match="200x100"):
        views_of(picture, box, None)


def test_tiles_come_after_the_whole(picture):
    tiling = Tiling(size_wh=(100, 100), overlap_wh=(0, 0))
    assert boxes(views_of(picture, None, tiling)) == [
        (0, 0, 200, 100),
        (0, 0, 100, 100),
        (100, 0, 200, 100),
    ]


def test_the_whole_can_be_left_out(picture):
    tiling = Tiling(size_wh=(100, 100), overlap_wh=(0, 0), full_image=False)
    assert boxes(views_of(picture, None, tiling)) == [(0, 0, 100, 100), (100, 0, 200, 100)]


def test_tiles_of_a_rectangle_lie_in_it(picture):
    tiling = Tiling(size_wh=(40, 40), overlap_wh=(10, 10), full_image=False)
    found = boxes(views_of(picture, (100, 20, 170, 60), tiling))
    assert found == [(100, 20, 140, 60), (130, 20, 170, 60)]


def test_an_image_smaller_than_a_tile_is_looked_at_once(picture):
    tiling = Tiling(size_wh=(1024, 1024), overlap_wh=(128, 128))
    assert boxes(views_of(picture, None, tiling)) == [(0, 0, 200, 100)]

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.geometry import (
    box_xyxy_from_rectangle_tlbr,
    overlap,
    points_rc_from_ring_xy,
    rectangle_tlbr_from_box_xyxy,
)
from serve.sdk import sly

coordinate = st.floats(-1e6, 1e6, allow_nan=False)
side = st.integers(1, 5000)


@given(st.tuples(*[coordinate] * 4), side, side)
def test_every_box_gives_a_rectangle_inside_the_image(box, width, height):
    top, left, bottom, right = rectangle_tlbr_from_box_xyxy(box, (width, height))
    assert 0 <= top <= bottom < height
    assert 0 <= left <= right < width
    sly.Rectangle(top, left, bottom, right)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 50), st.integers(1, 50))
def test_whole_pixel_boxes_survive_the_way_there_and_back(x, y, width, height):
    box = (float(x), float(y), float(x + width), float(y + height))
    tlbr = rectangle_tlbr_from_box_xyxy(box, (100, 100))
    assert box_xyxy_from_rectangle_tlbr(tlbr) == box


@given(st.lists(coordinate, min_size=2, max_size=20).filter(lambda ring: len(ring) % 2 == 0))
def test_every_point_of_a_ring_is_a_pixel_of_the_image(ring):
    points = points_rc_from_ring_xy(ring, (30, 20))
    assert all(0 <= row < 20 and 0 <= column < 30 for row, column in points)


@pytest.mark.parametrize(
    ("box", "tlbr"),
    [
        pytest.param((0, 0, 10, 10), (0, 0, 9, 9), id="the last pixel is one before the edge"),
        pytest.param((0, 0, 200, 100), (0, 0, 99, 199), id="the whole image"),
        pytest.param((40.9, 10.2, 60.4, 20.6), (10, 41, 20, 59), id="rounds, does not truncate"),
        pytest.param((5, 5, 5, 5), (5, 5, 5, 5), id="no area is one pixel"),
        pytest.param((30, 20, 10, 5), (5, 10, 19, 29), id="swapped corners"),
        pytest.param((-50, -50, 900, 900), (0, 0, 99, 199), id="beyond every edge"),
        pytest.param((300, 300, 400, 400), (99, 199, 99, 199), id="outside"),
    ],
)
def test_boxes_in_the_order_and_bounds_of_the_sdk(box, tlbr):
    assert rectangle_tlbr_from_box_xyxy(box, (200, 100)) == tlbr


def test_overlap_is_intersection_over_union():
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    assert overlap((3, 3, 3, 3), (3, 3, 3, 3)) == 0

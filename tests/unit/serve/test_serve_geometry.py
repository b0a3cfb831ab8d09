from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from florence2.records import Box, Polygon, Quad
from serve.predict.geometry import (
    area_share,
    box_xyxy_from_rectangle_tlbr,
    mask_of_rings,
    outer_box,
    points_rc_from_ring_xy,
    rectangle_tlbr_from_box_xyxy,
    ring_area,
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


def test_a_mask_covers_what_any_ring_covers_and_starts_at_its_first_pixel():
    square, shifted = (2, 1, 5, 1, 5, 4, 2, 4), (4, 3, 7, 3, 7, 6, 4, 6)
    mask, (row, column) = mask_of_rings([square, shifted], (20, 10))
    assert (row, column) == (1, 2)
    assert mask.shape == (6, 6)
    drawn = {(int(y) + row, int(x) + column) for y, x in zip(*mask.nonzero(), strict=True)}
    expected = {(y, x) for y in range(1, 5) for x in range(2, 6)}
    assert drawn == expected | {(y, x) for y in range(3, 7) for x in range(4, 8)}


@pytest.mark.parametrize(
    "rings",
    [
        pytest.param([], id="no ring"),
        pytest.param([(30.0, 1.0, 40.0, 1.0, 40.0, 9.0)], id="right of the image"),
        pytest.param([(1e300, 1e300, 2e300, 1e300, 2e300, 2e300)], id="far away"),
        pytest.param([(-9.0, 2.0, -3.0, 2.0, -3.0, 6.0)], id="left of the image"),
    ],
)
def test_rings_without_a_pixel_of_the_image_have_no_mask(rings):
    assert mask_of_rings(rings, (20, 10)) is None


@given(st.lists(st.lists(coordinate, min_size=6, max_size=6), max_size=3), side, side)
def test_every_mask_is_inside_the_image_and_not_empty(rings, width, height):
    drawn = mask_of_rings(rings, (width, height))
    if drawn is not None:
        mask, (row, column) = drawn
        assert mask.any()
        assert 0 <= row <= row + mask.shape[0] <= height
        assert 0 <= column <= column + mask.shape[1] <= width


def test_the_part_of_a_ring_that_is_in_the_image_is_drawn_as_if_it_had_no_edge():
    mask, (row, column) = mask_of_rings([(-10.0, -10.0, 5.0, -10.0, 5.0, 5.0, -10.0, 5.0)], (20, 9))
    assert (row, column) == (0, 0)
    assert mask.shape == (6, 6)
    assert mask.all()


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        pytest.param(Box((9, 8, 1, 2), "", None), (1, 2, 9, 8), id="swapped corners"),
        pytest.param(Box((1, 2, math.nan, 4), "", None), None, id="not a number"),
        pytest.param(Quad((1, 1, 9, 2, 8, 7, 0, 6), "", None), (0, 1, 9, 7), id="quad"),
        pytest.param(
            Polygon(((1, 1, 5, 1, 5, 5), (7, 7, 9, 7, 9, 9)), "", None), (1, 1, 9, 9), id="rings"
        ),
        pytest.param(
            Polygon(((1, 1, 5, 1, 5, 5), (7, math.inf, 9, 7, 9, 9)), "", None), (1, 1, 5, 5),
            id="rings that cannot be drawn do not count",
        ),
        pytest.param(Polygon(((1, 1, 5, 1),), "", None), None, id="two points"),
    ],
)  # fmt: skip
def test_the_outer_box_of_every_shape(shape, box):
    assert outer_box(shape) == box


def test_the_area_of_a_box_counts_inside_the_image():
    assert area_share((0, 0, 10, 10), (20, 10)) == 0.5
    assert area_share((-50, -50, 90, 90), (20, 10)) == 1
    assert area_share((30, 0, 40, 10), (20, 10)) == 0


@pytest.mark.parametrize(
    ("points", "area"),
    [
        pytest.param([(0, 0), (0, 10), (10, 10), (10, 0)], 100, id="a square"),
        pytest.param([(0, 0), (0, 10), (10, 0)], 50, id="a triangle"),
        pytest.param([(0, 0), (0, 10), (0, 20)], 0, id="a line along a row"),
        pytest.param([(0, 0), (5, 5), (10, 10), (2, 2)], 0, id="a slanted line there and back"),
        pytest.param([(0, 0), (3, 7), (6, 14), (5, 40), (6, 14), (3, 7)], 0, id="a bent line"),
        pytest.param([(3, 3), (3, 3), (3, 3)], 0, id="a point"),
        pytest.param([(0, 0), (10, 10), (0, 10), (10, 0)], 50, id="two triangles, tip to tip"),
        pytest.param(
            [(0, 0), (1, 1), (0, 1), (1, 0)], 1, id="the same in one row: its middle counts"
        ),
    ],
)
def test_the_area_of_a_ring(points, area):
    assert ring_area(points) == pytest.approx(area)

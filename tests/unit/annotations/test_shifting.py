from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from florence2.records import Box, Polygon, Quad, Result, Text
from serve.predict.tiling import moved

CROP, IMAGE, OFFSET = (40, 30), (200, 100), (100.0, 50.0)


def result(*objects, steps=()):
    return Result("<OD>", CROP, tuple(objects), "words", "a<loc_1>", (5,), False, ("n",), steps)


@pytest.mark.parametrize(
    ("found", "placed"),
    [
        pytest.param(
            Box((1, 2, 3, 4), "a", 0.5), Box((101, 52, 103, 54), "a", 0.5), id="box"
        ),
        pytest.param(
            Quad((0, 0, 9, 1, 9, 5, 0, 4), "b", None),
            Quad((100, 50, 109, 51, 109, 55, 100, 54), "b", None), id="line of text",
        ),
        pytest.param(
            Polygon(((0, 0, 4, 0, 4, 4), (6, 6, 8, 6, 8, 8)), "c", 0.1),
            Polygon(((100, 50, 104, 50, 104, 54), (106, 56, 108, 56, 108, 58)), "c", 0.1),
            id="rings",
        ),
        pytest.param(Text("d", 0.9), Text("d", 0.9), id="text has no place"),
        pytest.param(
            Box((39, 29, 45, 35), "e", 0.5), Box((139, 79, 145, 85), "e", 0.5), id="nothing is cut"
        ),
    ],
)  # fmt: skip
def test_every_geometry_moves_by_the_offset(found, placed):
    assert moved(result(found), OFFSET, IMAGE).objects == (placed,)


def test_the_steps_move_too_and_the_rest_of_the_result_stays():
    box, placed = Box((1, 2, 3, 4), "a", 0.5), Box((101, 52, 103, 54), "a", 0.5)
    before = result(box, steps=(result(box, steps=(result(box),)),))
    after = moved(before, OFFSET, IMAGE)
    inner = after.steps[0].steps[0]
    assert after.objects == after.steps[0].objects == inner.objects == (placed,)
    assert after.size_wh == after.steps[0].size_wh == inner.size_wh == IMAGE
    assert (after.text, after.answer, after.token_ids, after.notes) == (
        before.text, before.answer, before.token_ids, before.notes,
    )  # fmt: skip
    assert before.objects == (box,)


whole = st.integers(-5000, 5000).map(float)
shape = st.one_of(
    st.builds(Box, st.tuples(*[whole] * 4), st.just("a"), st.none()),
    st.builds(Quad, st.tuples(*[whole] * 8), st.just("b"), st.none()),
    st.builds(
        Polygon,
        st.lists(st.tuples(*[whole] * 6), max_size=3).map(tuple),
        st.just("c"),
        st.none(),
    ),
    st.builds(Text, st.just("d"), st.none()),
)
shapes = st.lists(shape, max_size=5)


@given(shapes, shapes, whole, whole)
def test_there_and_back_is_where_it_was(objects, of_step, dx, dy):
    before = result(*objects, steps=(result(*of_step),))
    assert moved(moved(before, (dx, dy), IMAGE), (-dx, -dy), CROP) == before


@given(shapes, whole, whole, whole, whole)
def test_two_moves_are_one(objects, dx, dy, further_x, further_y):
    twice = moved(moved(result(*objects), (dx, dy), IMAGE), (further_x, further_y), IMAGE)
    assert twice == moved(result(*objects), (dx + further_x, dy + further_y), IMAGE)

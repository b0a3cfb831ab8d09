from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from florence2.errors import RequestError
from serve.predict.tiling import MAX_TILES, can_tile, plan_tiles


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "tiles"),
    [
        pytest.param((100, 80), (200, 200), (50, 50), [(0, 0, 100, 80)], id="a small image"),
        pytest.param((200, 200), (200, 200), (0, 0), [(0, 0, 200, 200)], id="just one tile"),
        pytest.param(
            (100, 50), (60, 50), (20, 0), [(0, 0, 60, 50), (40, 0, 100, 50)], id="they fit"
        ),
        pytest.param(
            (100, 50), (60, 50), (40, 0), [(0, 0, 60, 50), (20, 0, 80, 50), (40, 0, 100, 50)],
            id="more overlap, more tiles",
        ),
        pytest.param(
            (110, 50), (60, 50), (10, 0), [(0, 0, 60, 50), (50, 0, 110, 50)], id="exact steps"
        ),
        pytest.param(
            (70, 130), (70, 60), (0, 0), [(0, 0, 70, 60), (0, 60, 70, 120), (0, 70, 70, 130)],
            id="the last is pulled back",
        ),
        pytest.param(
            (90, 90), (60, 60), (0, 0),
            [(0, 0, 60, 60), (30, 0, 90, 60), (0, 30, 60, 90), (30, 30, 90, 90)], id="row by row",
        ),
        pytest.param(
            (90, 40), (60, 60), (0, 0), [(0, 0, 60, 40), (30, 0, 90, 40)], id="one side is short"
        ),
    ],
)  # fmt: skip
def test_where_the_tiles_lie(size, tile, overlap, tiles):
    assert list(plan_tiles(size, tile, overlap)) == tiles


side = st.integers(1, 120)


@st.composite
def plans(draw):
    tile = draw(st.tuples(st.integers(20, 80), st.integers(20, 80)))
    overlap = tuple(draw(st.integers(0, length // 2)) for length in tile)
    return draw(st.tuples(side, side)), tile, overlap


@given(plans())
def test_tiles_cover_every_pixel_are_of_full_size_and_share_the_overlap(plan):
    (width, height), tile, overlap = plan
    tiles = plan_tiles((width, height), tile, overlap)
    covered = np.zeros((height, width), bool)
    for x1, y1, x2, y2 in tiles:
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        assert (x2 - x1, y2 - y1) == (min(tile[0], width), min(tile[1], height))
        covered[y1:y2, x1:x2] = True
    assert covered.all()
    assert len(set(tiles)) == len(tiles)
    for axis in (0, 1):
        spans = sorted({(one[axis], one[axis + 2]) for one in tiles})
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert end - start >= overlap[axis]


@pytest.mark.parametrize(
    ("size", "tile", "overlap"),
    [
        pytest.param((100, 100), (50, 50), (50, 0), id="no step"),
        pytest.param((100, 100), (50, 50), (0, -1), id="a gap"),
        pytest.param((100, 100), (0, 50), (0, 0), id="no tile"),
        pytest.param((100_000, 100_000), (100, 100), (0, 0), id="too many"),
        pytest.param((100_000, 100_000), (1, 1), (0, 0), id="far too many"),
    ],
)
def test_tiles_that_cannot_be_are_refused_in_one_sentence(size, tile, overlap):
    with pytest.raises(RequestError) as refused:
        plan_tiles(size, tile, overlap)
    assert str(refused.value).count(". ") == 0
    assert str(refused.value).endswith(".")


def test_the_most_tiles_are_planned():
    assert len(plan_tiles((32 * 50, MAX_TILES // 32 * 50), (50, 50), (0, 0))) == MAX_TILES


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("<OD>", True),
        ("object_detection", True),
        ("<DENSE_REGION_CAPTION>", True),
        ("<REGION_PROPOSAL>", True),
        ("<CAPTION_TO_PHRASE_GROUNDING>", True),
        ("<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>", True),
        ("<OPEN_VOCABULARY_DETECTION>", True),
        ("<REFERRING_EXPRESSION_SEGMENTATION>", True),
        ("<OCR_WITH_REGION>", True),
        ("<CAPTION>", False),
        ("<MORE_DETAILED_CAPTION>", False),
        ("<OCR>", False),
        ("<REGION_TO_SEGMENTATION>", False),
        ("<REGION_TO_CATEGORY>", False),
        ("<OD>+<REGION_TO_DESCRIPTION>", False),
        ("<OD>+<REGION_TO_SEGMENTATION>", False),
    ],
)
def test_which_tasks_can_be_asked_in_tiles(task, answer):
    assert can_tile(task) is answer

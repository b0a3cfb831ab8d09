from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.predict.geometry import Find, distinct, known_score

WIDE, NEAR = (0.0, 0.0, 100.0, 100.0), (0.0, 0.0, 100.0, 80.0)
INNER, APART = (10.0, 10.0, 30.0, 30.0), (200.0, 200.0, 240.0, 240.0)


def cat(box, score, name="cat", kind=""):
    return Find(box, name, score, kind)


def shared_area(first, second):
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(0.0, width) * max(0.0, height)


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def iou(first, second):
    shared = shared_area(first, second)
    return shared / (area(first) + area(second) - shared) if shared else 0.0


def inside(first, second):
    shared = shared_area(first, second)
    return shared / min(area(first), area(second)) if shared else 0.0


@pytest.mark.parametrize(
    ("finds", "options", "kept"),
    [
        pytest.param([cat(WIDE, 0.4), cat(NEAR, 0.8)], {}, [1], id="the surer stays"),
        pytest.param([cat(WIDE, 0.8), cat(NEAR, 0.4)], {}, [0], id="whichever was first"),
        pytest.param([cat(WIDE, 0.8), cat(NEAR, 0.8)], {}, [0], id="of equals the earlier"),
        pytest.param([cat(WIDE, None), cat(NEAR, 0.1)], {}, [1], id="no score is 0"),
        pytest.param([cat(WIDE, math.nan), cat(NEAR, 0.1)], {}, [1], id="not a number is 0"),
        pytest.param([cat(WIDE, None), cat(NEAR, None)], {}, [0], id="no scores: the earlier"),
        pytest.param([cat(WIDE, 0.4), cat(NEAR, 0.8)], {"iou": 0.81}, [0, 1], id="below the IoU"),
        pytest.param([cat(WIDE, 0.4), cat(NEAR, 0.8)], {"iou": 0.8}, [1], id="just the IoU"),
        pytest.param([cat(WIDE, 0.4), cat(WIDE, 0.8)], {"iou": None}, [0, 1], id="off"),
        pytest.param([cat(WIDE, 0.9), cat(APART, 0.8)], {}, [0, 1], id="apart"),
        pytest.param([cat(WIDE, 0.4), cat(NEAR, 0.8, "dog")], {}, [0, 1], id="two classes"),
        pytest.param(
            [cat(WIDE, 0.4), cat(NEAR, 0.8, "dog")], {"across_classes": True}, [1], id="across"
        ),
        pytest.param(
            [cat(WIDE, 0.4), cat(NEAR, 0.8, "dog", "line")], {"across_classes": True}, [0, 1],
            id="two kinds, not even across",
        ),
        pytest.param([cat(WIDE, 0.9), cat(INNER, 0.8)], {}, [0, 1], id="inside, and not asked for"),
        pytest.param(
            [cat(WIDE, 0.9), cat(INNER, 0.8)], {"containment_share": 0.9}, [0], id="inside"
        ),
        pytest.param(
            [cat(WIDE, 0.7), cat(INNER, 0.8)], {"containment_share": 0.9}, [1],
            id="inside, and surer than the larger",
        ),
        pytest.param(
            [cat(WIDE, 0.9), cat(INNER, 0.8)], {"iou": None, "containment_share": 1.0}, [0],
            id="containment alone",
        ),
        pytest.param(
            [cat((0, 0, 10, 10), 0.9), cat((4, 0, 14, 10), 0.8), cat((8, 0, 18, 10), 0.7)],
            {"iou": 0.4}, [0, 2], id="what overlaps only one that goes stays",
        ),
        pytest.param([cat((5, 5, 5, 5), 0.9), cat((5, 5, 5, 5), 0.8)], {}, [0, 1], id="no area"),
        pytest.param([], {}, [], id="nothing"),
    ],
)  # fmt: skip
def test_which_finds_stay(finds, options, kept):
    assert distinct(finds, **{"iou": 0.7, **options}) == kept


corner = st.integers(0, 30).map(float)
size = st.integers(0, 20).map(float)
box = st.tuples(corner, corner, size, size).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
score = st.none() | st.floats(0, 1) | st.just(math.nan)
find = st.builds(Find, box, st.sampled_from("ab"), score, st.sampled_from("xy"))
finds_of_any_kind = st.lists(find, max_size=25)
share = st.none() | st.floats(0.05, 1)


def comparable(first, second, across):
    return first.kind == second.kind and (across or first.class_name == second.class_name)


def same(first, second, iou_from, inside_from, across):
    """The rule once more, in plain numbers and with room for rounding."""
    return comparable(first, second, across) and (
        (iou_from is not None and iou(first.box_xyxy, second.box_xyxy) >= iou_from + 1e-9)
        or (
            inside_from is not None and inside(first.box_xyxy, second.box_xyxy) > inside_from + 1e-9
        )
    )


@given(finds_of_any_kind, share, share, st.booleans())
def test_what_stays_is_in_order_and_no_two_of_it_are_the_same(finds, iou_from, inside_from, across):
    options = {"iou": iou_from, "containment_share": inside_from, "across_classes": across}
    kept = distinct(finds, **options)
    assert kept == sorted(set(kept))
    assert set(kept) <= set(range(len(finds)))
    for one, other in itertools.combinations(kept, 2):
        assert not same(finds[one], finds[other], iou_from, inside_from, across)
    again = distinct([finds[n] for n in kept], **options)
    assert again == list(range(len(kept)))


@given(finds_of_any_kind, share, share, st.booleans())
def test_everything_that_goes_has_a_better_one_that_stays(finds, iou_from, inside_from, across):
    kept = distinct(finds, iou=iou_from, containment_share=inside_from, across_classes=across)
    for gone in set(range(len(finds))) - set(kept):
        assert any(
            comparable(finds[gone], finds[n], across)
            and shared_area(finds[gone].box_xyxy, finds[n].box_xyxy) > 0
            and (-known_score(finds[n].score), n) < (-known_score(finds[gone].score), gone)
            for n in kept
        )


@given(finds_of_any_kind, share, share)
def test_the_surest_of_all_always_stays(finds, iou_from, inside_from):
    kept = distinct(finds, iou=iou_from, containment_share=inside_from, across_classes=True)
    if finds:
        best = max(range(len(finds)), key=lambda n: (known_score(finds[n].score), -n))
        assert best in kept


@given(find, find, st.floats(0.05, 1), st.floats(0.05, 1))
def test_a_higher_threshold_never_removes_one_of_a_pair_that_a_lower_one_keeps(one, other, a, b):
    low, high = sorted((a, b))
    for option in ("iou", "containment_share"):
        thresholds = {"iou": None, "containment_share": None}
        strict = distinct([one, other], **(thresholds | {option: low}))
        loose = distinct([one, other], **(thresholds | {option: high}))
        assert set(strict) <= set(loose)


@given(finds_of_any_kind)
def test_without_thresholds_everything_stays(finds):
    assert distinct(finds, iou=None, across_classes=True) == list(range(len(finds)))

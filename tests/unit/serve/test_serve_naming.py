from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.naming import (
    FIXED_SHAPES,
    MAX_CLASS_NAME,
    class_of,
    class_titles,
    clean_class_name,
    clean_suffix,
    clean_text,
    phrase_key,
    possible_titles,
)


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        pytest.param("Red Car", "Red Car", id="the user's spelling stays"),
        pytest.param("  red \t car\n", "red car", id="white space"),
        pytest.param("a\x00b\x1b[0m", "a b [0m", id="control characters"),
        pytest.param("машина 🚗", "машина 🚗", id="other scripts"),
        pytest.param("👨‍👩‍👧", "👨‍👩‍👧", id="joined emoji"),
        pytest.param("", "object", id="empty"),
        pytest.param(" \n\x00", "object", id="nothing printable"),
        pytest.param("\ud800x", "x", id="half a surrogate pair"),
    ],
)
def test_class_names_are_cleaned_and_otherwise_the_users(name, cleaned):
    assert clean_class_name(name) == cleaned


def test_a_long_class_name_is_cut():
    assert clean_class_name("x" * 1000) == "x" * MAX_CLASS_NAME


@pytest.mark.parametrize("label", ["red car", "Red Car", "a red car.", "the  Red car", "RED CAR;"])
def test_a_label_that_is_the_phrase_gets_the_class_as_typed(label):
    assert class_of(label, {phrase_key("Red car"): "Red Car!"}) == "Red Car!"


def test_another_label_keeps_its_own_name():
    assert class_of("redcar", {"red car": "car"}) == "redcar"
    assert phrase_key("a") == "a"


def test_text_keeps_its_lines():
    assert clean_text(" one \r\ntwo\x00 \n") == "one\ntwo"


BOX, OUTLINE, MASK = "rectangle", "polygon", "bitmap"


@pytest.mark.parametrize(
    ("wanted", "suffix", "titles"),
    [
        pytest.param([("cat", BOX)], "", ["cat"], id="the name as it is"),
        pytest.param([("cat", OUTLINE)], "", ["cat"], id="an outline alone keeps its name"),
        pytest.param([("cat", BOX)], "_bbox", ["cat_bbox"], id="suffix"),
        pytest.param(
            [("cat", OUTLINE), ("cat", BOX)], "", ["cat (polygon)", "cat"],
            id="of two shapes the box keeps the name, whatever the order",
        ),
        pytest.param(
            [("cat", BOX), ("cat", MASK)], "_nn", ["cat_nn", "cat (bitmap)_nn"],
            id="the suffix comes last",
        ),
        pytest.param(
            [("object", BOX), ("object", OUTLINE), ("object", MASK)], "",
            ["object", "object (polygon)", "object (bitmap)"], id="fixed: objects",
        ),
        pytest.param([("object", OUTLINE)], "", ["object (polygon)"], id="fixed, even if alone"),
        pytest.param(
            [("text", BOX), ("text", OUTLINE)], "", ["text (rectangle)", "text"], id="fixed: text"
        ),
        pytest.param([("text", BOX)], "_bbox", ["text_bbox"], id="with a suffix it is another"),
        pytest.param(
            [("cat (polygon)", BOX), ("cat", BOX), ("cat", OUTLINE)], "",
            ["cat (polygon)", "cat", "cat (polygon 2)"], id="a name that looks like ours",
        ),
        pytest.param(
            [("x" * 100, BOX), ("x" * 100, OUTLINE)], "_bbox",
            ["x" * 95 + "_bbox", "x" * 85 + " (polygon)_bbox"], id="cut to fit",
        ),
        pytest.param([], "_bbox", [], id="nothing"),
    ],
)  # fmt: skip
def test_every_class_has_one_shape(wanted, suffix, titles):
    assert [class_titles(wanted, suffix)[pair] for pair in wanted] == titles


def test_where_no_shape_is_fixed_every_name_stays():
    wanted = [("text", BOX), ("object", OUTLINE)]
    assert class_titles(wanted, fixed={}) == {pair: pair[0] for pair in wanted}


name = st.sampled_from(["cat", "cat (polygon)", "object", "text", "x" * 100]) | st.text().map(
    clean_class_name
)
pair = st.tuples(name, st.sampled_from([BOX, OUTLINE, MASK]))


@given(st.lists(pair, max_size=12), st.text(max_size=60).map(clean_suffix))
def test_no_class_has_two_shapes_or_is_too_long(wanted, suffix):
    titles = class_titles(wanted, suffix)
    assert set(titles) == set(wanted)
    shape_of = dict(FIXED_SHAPES)
    for (_, shape), title in titles.items():
        assert shape_of.setdefault(title, shape) == shape
        assert title.endswith(suffix)
        assert len(title) <= MAX_CLASS_NAME


def test_a_whitelist_may_have_a_class_as_its_labels_will():
    assert possible_titles("cat", OUTLINE, "_bbox") == ("cat_bbox", "cat (polygon)_bbox")


@pytest.mark.parametrize(
    ("suffix", "cleaned"),
    [("_bbox", "_bbox"), (" auto ", " auto"), ("a\nb", "a b"), ("", ""), ("y" * 80, "y" * 50)],
)
def test_a_suffix_is_cleaned(suffix, cleaned):
    assert clean_suffix(suffix) == cleaned

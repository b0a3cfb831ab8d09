from __future__ import annotations

import pytest

from serve.naming import MAX_CLASS_NAME, class_of, clean_class_name, clean_text, phrase_key


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

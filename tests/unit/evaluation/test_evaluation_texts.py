"""Errors of read text and of words, by worked arithmetic."""

import pytest

from florence2.evaluation.texts import (
    character_errors,
    edit_distance,
    has_known_words,
    plain_label,
)


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("", "", 0),
        ("STOP", "", 4),
        ("STOP", "STOP", 0),
        ("STOP", "SHOP", 1),
        ("kitten", "sitting", 3),
    ],
)
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


@pytest.mark.parametrize(
    ("read", "written", "errors"),
    [
        ("STOP", "STOP", 0.0),
        ("SHOP", "STOP", 0.25),
        ("", "STOP", 1.0),
        ("SOMETHING ELSE", "NO", 1.0),
        (" STOP\n7", "STOP 7", 0.0),
        ("", "", 0.0),
        ("X", "", 1.0),
    ],
)
def test_character_errors(read, written, errors):
    assert character_errors(read, written) == errors


@pytest.mark.parametrize(
    ("label", "plain"),
    [
        ("red cars", "red car"),
        ("The  Star", "star"),
        ("a purple fish", "purple fish"),
        ("human face", "human face"),
        ("", ""),
        ("red car and cup", "red car and cup"),
    ],
)
def test_plain_label(label, plain):
    assert plain_label(label) == plain


@pytest.mark.parametrize(
    ("answer", "known"),
    [
        ("red car<loc_1><loc_2>two stars", True),
        ("STOP\n7", True),
        ("", True),
        ("<poly><loc_3></poly>", True),
        ("carr<loc_1>", False),
        ("A small red car is at the top left. A sign on the right says EXIT.", True),
    ],
)
def test_known_words(answer, known):
    assert has_known_words(answer) is known

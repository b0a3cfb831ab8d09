"""Clients send back the classes that the app told them about, which asks for nothing less."""

import pytest

from serve.settings.parse import parse_settings

FIXED = ["object", "text", "object (polygon)", "object (bitmap)"]


@pytest.mark.parametrize(
    "listed",
    [["object"], FIXED, [*FIXED, "star", "tree"], ["object (bitmap)", "text"]],
    ids=["one general class", "the meta", "the meta and what was seen", "some general classes"],
)
def test_what_the_app_said_is_no_restriction(listed):
    assert parse_settings({"classes": listed}).classes is None


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"classes": ["star"]}, ("star",)),
        ({"classes": ["object", "star"]}, ("object", "star")),
        ({"classes": ["object"], "text": "object. star"}, ("object",)),
    ],
)
def test_a_choice_is_kept(settings, kept):
    assert parse_settings(settings).classes == kept

"""What is refused, and in which words."""

from __future__ import annotations

import pytest

from florence2.errors import RequestError
from florence2.records import GenerationSettings, check_settings


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"num_beams": 1},
        {"num_beams": 32},
        {"max_new_tokens": 1},
        {"length_penalty": 0},
        {"length_penalty": -1.0},
        {"early_stopping": False},
        {"early_stopping": "never"},
        {"no_repeat_ngram_size": 0},
    ],
)
def test_supported_settings_pass(changed):
    check_settings(GenerationSettings(**changed))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 0),
        ("num_beams", 33),
        ("num_beams", 2.0),
        ("num_beams", True),
        ("num_beams", "3"),
        ("max_new_tokens", 0),
        ("max_new_tokens", -5),
        ("max_new_tokens", 1.5),
        ("length_penalty", float("nan")),
        ("length_penalty", float("inf")),
        ("length_penalty", 11),
        ("length_penalty", -2),
        ("length_penalty", "1"),
        ("length_penalty", True),
        ("early_stopping", "Never"),
        ("early_stopping", None),
        ("early_stopping", 1),
        ("no_repeat_ngram_size", -1),
        ("no_repeat_ngram_size", 3.0),
        ("no_repeat_ngram_size", False),
    ],
)
def test_other_settings_are_refused_in_one_plain_sentence(name, value):
    with pytest.raises(RequestError) as caught:
        check_settings(GenerationSettings(**{name: value}))
    text = str(caught.value)
    assert text.startswith(f"{name} must be ")
    assert f"not {value!r};" in text
    assert text.endswith(".")

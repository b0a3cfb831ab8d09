"""What is refused, and in which words."""

from __future__ import annotations

import pytest

from florence2.errors import RequestError
from florence2.records import GenerationSettings, check_settings

SUPPORTED = {
    "num_beams": [1, 3, 32],
    "max_new_tokens": [None, 1],
    "length_penalty": [0, -1.0, 1.0],
    "early_stopping": [True, False, "never"],
    "no_repeat_ngram_size": [0, 3],
}
REFUSED = {
    "num_beams": [0, 33, 2.0, True, "3"],
    "max_new_tokens": [0, -5, 1.5],
    "length_penalty": [float("nan"), float("inf"), 11, -2, "1", True],
    "early_stopping": ["Never", None, 1],
    "no_repeat_ngram_size": [-1, 3.0, False],
}


@pytest.mark.parametrize(("name", "values"), SUPPORTED.items(), ids=SUPPORTED)
def test_supported_settings_pass(name, values):
    for value in values:
        check_settings(GenerationSettings(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values]
)
def test_other_settings_are_refused_in_one_plain_sentence(name, value):
    with pytest.raises(RequestError) as caught:
        check_settings(GenerationSettings(**{name: value}))
    text = str(caught.value)
    assert text.startswith(f"{name} must be ")
    assert f"not {value!r};" in text
    assert text.endswith(".")

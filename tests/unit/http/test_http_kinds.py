"""What was received, in words."""

import pytest

from serve.http.bodies import kind_of

KINDS = {
    "an object": {},
    "a list": [1],
    "text": "a",
    "true or false": False,
    "nothing": None,
    "a number": 0,
}


@pytest.mark.parametrize(("words", "value"), KINDS.items(), ids=KINDS)
def test_every_json_value_has_a_kind(words, value):
    assert kind_of(value) == words

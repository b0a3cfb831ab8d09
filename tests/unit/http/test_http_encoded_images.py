"""Pictures as base64."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from florence2.errors import RequestError
from serve.http.errors import TooLargeError
from serve.http.uploads import decode_image


@given(data=st.binary(min_size=1), prefix=st.sampled_from(["", "data:image/png;base64,"]))
def test_what_was_encoded_comes_back(data, prefix):
    assert decode_image(prefix + base64.b64encode(data).decode()) == data


ENCODED = base64.b64encode(b"12345").decode()  # MTIzNDU=

TOLERATED = {
    "line breaks": "MTIz\r\nNDU=\n",
    "no padding": "MTIzNDU",
    "a data URL with parameters": "data:image/png;name=a;base64," + ENCODED,
    "a data URL in capitals": "DATA:;BASE64," + ENCODED,
}


@pytest.mark.parametrize("encoded", TOLERATED.values(), ids=TOLERATED)
def test_small_deviations_are_tolerated(encoded):
    assert decode_image(encoded) == b"12345"


JUNK = {
    "nothing": "",
    "only padding": "====",
    "only a prefix": "data:image/png;base64,",
    "missing": None,
    "a number": 5,
    "bytes": b"MTIz",
    "a list": ["MTIz"],
    "other characters": "MT!zNDU=",
    "other scripts": "картинка",
    "a character too many": "MTIzN",
    "an address": "https://example.com/cat.png",
    "a data URL that is not base64": "data:image/svg+xml,<svg/>",
}


@pytest.mark.parametrize("encoded", JUNK.values(), ids=JUNK)
def test_junk_is_refused_in_one_sentence(encoded):
    with pytest.raises(RequestError) as refused:
        decode_image(encoded)
    assert str(refused.value).endswith(".")
    assert len(str(refused.value)) < 200


def test_the_limit_counts_decoded_bytes():
    assert decode_image(ENCODED, max_bytes=5) == b"12345"
    with pytest.raises(TooLargeError, match="at most 4 bytes, and 5 bytes were received"):
        decode_image(ENCODED, max_bytes=4)

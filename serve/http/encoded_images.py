"""Pictures that arrive as base64 text inside JSON."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final

from florence2.errors import RequestError
from serve.http.errors import TooLargeError
from serve.http.kinds import kind_of
from serve.http.limits import MAX_IMAGE_BYTES, readable_size

_DATA_URL: Final = re.compile(r"\s*data:[^,;]*(?:;[^,;]*)*;base64,", re.IGNORECASE)
_WHITESPACE: Final = {ord(character): None for character in " \t\r\n"}


def decode_image(encoded: object, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """The bytes of an image file sent as base64, with or without ``data:image/png;base64,``.

    Line breaks and missing padding are tolerated. Raises RequestError if it is not base64 and
    TooLargeError for more than ``max_bytes``; whether it is an image shows when it is opened.
    """
    if not isinstance(encoded, str):
        raise RequestError(
            "The image must be text in base64, and "
            f"{kind_of(encoded)} was received; encode the image file."
        )
    prefix = _DATA_URL.match(encoded)
    text = (encoded[prefix.end() :] if prefix else encoded).translate(_WHITESPACE).rstrip("=")
    if len(text) * 3 // 4 > max_bytes:
        raise TooLargeError(
            f"An encoded image can have at most {readable_size(max_bytes)}, and "
            f"{readable_size(len(text) * 3 // 4)} were received; make it smaller."
        )
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            f"The image must be in base64, and {text[:20]!r}... is not; encode the image file."
        ) from error
    if not data:
        raise RequestError("The encoded image is empty; encode the image file and send it again.")
    return data

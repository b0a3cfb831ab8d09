"""How much one request may send, in bytes and files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MIB: Final = 1024 * 1024

MAX_IMAGE_BYTES: Final = 64 * MIB
MAX_FILES: Final = 1000


@dataclass(frozen=True, slots=True)
class Limits:
    """``encoded_bytes`` is for the routes whose JSON carries a picture in base64.

    Base64 needs four bytes for three, so the default fits one picture of ``MAX_IMAGE_BYTES``.
    """

    json_bytes: int = 32 * MIB
    encoded_bytes: int = MAX_IMAGE_BYTES * 4 // 3 + MIB
    multipart_bytes: int = 512 * MIB


def readable_size(count_bytes: int) -> str:
    """The size as a person reads it: ``"32 MiB"``, ``"1.5 MiB"``, ``"200 bytes"``."""
    if count_bytes < MIB:
        return f"{count_bytes} bytes"
    return f"{round(count_bytes / MIB, 1):g} MiB"

"""How large a file that is sent may be, and how many bytes of them the process holds at a time."""

from __future__ import annotations

from functools import cache
from typing import Final

from florence2.budget import Budget, from_environment, memory_limit_bytes

MIB: Final = 1024 * 1024
MAX_IMAGE_BYTES: Final = 64 * MIB
MAX_FILES: Final = 1000
HELD_MIB_VARIABLE: Final = "FLORENCE_HELD_MIB"

_SHARE_OF_MEMORY: Final = 8


@cache
def held_bytes() -> Budget:
    """The process's budget: ``FLORENCE_HELD_MIB``, or else an eighth of the memory."""
    default = memory_limit_bytes() // _SHARE_OF_MEMORY
    return Budget(from_environment(HELD_MIB_VARIABLE, MIB, default), "bytes of images")


def readable_size(count_bytes: int) -> str:
    """The size as a person reads it: ``"32 MiB"``, ``"1.5 MiB"``, ``"200 bytes"``."""
    if count_bytes < MIB:
        return f"{count_bytes} bytes"
    return f"{round(count_bytes / MIB, 1):g} MiB"

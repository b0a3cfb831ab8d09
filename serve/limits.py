"""How large a file that is sent may be, how many bytes the process holds, how much may fail."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

from florence2.budget import Budget, from_environment, memory_limit_bytes
from florence2.errors import FlorenceError, RequestError, shown

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


# Fewer say nothing about the rest.
_FIRST_IMAGES: Final = 20


class TooManyFailuresError(FlorenceError):
    """More images of a run failed than it may lose."""

    code = "too_many_failures"


@dataclass(frozen=True, slots=True)
class FailureLimit:
    """How many images of a run may fail before it stops: ``most``, or a ``share`` of those tried.

    A share counts from the twentieth image on.
    """

    most: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, value: object) -> FailureLimit:
        """From ``"5%"`` or a number of images; None is no limit. Raises RequestError."""
        if value is None:
            return cls()
        text = str(value).strip()
        number = text.removesuffix("%").strip()
        if isinstance(value, str | int) and not isinstance(value, bool):
            if text.endswith("%") and _is_number(number) and 0 <= float(number) <= 100:
                return cls(share=float(number) / 100)
            if text.isdecimal() and text.isascii():
                return cls(most=int(text))
        raise RequestError(
            "How many images may fail is a number such as 100 or a share such as 5%, and "
            f"{shown(value)} was received; correct it or leave it out."
        )

    def check(self, num_failed: int, num_tried: int) -> None:
        """Raises TooManyFailuresError once more have failed."""
        is_over = self.most is not None and num_failed > self.most
        if self.share is not None and num_tried >= _FIRST_IMAGES:
            is_over = num_failed > self.share * num_tried
        if is_over:
            allowed = str(self.most) if self.share is None else f"{100 * self.share:.3g}%"
            raise TooManyFailuresError(
                f"{num_failed} of {num_tried} images failed, and {allowed} may; look at why, and "
                "go on with the rest or allow more."
            )


NO_LIMIT: Final = FailureLimit()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

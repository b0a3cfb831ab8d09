"""Until when a client waits for an answer."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from florence2.errors import RequestError

KEY = "timeout_s"


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment of the monotonic clock; None waits for as long as it takes."""

    at_s: float | None = None

    @classmethod
    def of(cls, state: Mapping[str, object]) -> Deadline:
        """The deadline that ``timeout_s`` of a request's state asks for, counted from now.

        Raises RequestError for what is no number of seconds.
        """
        seconds = state.get(KEY)
        if seconds is None:
            return cls()
        if (
            isinstance(seconds, int | float)
            and not isinstance(seconds, bool)
            and 0 < seconds < math.inf
        ):
            return cls(time.monotonic() + seconds)
        raise RequestError(
            f"{KEY} is a number of seconds above 0, and {str(seconds)[:60]!r} was received; "
            "correct it or leave it out."
        )

    @property
    def left_s(self) -> float | None:
        """Seconds until then, 0 when it has passed."""
        return None if self.at_s is None else max(0.0, self.at_s - time.monotonic())

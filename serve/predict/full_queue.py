"""Asking again while the model's queue, or the memory for images, is full."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from florence2.errors import FlorenceError

QUEUE_LIMIT_S: Final = 600.0
FULL_CODES: Final = frozenset({"no_room", "queue_full"})
MAX_RETRY_S: Final = 5.0
_STEP_S: Final = 0.1

Answer = TypeVar("Answer")


def when_queue_has_room(
    call: Callable[[], Answer], should_stop: Callable[[], bool], limit_s: float = QUEUE_LIMIT_S
) -> Answer:
    """What ``call`` returns, called again while the queue or the memory is full.

    The error of a full one after ``limit_s`` seconds of waiting, or once stopped, which ends the
    wait at once.
    """
    waited_s = 0.0
    while True:
        try:
            return call()
        except FlorenceError as error:
            if error.code not in FULL_CODES or waited_s >= limit_s or should_stop():
                raise
            pause_s = min(float(getattr(error, "retry_after_s", 1.0)), MAX_RETRY_S)
        steps = max(round(pause_s / _STEP_S), 1)
        pause_s = max(pause_s, _STEP_S)
        waited_s += pause_s
        for _ in range(steps):
            if should_stop():
                break
            time.sleep(pause_s / steps)

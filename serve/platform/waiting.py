"""Waiting that a run may have to do, and that stopping the run ends at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from florence2.budget import Hold
from florence2.errors import FlorenceError
from serve.http.held_bytes import held_bytes
from serve.platform.registry import AWAITED, InferenceRequest
from serve.sdk import sly

QUEUE_LIMIT_S: Final = 600.0
FULL_CODES: Final = frozenset({"no_room", "queue_full"})
MAX_RETRY_S: Final = 5.0
_STEP_S: Final = 0.1

Outcome = TypeVar("Outcome")


class PausedTooLongError(FlorenceError):
    """Nobody fetched results for so long that the run is given up."""

    code = "cancelled"


def wait_while_paused(request: InferenceRequest) -> None:
    """Returns once results were fetched, or the run was stopped.

    The SDK pauses a run at 500 results that wait to be fetched. PausedTooLongError after an hour.
    """
    if request.context.get(AWAITED) or not request.is_paused():
        return
    sly.logger.info("The run waits until its results are fetched.")
    while request.is_paused() and not request.is_stopped():
        if request.paused_for() > request.PAUSE_SLEEP_MAX_WAIT:
            raise PausedTooLongError(
                f"The run was given up, because nobody fetched its {request.pending_num()} "
                "results; fetch them while it goes on."
            )
        time.sleep(_STEP_S)


def room_for_downloads(request: InferenceRequest, *, is_bulk: bool) -> Callable[[int, float], Hold]:
    """Holds bytes of the process's budget for a run; none of it for a run that was stopped."""
    stopped = FlorenceError("The run was stopped.")
    stopped.code = "cancelled"

    def hold(num_bytes: int, wait_s: float) -> Hold:
        try:
            return held_bytes().hold(
                num_bytes,
                is_bulk=is_bulk,
                wait_s=wait_s,
                stop=lambda: stopped if request.is_stopped() else None,
            )
        except FlorenceError as error:
            if error is not stopped:
                raise
            # The run ends by itself before it uses what it gets.
            return Hold(held_bytes())

    return hold


def when_queue_has_room(
    call: Callable[[], Outcome], should_stop: Callable[[], bool], limit_s: float = QUEUE_LIMIT_S
) -> Outcome:
    """What ``call`` returns, called again while the queue or the memory is full.

    The error of a full one after ``limit_s`` seconds of waiting, or once stopped.
    """
    waited_s = 0.0
    while True:
        try:
            return call()
        except FlorenceError as error:
            if error.code not in FULL_CODES or waited_s >= limit_s or should_stop():
                raise
            pause_s = min(float(getattr(error, "retry_after_s", 1.0)), MAX_RETRY_S)
        waited_s += max(pause_s, _STEP_S)
        _sleep(max(pause_s, _STEP_S), should_stop)


def _sleep(seconds: float, should_stop: Callable[[], bool]) -> None:
    steps = max(round(seconds / _STEP_S), 1)
    for _ in range(steps):
        if should_stop():
            return
        time.sleep(seconds / steps)

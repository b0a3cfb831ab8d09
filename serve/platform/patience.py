"""Trying again what failed because the platform was busy, or was away for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import httpx
import requests

from florence2.errors import FlorenceError, GenerationCancelledError
from serve.platform.failures import failure_of
from serve.sdk import sly

# The SDK tries a call again by itself; these are for what it gave up.
_WAITS_S: Final = (0.5, 2.0, 6.0)
_PROBE_EVERY_S: Final = 5.0
_STEP_S: Final = 0.1
LIMIT_S: Final = 300.0
"""How long a run waits for a platform that is away, whatever the SDK has waited before."""

_PASSING_STATUSES: Final = frozenset({408, 425, 429, 499, 500, 502, 503, 504, 509, 598, 599})
_PASSING: Final = (
    requests.exceptions.ConnectionError,
    requests.exceptions.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
    requests.exceptions.RetryError,
    httpx.TimeoutException,
    httpx.NetworkError,
    httpx.ProtocolError,
)
_LASTING: Final = (requests.exceptions.SSLError, requests.exceptions.ProxyError)


class PlatformAwayError(FlorenceError):
    """The platform answers nothing, and did not for as long as a run waits for it."""

    code = "platform_failed"


def status_of(error: BaseException) -> int | None:
    """The status that an error of the platform came with, if it did."""
    if isinstance(error, requests.HTTPError | httpx.HTTPStatusError):
        return None if error.response is None else error.response.status_code
    return None


def is_passing(error: BaseException) -> bool:
    """Whether the same call may well be answered later: busy, broken off, no answer in time.

    Not so one that was refused for what it says or for who asks.
    """
    status = status_of(error)
    if status is not None:
        return status in _PASSING_STATUSES
    return isinstance(error, _PASSING) and not isinstance(error, _LASTING)


Result = TypeVar("Result")
Tried = Callable[[Callable[[], Any]], Any]
"""Does some work, and perhaps again."""


def at_once(work: Callable[[], Result]) -> Result:
    """As ``Patience.tried``, for who is waited for: whatever fails, fails."""
    return work()


class Patience:
    """How a run tries again. ``answers`` asks the platform anything, and raises like the SDK.

    A failure that may pass is tried again a few times; where it does not pass and the platform
    answers otherwise, it is about what was sent, and raised. A platform that answers nothing is
    waited for.
    """

    def __init__(self, answers: Callable[[], object], should_stop: Callable[[], bool]) -> None:
        self._answers = answers
        self._should_stop = should_stop

    def tried(self, work: Callable[[], Result]) -> Result:
        """What ``work`` gives; what it raised last, or PlatformAwayError.

        GenerationCancelledError where trying again would help and the run is stopped.
        """
        until = time.monotonic() + LIMIT_S
        waits_s = iter(_WAITS_S)
        while True:
            try:
                return work()
            except Exception as error:
                if not is_passing(error):
                    raise
                self._check_not_stopped(error)
                wait_s = next(waits_s, None)
                if wait_s is None or time.monotonic() > until:
                    if not self._was_away(until, error) or time.monotonic() > until:
                        self._check_not_stopped(error)
                        raise
                    waits_s, wait_s = iter(_WAITS_S), 0.0
                else:
                    sly.logger.warning(f"{error!r} Trying again in {wait_s:g} s.")
                self._wait(wait_s)
                self._check_not_stopped(error)

    def _check_not_stopped(self, error: Exception) -> None:
        """GenerationCancelledError; the caller would try each image alone after another error."""
        if self._should_stop():
            what = "The run was stopped, and its last call failed"
            raise GenerationCancelledError(failure_of(error, what).message) from error

    def _was_away(self, until: float, error: Exception) -> bool:
        """Whether the platform answers again after it did not; PlatformAwayError if it does not."""
        was_away = False
        while not self._should_stop():
            try:
                self._answers()
            except Exception as silence:  # noqa: BLE001 - the SDK and its transport raise anything
                if not is_passing(silence):
                    return was_away
            else:
                return was_away
            was_away = True
            if time.monotonic() > until:
                raise PlatformAwayError(
                    failure_of(error, "The platform did not come back").message
                ) from error
            self._wait(_PROBE_EVERY_S)
        return False

    def _wait(self, seconds: float) -> None:
        """For so long, or until the run is stopped."""
        for _ in range(round(seconds / _STEP_S)):
            if self._should_stop():
                return
            time.sleep(_STEP_S)

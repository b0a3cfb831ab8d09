"""What went wrong with which image, kept apart from results, and told at the end of a run."""

from __future__ import annotations

from typing import Final

import httpx
import requests

from florence2.errors import FlorenceError, RequestError
from florence2.records import Failure

# How the SDK begins the bare RuntimeError that it makes of an error of its transport, and the name
# of its own error for a transfer that broke off.
_SDK_REQUEST_FAILED: Final = "Request has failed. This may be due to connection problems"
_SDK_BROKE_OFF: Final = "RetryableRequestException"

# What was wrong with the platform, by the error of the transport; the first that fits.
_REASONS: Final[tuple[tuple[tuple[type[Exception], ...], str], ...]] = (
    ((requests.exceptions.SSLError,), "its certificate is not accepted here"),
    ((requests.exceptions.ProxyError, httpx.ProxyError), "the proxy before it cannot be passed"),
    ((requests.exceptions.Timeout, httpx.TimeoutException), "it did not answer in time"),
    (
        (
            requests.exceptions.ChunkedEncodingError,
            requests.exceptions.ContentDecodingError,
            httpx.ReadError,
            httpx.ProtocolError,
        ),
        "the connection broke off before all of its answer was there",
    ),
    ((requests.exceptions.ConnectionError, httpx.NetworkError), "it cannot be reached"),
    ((requests.exceptions.RetryError,), "it gave no usable answer, however often it was asked"),
    ((requests.exceptions.InvalidJSONError,), "its answer is no JSON"),
)


class FailedImageError(FlorenceError):
    """One failure as an error; its ``code`` is the failure's own."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.code = failure.code


class NotFoundError(RequestError):
    """What the request names is not there (any more), or this account may not see it."""

    code = "not_found"


class PartialFailureError(FlorenceError):
    """A run ended and some of its images are not done; the message says which and why."""

    code = "partial_failure"


def failure_json(failure: Failure) -> dict[str, str]:
    """``code`` and ``message``."""
    return {"code": failure.code, "message": failure.message}


def platform_failure(error: BaseException) -> Failure | None:
    """The failure of an error that the platform, or the way there, is the cause of.

    None for any other error. Only the SDK uses ``requests`` and ``httpx`` in this app, and only to
    talk to the platform.
    """
    reason = _reason_of(error)
    if reason is None:
        return None
    return Failure(
        "platform_failed",
        f"The platform did not give or take what this needs: {reason}; see that it is there for "
        "this app, and send it again.",
    )


def _reason_of(error: BaseException) -> str | None:
    if isinstance(error, requests.HTTPError | httpx.HTTPStatusError):
        return _status_reason(error)
    for kinds, reason in _REASONS:
        if isinstance(error, kinds):
            return reason
    is_transport = isinstance(error, requests.RequestException | httpx.HTTPError)
    is_transport |= type(error).__name__ == _SDK_BROKE_OFF
    is_transport |= isinstance(error, RuntimeError) and str(error).startswith(_SDK_REQUEST_FAILED)
    return f"the request failed ({type(error).__name__})" if is_transport else None


def _status_reason(error: requests.HTTPError | httpx.HTTPStatusError) -> str:
    status = None if error.response is None else error.response.status_code
    if status in (401, 403):
        return f"it refused the token or this account's rights (status {status})"
    return f"it answered with status {status or 'unknown'} ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""


_SEND_AGAIN: Final = "see the app's log and send it again"


def failure_of(
    error: BaseException, what: str, code: str | None = None, advice: str = _SEND_AGAIN
) -> Failure:
    """A failure from an error: its own sentence, or ``what`` failed, the error's first line and
    ``advice``."""
    if isinstance(error, FlorenceError):
        return Failure(code or error.code, str(error))
    reason = _reason_of(error)
    if reason is not None:
        return Failure(
            code or "platform_failed",
            f"{what}, as the platform failed: {reason}; {advice}.",
        )
    reason = ": ".join(filter(None, (type(error).__name__, _first_line(error))))
    return Failure(code or "internal_error", f"{what} ({reason}); {advice}.")

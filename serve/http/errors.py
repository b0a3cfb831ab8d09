"""What a failure looks like over HTTP: THE table of codes and statuses, and a body for each.

Everything that is not answered with 200 by a route of ours passes ``answer_to``.
"""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Mapping
from typing import Final

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from florence2.errors import FlorenceError, StoppedError
from serve.platform.failures import FailedImageError, NotFoundError, platform_failure

_log = logging.getLogger(__name__)

RETRY_AFTER_S: Final = 5.0
UNEXPECTED: Final = "internal_error"
_UNEXPECTED_MESSAGE: Final = (
    "The request could not be answered because of a fault in the app; see its log for the cause."
)

# Clients of the SDK send a request again after every 5xx, so 503 is only for what waiting cures:
# a picture that does not fit in memory never will, and a run that is done but for some images
# would be done again from the start.
STATUS_BY_CODE: Final[Mapping[str, int]] = {
    "bad_request": 400,
    "bad_image": 400,
    "bad_video": 400,
    "bad_region": 400,
    "bad_device": 400,
    "bad_checkpoint": 400,
    "forbidden": 403,
    "not_found": 404,
    "run_held": 409,
    "too_large": 413,
    "stalled": 408,
    "partial_failure": 422,
    "too_many_failures": 422,
    "not_finite": 422,
    "platform_failed": 424,
    "download_failed": 424,
    "upload_failed": 424,
    "bad_annotation": 424,
    "cancelled": 499,
    "not_deployed": 503,
    "device_lost": 503,
    "no_room": 503,
    "queue_full": 503,
    "deadline": 504,
    "out_of_memory": 507,
    "disk_full": 507,
}

_UNREADABLE_FORM: Final = "There was an error parsing the body"

# The beginning of what the SDK raises, as a bare RuntimeError, while no model is loaded.
_SDK_NOT_DEPLOYED: Final = "The model has not yet been deployed"
_KINDS: Final = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    type(None): "nothing",
}


class TooLargeError(FlorenceError):
    """A body, a file or a download is larger than the limits allow."""

    code = "too_large"


class StalledError(FlorenceError):
    """A client began to send a body and does not go on."""

    code = "stalled"


class ForbiddenError(FlorenceError):
    """Whoever started the app did not allow what the request asks for."""

    code = "forbidden"


class DiskFullError(FlorenceError):
    """What a request brings is kept in a file while it is read, and there is no room for it."""

    code = "disk_full"


_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_DISK_FULL_MESSAGE: Final = (
    "The disk of the app's machine is full, and what was sent is kept there while it is read; make "
    "room for temporary files and send it again."
)


def _is_disk_full(error: BaseException) -> bool:
    """Also where the framework made something else of it, such as a form that cannot be read."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            return True
        cause = cause.__cause__
    return False


def kind_of(value: object) -> str:
    """The kind of a JSON value for a message: ``"a list"``, ``"text"``, ``"nothing"``."""
    return _KINDS.get(type(value), "a number")


def status_of(code: str) -> int:
    """The HTTP status of a failure's code; 500 for a code that no rule names."""
    return STATUS_BY_CODE.get(code, 500)


def answer_to(error: Exception, path: str) -> JSONResponse:
    """The answer to a request that failed as a whole; a 503 says when to come back.

    What nobody foresaw is answered with a sentence, and its cause is only in the log.
    """
    if isinstance(error, RuntimeError) and str(error).startswith(_SDK_NOT_DEPLOYED):
        error = StoppedError("No model is loaded yet; deploy one and send the request again.")
    # What has a sentence of its own, such as a run that is done in part, keeps it.
    if not isinstance(error, FlorenceError) and _is_disk_full(error):
        _log.error("%s failed, as the disk is full", path, exc_info=error)
        error = DiskFullError(_DISK_FULL_MESSAGE)
    if (failure := platform_failure(error)) is not None:
        _log.warning("%s failed, as the platform did", path, exc_info=error)
        error = FailedImageError(failure)
    if not isinstance(error, FlorenceError):
        _log.error("%s failed", path, exc_info=error)
        return _response(500, UNEXPECTED, _UNEXPECTED_MESSAGE)
    status = status_of(error.code)
    if status == 500:
        _log.error("%s failed", path, exc_info=error)
    headers = {}
    if status == 503:
        wait_s = getattr(error, "retry_after_s", RETRY_AFTER_S)
        headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
    return _response(status, error.code, str(error), headers)


def answer_to_refusal(error: HTTPException, path: str, method: str) -> JSONResponse:
    """The answer to what the framework or the SDK refuses, in the form of our own."""
    if _is_disk_full(error):
        return answer_to(error, path)
    code = NotFoundError.code if error.status_code == 404 else "bad_request"
    message = error.detail
    if message == "Not Found":
        message = f"There is no {path[:100]} here; see GET / for what there is."
    elif message == "Method Not Allowed":
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{path} takes {allowed}, and {method} was received; send {allowed}."
    elif message == _UNREADABLE_FORM:
        message = "The form cannot be read; send it as multipart/form-data, such as curl -F does."
    return _response(error.status_code, code, message, error.headers)


def answer_to_invalid_form(error: RequestValidationError) -> JSONResponse:
    """One sentence for the first thing a form lacks or has wrong."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    if first["type"] == "missing":
        message = f"The request must have the field {field!r}, and it is missing; add it."
    else:
        said = first["msg"]
        message = (
            f"The field {field!r} of the request is not what it should be: "
            f"{said[:1].lower()}{said[1:]}; correct it."
        )
    return _response(400, "bad_request", message)


def _response(
    status: int, code: str, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The keys that the SDK's clients read, and the failure's code."""
    body = {"detail": message, "success": False, "message": message, "code": code}
    return JSONResponse(body, status_code=status, headers=headers)

"""What a failure looks like over HTTP: a status, and a body of the SDK's shape."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from fastapi import FastAPI, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from florence2.errors import FlorenceError
from florence2.records import Failure
from serve.http.routes import is_api_path, path_of
from serve.platform.failures import FailedImageError, NotFoundError, platform_failure

_log = logging.getLogger(__name__)

RETRY_AFTER_S: Final = 5.0
UNEXPECTED: Final = "internal_error"
UNEXPECTED_MESSAGE: Final = (
    "The request could not be answered because of a fault in the app; see its log for the cause."
)

# Clients of the SDK send a request again after every 5xx, so 503 is only for what waiting cures:
# a picture that does not fit in memory never will, and a run that is done but for some images
# would be done again from the start.
STATUS_BY_CODE: Final[Mapping[str, int]] = {
    "bad_request": 400,
    "bad_image": 400,
    "bad_region": 400,
    "bad_device": 400,
    "bad_checkpoint": 400,
    "forbidden": 403,
    "not_found": 404,
    "too_large": 413,
    "stalled": 408,
    "partial_failure": 422,
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
}

_UNREADABLE_FORM: Final = "There was an error parsing the body"

# The beginning of what the SDK raises, as a bare RuntimeError, while no model is loaded.
_SDK_NOT_DEPLOYED: Final = "The model has not yet been deployed"


class TooLargeError(FlorenceError):
    """A body, a file or a download is larger than the limits allow."""

    code = "too_large"


class ForbiddenError(FlorenceError):
    """Whoever started the app did not allow what the request asks for."""

    code = "forbidden"


class NotDeployedError(FlorenceError):
    """No model is loaded; the same request can succeed once one is."""

    code = "not_deployed"


def status_of(code: str) -> int:
    """The HTTP status of a failure's code; 500 for a code that no rule names."""
    return STATUS_BY_CODE.get(code, 500)


def error_body(error: FlorenceError | Failure) -> dict[str, object]:
    """The body of an error: the keys the SDK's clients read, and the failure's code."""
    return _body(error.code, error.message if isinstance(error, Failure) else str(error))


def error_response(error: FlorenceError | Failure) -> JSONResponse:
    """The answer to a request that failed as a whole; a 503 says when to come back."""
    status = status_of(error.code)
    headers = {}
    if status == 503:
        wait_s = getattr(error, "retry_after_s", RETRY_AFTER_S)
        headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
    return JSONResponse(error_body(error), status_code=status, headers=headers)


def unexpected_response() -> JSONResponse:
    """The answer when something failed that nobody foresaw; the cause is only in the log."""
    return JSONResponse(_body(UNEXPECTED, UNEXPECTED_MESSAGE), status_code=500)


def _body(code: str, message: str) -> dict[str, object]:
    return {"detail": message, "success": False, "message": message, "code": code}


def install_error_handlers(server: FastAPI, path_prefix: str = "") -> None:
    """Teach the SDK's server to answer our errors. Call it before ``Inference.serve()``.

    ``serve()`` adds the SDK's own middleware around what is there, and that middleware answers
    every exception with its ``repr``; ours has to stand inside of it to be asked first.
    ``path_prefix`` is the SDK's ``SUPERVISELY_SERVER_PATH_PREFIX``.
    """
    server.add_exception_handler(FlorenceError, _on_florence_error)
    server.add_exception_handler(RequestValidationError, _on_invalid_form)
    server.add_exception_handler(HTTPException, _on_refusal(path_prefix))
    server.add_middleware(UnexpectedErrors, path_prefix=path_prefix)


async def _on_florence_error(request: Request, error: Exception) -> JSONResponse:
    return _response_to(error, request.url.path)


def _on_refusal(path_prefix: str) -> Callable[[Request, Exception], Awaitable[Response]]:
    """What the framework or the SDK refuses; pages and widgets keep the framework's answer."""

    async def answer(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        path = path_of(request.scope, path_prefix)
        if not is_api_path(path) or error.status_code >= 500 or not isinstance(error.detail, str):
            return await http_exception_handler(request, error)
        code = NotFoundError.code if error.status_code == 404 else "bad_request"
        message = _refusal_message(error, path, request.method)
        return JSONResponse(_body(code, message), error.status_code, headers=error.headers)

    return answer


def _refusal_message(error: HTTPException, path: str, method: str) -> str:
    if error.detail == "Not Found":
        return f"There is no {path[:100]} here; see GET / for what there is."
    if error.detail == "Method Not Allowed":
        allowed = (error.headers or {}).get("Allow", "another method")
        return f"{path} takes {allowed}, and {method} was received; send {allowed}."
    if error.detail == _UNREADABLE_FORM:
        return "The form cannot be read; send it as multipart/form-data, such as curl -F does."
    return error.detail


async def _on_invalid_form(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    return JSONResponse(_body("bad_request", invalid_form_message(error)), status_code=400)


def invalid_form_message(error: RequestValidationError) -> str:
    """One sentence for the first thing a form lacks or has wrong."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    if first["type"] == "missing":
        return f"The request must have the field {field!r}, and it is missing; add it."
    return (
        f"The field {field!r} of the request is not what it should be: "
        f"{first['msg'][:1].lower()}{first['msg'][1:]}; correct it."
    )


class UnexpectedErrors:
    """Answers what a route of the API did not foresee; pages and widgets keep the SDK's dialog.

    A route of the API has one segment, and a widget's has its id before the event's name.
    """

    def __init__(self, app: ASGIApp, path_prefix: str = "") -> None:
        self._app = app
        self._path_prefix = path_prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_api_path(path_of(scope, self._path_prefix)):
            await self._app(scope, receive, send)
            return
        await answer_faults(self._app, scope, receive, send)


async def answer_faults(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run ``app``; what it raises becomes an answer, or is raised if one was already begun."""
    started = False

    async def watch(message: Message) -> None:
        nonlocal started
        started = started or message["type"] == "http.response.start"
        await send(message)

    try:
        await app(scope, receive, watch)
    # Whatever a route raises, the client gets a status it can act on and the log the trace.
    except Exception as error:
        if started:
            raise
        await _response_to(error, scope["path"])(scope, receive, send)


def _response_to(error: Exception, path: str) -> JSONResponse:
    if isinstance(error, RuntimeError) and str(error).startswith(_SDK_NOT_DEPLOYED):
        error = NotDeployedError("No model is loaded yet; deploy one and send the request again.")
    if (failure := platform_failure(error)) is not None:
        _log.warning("%s failed, as the platform did", path, exc_info=error)
        error = FailedImageError(failure)
    answer = error_response(error) if isinstance(error, FlorenceError) else unexpected_response()
    if answer.status_code == 500:
        _log.error("%s failed", path, exc_info=error)
    return answer

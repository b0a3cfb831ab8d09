"""The outermost layer of the server: what is wrong with a request is said before the SDK fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from florence2.errors import RequestError
from serve.http.bodies import header_of, read_body, replay, run_counted, with_json
from serve.http.envelope import KnownRequest, checked_json
from serve.http.errors import ForbiddenError, NotFoundError, answer_faults
from serve.http.held_bytes import Uploads
from serve.http.leaving import NoticesLeaving
from serve.http.limits import Limits
from serve.http.origins import Callers
from serve.http.routes import (
    NEVER_SERVED,
    NOT_SERVED_LOCALLY,
    ROUTE_BY_PATH,
    Body,
    Route,
    is_api_path,
    path_of,
)
from serve.http.servers import Servers

CountRequest = Callable[[str, int, float], None]

OTHER: Final = "other"

# What web servers write down for a client that left before it got an answer.
_CLIENT_LEFT: Final = 499

_JSON: Final = "application/json"
_FORM: Final = "multipart/form-data"
_POLICY_VIOLATION: Final = 1008


class Guard:
    """Wraps the SDK's Application; everything but the call itself is the Application's.

    ``known_request`` tells whether a running request has an id, and must not block. ``callers``
    are those of an app that no platform's log-in stands before, and None for a session of the
    platform. ``servers`` may be named by requests. ``count_request`` gets
    every answered request: the route of the table or ``"other"``, status, seconds.
    ``path_prefix`` is the SDK's ``SUPERVISELY_SERVER_PATH_PREFIX``. ``uploads`` counts the bodies
    of all requests.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        known_request: KnownRequest,
        callers: Callers | None,
        servers: Servers,
        *,
        count_request: CountRequest | None = None,
        path_prefix: str = "",
        uploads: Uploads | None = None,
    ) -> None:
        self._uploads = uploads
        self._app = app
        self._inner = NoticesLeaving(app)
        self._limits = limits
        self._known_request = known_request
        self._callers = callers
        self._servers = servers
        is_local = callers is not None and not servers.is_session
        self._not_served = NEVER_SERVED | NOT_SERVED_LOCALLY if is_local else NEVER_SERVED
        self._count_request = count_request
        self._path_prefix = path_prefix

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._app, name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and not self._may_connect(scope):
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
            return
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        started_s = time.perf_counter()
        status = _CLIENT_LEFT

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await answer_faults(self._answer_counted, scope, receive, watch)
        finally:
            if self._count_request is not None:
                label = self._label(scope)
                self._count_request(label, status, time.perf_counter() - started_s)

    def _may_connect(self, scope: Scope) -> bool:
        try:
            if self._callers is not None:
                self._callers.check(scope, path_of(scope, self._path_prefix))
        except ForbiddenError:
            return False
        return True

    def _label(self, scope: Scope) -> str:
        path = path_of(scope, self._path_prefix)
        return path if path in ROUTE_BY_PATH else OTHER

    async def _answer_counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._uploads is None:
            await self._answer(scope, receive, send)
            return
        body = self._uploads.begin(scope, receive)
        try:
            await self._answer(body.scope, body.receive, send)
        finally:
            await body.end()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = path_of(scope, self._path_prefix)
        if self._callers is not None:
            self._callers.check(scope, path)
        if path in self._not_served:
            raise NotFoundError(f"There is no {path} here; see GET / for what there is.")
        route = ROUTE_BY_PATH.get(path)
        content_type = header_of(scope, b"content-type").lower()
        media_type = content_type.partition(";")[0].strip()
        is_json, is_form = media_type == _JSON, media_type == _FORM
        # The SDK takes any mention of it for JSON, wherever it stands in the header.
        if _JSON in content_type and not is_json:
            raise RequestError(
                f"JSON has Content-Type application/json, and {content_type[:100]} was received; "
                "correct it."
            )
        if route is not None and scope["method"] == "POST":
            _check_content_type(route, content_type, is_json, is_form)
        if is_json:
            await self._answer_json(path, route, scope, receive, send)
            return
        max_bytes = self._limits.multipart_bytes if is_form else self._limits.json_bytes
        await run_counted(self._inner, scope, receive, send, max_bytes)

    async def _answer_json(
        self, path: str, route: Route | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        has_picture = route is not None and route.has_picture
        max_bytes = self._limits.encoded_bytes if has_picture else self._limits.json_bytes
        raw = await read_body(scope, receive, max_bytes)
        if raw is None:
            return
        body = checked_json(raw, route, is_api_path(path), self._known_request, self._servers)
        await self._inner(with_json(scope, len(body)), replay(body, receive), send)


def _check_content_type(route: Route, received: str, is_json: bool, is_form: bool) -> None:
    if route.body is Body.STATE and not is_json:
        wanted = "JSON: set Content-Type to application/json"
    elif route.body is Body.FORM and not is_form:
        wanted = "a multipart form with the field 'files': set Content-Type to multipart/form-data"
    else:
        return
    raise RequestError(
        f"{route.path} takes {wanted}; {received[:100] or 'no Content-Type'} was received."
    )

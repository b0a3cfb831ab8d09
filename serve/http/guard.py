"""The outermost layer of the server: what is wrong with a request is said before the SDK fails."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from florence2.errors import RequestError
from serve.http.bodies import (
    Limits,
    Uploads,
    header_of,
    kind_of,
    read_body,
    replay,
    run_counted,
    with_json,
)
from serve.http.errors import ForbiddenError, answer_faults
from serve.http.origins import Callers, Servers
from serve.http.routes import (
    NEVER_SERVED,
    NOT_SERVED_LOCALLY,
    ROUTE_BY_PATH,
    Body,
    RequestId,
    Route,
    is_api_path,
    path_of,
)
from serve.http.waiting import NoticesLeaving
from serve.platform.failures import NotFoundError

KnownRequest = Callable[[str], bool]

_OBJECTS: Final = ("context", "state")
_TEXTS: Final = ("api_token", "server_address")


def checked_json(
    raw: bytes, route: Route | None, is_api: bool, known: KnownRequest, servers: Servers
) -> bytes:
    """The body to hand on: ``raw`` itself wherever it is fine as it is.

    ``route`` is None for a path that is not in the table, and ``is_api`` is False for pages and
    widgets. Raises RequestError, NotFoundError for a running request that ``known`` denies, and
    ForbiddenError for a server that is not one of ``servers``.
    """
    content = _parse(raw, needs_state=route is not None and route.body is Body.STATE)
    before = dict(content)
    _check_types(content)
    if route is not None and route.body is Body.STATE:
        _check_state(content, route, known)
    servers.settle(content)
    if is_api:
        _mark_outside(content)
    return raw if content == before and raw.strip() else json.dumps(content).encode()


def _parse(raw: bytes, needs_state: bool) -> dict[str, Any]:
    if not raw.strip() and not needs_state:
        return {}
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"The body must be JSON, and it cannot be read ({_short(error)}); correct it."
        ) from error
    if not isinstance(content, dict):
        raise RequestError(
            "The body must be a JSON object, and "
            f'{kind_of(content)} was received; send an object such as {{"state": {{}}}}.'
        )
    return content


def _short(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    return "it is not text in UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _check_types(content: dict[str, Any]) -> None:
    for key in _OBJECTS:
        if content.get(key) is None:
            content.pop(key, None)
        elif not isinstance(content[key], dict):
            raise RequestError(
                f"'{key}' of the body must be an object, and {kind_of(content[key])} was received; "
                "correct it."
            )
    named = {key: content.get(key) for key in _TEXTS}
    named["context.apiToken"] = content.get("context", {}).get("apiToken")
    for key, value in named.items():
        if value is not None and not isinstance(value, str):
            raise RequestError(
                f"'{key}' of the body must be text, and {kind_of(value)} was received; correct it."
            )


def _check_state(content: dict[str, Any], route: Route, known: KnownRequest) -> None:
    if "state" not in content:
        raise RequestError(
            f"{route.path} reads the object 'state' of the body, and there is none; add it."
        )
    if route.request_id is RequestId.NONE:
        return
    uuid = content["state"].get("inference_request_uuid")
    if not isinstance(uuid, str) or not uuid:
        raise RequestError(
            "'inference_request_uuid' is required in 'state': the id that the request was "
            f"answered with when it was started, and {kind_of(uuid)} was received; add it."
        )
    if route.request_id is RequestId.KNOWN and not known(uuid):
        raise NotFoundError(
            f"There is no request {uuid[:64]!r} (any more): requests are forgotten once cleared "
            "or an hour unused; start it again."
        )


def _mark_outside(content: dict[str, Any]) -> None:
    """Keeps the SDK from writing the ``state`` of a call into the state of the open GUI."""
    context = content.get("context", {})
    if context.get("outside_request") is not True:
        content["context"] = {**context, "outside_request": True}


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

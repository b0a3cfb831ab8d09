"""The JSON body of a request, checked before the SDK's middleware reads it.

That middleware takes ``context``, ``state``, ``api_token`` and ``server_address`` out of every
JSON body and fails on anything but an object.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from florence2.errors import RequestError
from serve.http.errors import NotFoundError
from serve.http.kinds import kind_of
from serve.http.routes import Body, RequestId, Route
from serve.http.servers import Servers

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

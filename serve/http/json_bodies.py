"""JSON bodies: what they must be before the SDK reads them, and which platforms they may name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from florence2.errors import RequestError
from serve.http.errors import ForbiddenError, kind_of
from serve.http.routes import RequestId, Route, Takes
from serve.platform.failures import NotFoundError

KnownRequest = Callable[[str], bool]

_OBJECTS: Final = ("context", "state")
_TEXTS: Final = ("api_token", "server_address")
ALLOW_SERVERS_VARIABLE: Final = "FLORENCE_ALLOW_SERVERS"

_KEY: Final = "server_address"
_PLATFORM_PORTS: Final = {"http": 80, "https": 443}


def entries_of(text: str | None) -> list[str]:
    """The entries of a variable's text, parted by commas or spaces."""
    return [entry for entry in re.split(r"[,\s]+", text or "") if entry]


@dataclass(frozen=True, slots=True)
class Servers:
    """``own``: the platform of the environment. ``allowed``: the others, by what is compared.

    ``is_session``: the app is a session of ``own``, which alone can send it requests.
    """

    own: str | None = None
    allowed: Mapping[str, str] = field(default_factory=dict)
    is_session: bool = False

    @classmethod
    def of(cls, own: str | None, allowed: Iterable[str] = ()) -> Servers:
        """RequestError where ``allowed`` holds what is no address of a server."""
        return cls(own or None, {_place_or_refused(one): one.strip() for one in allowed})

    @classmethod
    def from_environment(cls, allowed: Iterable[str] = ()) -> Servers:
        """Of an app without a platform before it: with those of ``FLORENCE_ALLOW_SERVERS``."""
        named = entries_of(os.environ.get(ALLOW_SERVERS_VARIABLE))
        return cls.of(os.environ.get("SERVER_ADDRESS"), [*allowed, *named])

    def settle(self, content: dict[str, Any]) -> None:
        """Makes the body name no other server than one that may be named, as it was set up.

        Without a name the SDK takes that of the environment. Raises ForbiddenError for a server
        that is not allowed, and RequestError for another one without a token for it.
        """
        named = content.pop(_KEY, None)
        if not named or self.is_session:
            return
        place = _place_of(named)
        if self.own is not None and place is not None and place == _place_of(self.own):
            return
        address = self.allowed.get(place or "")
        if address is None:
            raise ForbiddenError(self._refusal(named))
        if not (content.get("api_token") or (content.get("context") or {}).get("apiToken")):
            raise RequestError(
                f"Images of {address} need a token for it, and none came with the request; send "
                "api_token."
            )
        content[_KEY] = address

    def _refusal(self, named: str) -> str:
        if self.own is None:
            rule = "This app talks to no platform unless it was told to"
        else:
            rule = "This app talks to the platform that it was started with"
        return (
            f"{rule}, and server_address {named[:100]!r} was received; leave it out, or have the "
            f"app started with that address in --allow-server or {ALLOW_SERVERS_VARIABLE}."
        )


def _place_of(address: str) -> str | None:
    """Host and port of an address, in one spelling; None for what has something else in it.

    http and https of one host are one server: the SDK itself goes from the one to the other.
    """
    text = address.strip().rstrip("/")
    if "://" not in text:
        text = f"http://{text}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    rest = (parts.path, parts.query, parts.fragment, parts.username, parts.password)
    if parts.scheme not in _PLATFORM_PORTS or not host or any(rest) or "\\" in text:
        return None
    port = None if port == _PLATFORM_PORTS[parts.scheme] else port
    return f"{host.rstrip('.')}:{port or ''}"


def _place_or_refused(address: str) -> str:
    place = _place_of(address)
    if place is None:
        raise RequestError(
            f"A server that is allowed is an address such as https://app.example.org, and "
            f"{address[:100]!r} was received; correct it."
        )
    return place


def checked_json(
    raw: bytes, route: Route | None, is_api: bool, known: KnownRequest, servers: Servers
) -> bytes:
    """The body to hand on: ``raw`` itself wherever it is fine as it is.

    ``route`` is None for a path that is not in the table, and ``is_api`` is False for pages and
    widgets. Raises RequestError, NotFoundError for a running request that ``known`` denies, and
    ForbiddenError for a server that is not one of ``servers``.
    """
    takes_state = route is not None and route.takes is Takes.STATE
    content = _parse(raw, needs_state=takes_state)
    before = dict(content)
    _check_types(content)
    if route is not None and takes_state:
        _check_state(content, route, known)
    servers.settle(content)
    if is_api:
        # Keeps the SDK from writing the state of a call into the state of the open GUI.
        context = content.get("context", {})
        if context.get("outside_request") is not True:
            content["context"] = {**context, "outside_request": True}
    return raw if content == before and raw.strip() else json.dumps(content).encode()


def _parse(raw: bytes, needs_state: bool) -> dict[str, Any]:
    if not raw.strip() and not needs_state:
        return {}
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"The body must be JSON, and it cannot be read ({_reason(error)}); correct it."
        ) from error
    if not isinstance(content, dict):
        raise RequestError(
            "The body must be a JSON object, and "
            f'{kind_of(content)} was received; send an object such as {{"state": {{}}}}.'
        )
    return content


def _reason(error: Exception) -> str:
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

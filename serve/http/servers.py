"""Which platforms a request may have the app talk to.

The SDK connects to whatever ``server_address`` a body names, and takes the token of the body there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from florence2.errors import RequestError
from serve.http.errors import ForbiddenError
from serve.http.origins import entries_of

ALLOW_SERVERS_VARIABLE: Final = "FLORENCE_ALLOW_SERVERS"

_KEY: Final = "server_address"
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


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
    if parts.scheme not in _DEFAULT_PORTS or not host or any(rest) or "\\" in text:
        return None
    port = None if port == _DEFAULT_PORTS[parts.scheme] else port
    return f"{host.rstrip('.')}:{port or ''}"


def _place_or_refused(address: str) -> str:
    place = _place_of(address)
    if place is None:
        raise RequestError(
            f"A server that is allowed is an address such as https://app.example.org, and "
            f"{address[:100]!r} was received; correct it."
        )
    return place

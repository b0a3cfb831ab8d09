"""Which requests a server without a log-in answers, and which platforms they may name."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.types import Scope

from florence2.errors import RequestError
from serve.http.errors import ForbiddenError

ALLOW_HOSTS_VARIABLE: Final = "FLORENCE_ALLOW_HOSTS"

_AUTHORITY: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?", re.IGNORECASE)
_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}
_FOREIGN_SITES: Final = frozenset({"cross-site", "same-site"})
# A link to the page is no harm: it is opened for a person to see, and does nothing by itself.
_LINKED_PATH: Final = "/"
_SHOWN_CHARACTERS: Final = 100


@dataclass(frozen=True, slots=True)
class Callers:
    """The names that the server goes by, besides loopback ones.

    ``names`` were given by whoever started it; pages of these are its own, too, as a proxy may
    stand before it. ``machine_names`` are what it found out itself. ``any_address`` answers to
    every numeric address: a page of others has a name, and never a number, in its ``Host``.
    """

    names: frozenset[str] = frozenset()
    machine_names: frozenset[str] = frozenset()
    any_address: bool = False

    @classmethod
    def of(cls, listens_on: str, names: Iterable[str] = ()) -> Callers:
        """For a server that listens on ``listens_on``; RequestError for what is no name."""
        allowed = frozenset(_checked_name(name) for name in names)
        if not is_everywhere(listens_on):
            own = _authority(f"[{listens_on}]" if ":" in listens_on else listens_on)
            return cls(allowed, frozenset([own[0]] if own else []))
        machine = socket.gethostname().lower().rstrip(".")
        return cls(allowed, frozenset({machine, f"{machine.split('.')[0]}.local"}), True)

    @classmethod
    def from_environment(cls, listens_on: str, names: Iterable[str] = ()) -> Callers:
        """With the names of ``FLORENCE_ALLOW_HOSTS`` besides ``names``."""
        return cls.of(listens_on, [*names, *entries_of(os.environ.get(ALLOW_HOSTS_VARIABLE))])

    def check(self, scope: Scope, path: str) -> None:
        """ForbiddenError for a request or a websocket that a web page of others has sent."""
        host = self._checked_host(_values(scope, b"host"))
        if self._has_own_origin(_values(scope, b"origin"), host):
            # A page on a host that was allowed may be another site, as the browser sees it.
            return
        site = _values(scope, b"sec-fetch-site")
        if _FOREIGN_SITES.intersection(site) and not _is_followed_link(scope, path):
            raise _foreign(f"one on another site ({site[0]})")

    def _checked_host(self, values: list[str]) -> tuple[str, str] | None:
        """The name and the port of ``Host``, which no browser leaves out."""
        if not values:
            return None
        host = _authority(values[0]) if len(values) == 1 else None
        if host is None or not self._answers_to(host[0]):
            raise ForbiddenError(
                "This server answers under its own names only, and the request is for "
                f"{_shown(values)}; use localhost, or have it started with that name in "
                f"--allow-host or {ALLOW_HOSTS_VARIABLE}."
            )
        return host

    def _answers_to(self, name: str) -> bool:
        if name in self.names or name in self.machine_names or name == "localhost":
            return True
        address = _address(name)
        # The SDK's client of an app in the same program asks 0.0.0.0, which is this machine too.
        is_here = address is not None and (address.is_loopback or address.is_unspecified)
        return is_here or (address is not None and self.any_address)

    def _has_own_origin(self, values: list[str], host: tuple[str, str] | None) -> bool:
        """Whether a page of its own is named; ForbiddenError where one of others is."""
        if not values:
            return False
        scheme, _, rest = values[0].lower().partition("://")
        origin = _authority(rest) if len(values) == 1 and scheme in _DEFAULT_PORTS else None
        if origin is None:
            raise _foreign(_shown(values))
        default = _DEFAULT_PORTS[scheme]
        is_own = host is not None and (origin[0], origin[1] or default) == (
            host[0],
            host[1] or default,
        )
        if not is_own and origin[0] not in self.names:
            raise _foreign(_shown(values))
        return True


def is_everywhere(host: str) -> bool:
    """Whether who listens on ``host`` listens on every address of the machine."""
    address = _address(host)
    return not host or (address is not None and address.is_unspecified)


def entries_of(text: str | None) -> list[str]:
    """The entries of a variable's text, parted by commas or spaces."""
    return [entry for entry in re.split(r"[,\s]+", text or "") if entry]


def _checked_name(name: str) -> str:
    found = _authority(f"[{name}]" if _address(name) is not None and ":" in name else name)
    if found is None or found[1]:
        raise RequestError(
            f"A host that is allowed is a name or an address alone, and {name[:100]!r} was "
            "received; write for example label.example.org."
        )
    return found[0]


def _authority(text: str) -> tuple[str, str] | None:
    """Name and port, in one spelling: lower case, no final dot, addresses as Python has them."""
    found = _AUTHORITY.fullmatch(text)
    if found is None:
        return None
    name = found[1].lower().removesuffix(".")
    address = _address(name.strip("[]"))
    if name.startswith("[") and address is None:
        return None
    return str(address) if address is not None else name, found[2] or ""


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _is_followed_link(scope: Scope, path: str) -> bool:
    return (
        scope.get("method") in ("GET", "HEAD")
        and path == _LINKED_PATH
        and _values(scope, b"sec-fetch-mode") == ["navigate"]
        and _values(scope, b"sec-fetch-dest") == ["document"]
    )


def _values(scope: Scope, name: bytes) -> list[str]:
    return [
        value.decode("latin-1").strip() for key, value in scope["headers"] if key.lower() == name
    ]


def _shown(values: list[str]) -> str:
    return repr(", ".join(values)[:_SHOWN_CHARACTERS])


def _foreign(page: str) -> ForbiddenError:
    return ForbiddenError(
        f"This server answers programs and its own page only, and a web page, {page}, sent this; "
        f"have the page's host named in --allow-host or {ALLOW_HOSTS_VARIABLE} if it is yours."
    )


ALLOW_SERVERS_VARIABLE: Final = "FLORENCE_ALLOW_SERVERS"

_KEY: Final = "server_address"
_PLATFORM_PORTS: Final = {"http": 80, "https": 443}


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

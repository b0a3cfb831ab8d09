"""Images fetched from an address that somebody else chose, and where it may lead."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import httpx2

from florence2.errors import RequestError, shown_s
from serve.http.errors import TooLargeError, kind_of
from serve.limits import MAX_IMAGE_BYTES, readable_size

Resolve = Callable[[str, int], Sequence[str]]

# What networks without IPv4 answer for a host that has nothing else: the last four bytes are it.
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")

# All that is given out for the internet at large; Python's own list changes with its versions.
_GLOBAL_IPV6: Final = ipaddress.IPv6Network("2000::/3")
# Special ones that some versions of Python take for public: protocols (a cloud's metadata among
# them), relays, documentation.
_SPECIAL: Final = tuple(
    ipaddress.ip_network(network) for network in ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20")
)


def resolve_host(host: str, port: int) -> list[str]:
    """The numeric addresses of a host, the best first; any spelling of a number is one too.

    Raises OSError if there are none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def checked_addresses(host: str, port: int, resolve: Resolve, allow_private: bool) -> Sequence[str]:
    """The addresses of a host, all of them public unless ``allow_private``.

    One that is not public makes the host refused as a whole: its name may be somebody's try to
    have this server fetch from its own network. Raises RequestError.
    """
    try:
        addresses = resolve(host, port)
    except (OSError, UnicodeError) as error:
        raise RequestError(
            f"The host {host!r} of the image's address cannot be found; check the address."
        ) from error
    if not addresses:
        raise RequestError(f"The host {host!r} of the image's address has no address; check it.")
    if not allow_private and not all(is_public(address) for address in addresses):
        raise RequestError(
            f"Images are fetched from public addresses only, and {host!r} is not one; upload the "
            "image, or have an administrator set FLORENCE_ALLOW_PRIVATE_URLS=1."
        )
    return addresses


def is_public(address: str) -> bool:
    """Whether a numeric address is one of the public internet.

    An IPv6 address that stands for an IPv4 one is judged by that.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.sixtofour is not None:
            return False
        parsed = _embedded(parsed) or parsed
    if isinstance(parsed, ipaddress.IPv6Address) and parsed not in _GLOBAL_IPV6:
        return False
    is_special = parsed.is_multicast or parsed.is_reserved
    is_special |= any(parsed in network for network in _SPECIAL)
    return parsed.is_global and not is_special


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped


ALLOW_PRIVATE_VARIABLE: Final = "FLORENCE_ALLOW_PRIVATE_URLS"

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_SHOWN_CHARACTERS: Final = 120
_HEADERS: Final = {
    "Accept": "image/*, */*;q=0.5",
    # The size limit counts what arrives; compressed, that could be a thousandth of the image.
    "Accept-Encoding": "identity",
    "User-Agent": "serve-florence-2",
}


@dataclass(frozen=True, slots=True)
class UrlLimits:
    """What a download may take. ``total_s`` counts everything, redirects included."""

    connect_s: float = 5.0
    total_s: float = 20.0
    max_bytes: int = MAX_IMAGE_BYTES
    max_redirects: int = 3
    allow_private: bool = False

    @classmethod
    def from_environment(cls) -> UrlLimits:
        """The defaults; ``FLORENCE_ALLOW_PRIVATE_URLS=1`` is for networks without internet."""
        chosen = os.environ.get(ALLOW_PRIVATE_VARIABLE, "").strip().lower()
        return cls(allow_private=chosen in ("1", "on", "yes", "true"))


def fetch_image(
    url: object, limits: UrlLimits | None = None, resolve: Resolve = resolve_host
) -> bytes:
    """The bytes behind an http or https address; blocks. Proxies are not used.

    ``limits`` default to those of the environment. Raises RequestError if the address is
    refused or does not answer with a file, TooLargeError for too large a one; whether the bytes
    are an image shows when they are opened.
    """
    return asyncio.run(_fetch_in_time(url, limits or UrlLimits.from_environment(), resolve))


async def _fetch_in_time(url: object, limits: UrlLimits, resolve: Resolve) -> bytes:
    try:
        async with asyncio.timeout(limits.total_s):
            return await _follow(_parse(url), limits, resolve)
    except (TimeoutError, httpx2.TimeoutException) as error:
        raise RequestError(
            f"{_shown(url)} did not answer within {shown_s(limits.total_s)}; upload the image "
            "instead."
        ) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        reason = str(error) or type(error).__name__
        raise RequestError(f"{_shown(url)} cannot be fetched: {reason}.") from error


def _parse(url: object) -> httpx2.URL:
    if not isinstance(url, str):
        raise RequestError(
            f"The address of an image must be text, and {kind_of(url)} was received; correct it."
        )
    try:
        parsed = httpx2.URL(url.strip())
    except httpx2.InvalidURL as error:
        raise RequestError(
            f"The address of an image must be valid, and {_shown(url)} is not ({error})."
        ) from error
    if parsed.scheme not in _DEFAULT_PORTS:
        raise RequestError(
            f"Images are fetched by http and https only, and {_shown(url)} was received; "
            "upload the image instead."
        )
    if not parsed.raw_host or not 0 < _port_of(parsed) < 65536:
        raise RequestError(
            f"The address of an image must name a host and a port, and {_shown(url)} does not."
        )
    if parsed.userinfo:
        raise RequestError(
            "The address of an image must not hold a user name or password; upload the image "
            "instead."
        )
    return parsed


def _port_of(url: httpx2.URL) -> int:
    return _DEFAULT_PORTS[url.scheme] if url.port is None else url.port


async def _follow(url: httpx2.URL, limits: UrlLimits, resolve: Resolve) -> bytes:
    for _ in range(limits.max_redirects + 1):
        answer = await _visit(url, limits, resolve)
        if isinstance(answer, bytes):
            return answer
        url = answer
    raise RequestError(
        f"{_shown(url)} was redirected to more than {limits.max_redirects} times; give the "
        "image's own address."
    )


async def _visit(url: httpx2.URL, limits: UrlLimits, resolve: Resolve) -> bytes | httpx2.URL:
    """The file, or where else it is said to be."""
    host = url.raw_host.decode("ascii")
    addresses = await asyncio.to_thread(
        checked_addresses, host, _port_of(url), resolve, limits.allow_private
    )
    timeout = httpx2.Timeout(limits.total_s, connect=limits.connect_s)
    async with httpx2.AsyncClient(trust_env=False, timeout=timeout, headers=_HEADERS) as client:
        response = await _connect(client, url, addresses)
        try:
            return await _read(response, url, limits.max_bytes)
        finally:
            await response.aclose()


async def _connect(
    client: httpx2.AsyncClient, url: httpx2.URL, addresses: Sequence[str]
) -> httpx2.Response:
    """The response of the first address that can be connected to."""
    for address in addresses[:-1]:
        try:
            return await _send(client, url, address)
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            continue
    return await _send(client, url, addresses[-1])


async def _send(client: httpx2.AsyncClient, url: httpx2.URL, address: str) -> httpx2.Response:
    request = client.build_request(
        "GET",
        url.copy_with(host=address),
        headers={"Host": url.netloc.decode("ascii")},
        # The certificate must be the name's, though the connection is to the number.
        extensions={"sni_hostname": url.raw_host.decode("ascii")},
    )
    return await client.send(request, stream=True)


async def _read(response: httpx2.Response, url: httpx2.URL, max_bytes: int) -> bytes | httpx2.URL:
    if response.status_code in (301, 302, 303, 307, 308) and "location" in response.headers:
        return _parse(str(url.join(response.headers["location"])))
    if response.status_code != httpx2.codes.OK:
        raise RequestError(
            f"{_shown(url)} answered with status {response.status_code}; check the address."
        )
    parts: list[bytes] = []
    size = 0
    async for part in response.aiter_raw():
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            raise TooLargeError(
                f"A file can have at most {readable_size(max_bytes)}, and {_shown(url)} has "
                "more; make the image smaller."
            )
    return b"".join(parts)


def _shown(url: object) -> str:
    text = str(url)
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")

"""Which network addresses the server may be sent to by somebody else's link."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence
from typing import Final

from florence2.errors import RequestError

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

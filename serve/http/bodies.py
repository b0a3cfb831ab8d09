"""Bodies of requests: how much one may send, read within that limit, and what all together hold."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from florence2.errors import FlorenceError
from serve.http.errors import TooLargeError
from serve.http.limits import readable_size


def header_of(scope: Scope, name: bytes) -> str:
    """The first value of a header, ``""`` without one; ``name`` is in lower case."""
    for key, value in scope["headers"]:
        if key.lower() == name:
            text: str = value.decode("latin-1")
            return text
    return ""


def check_announced(scope: Scope, max_bytes: int) -> None:
    """Raises TooLargeError if ``Content-Length`` alone says that the body is too large."""
    announced = header_of(scope, b"content-length")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes | None:
    """The whole body, or None if the client left before it was sent.

    Raises TooLargeError as soon as more than ``max_bytes`` are announced or have arrived.
    """
    check_announced(scope, max_bytes)
    parts: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_bytes:
            raise _too_large(max_bytes)
        more = message.get("more_body", False)
    return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body once and then what comes next, such as a disconnect."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


async def run_counted(
    app: ASGIApp, scope: Scope, receive: Receive, send: Send, max_bytes: int
) -> None:
    """Run ``app`` while counting what it reads of the body.

    Raises TooLargeError or what ``receive`` raised, also where the app made another error of it;
    an answer that the app had already begun is left to it.
    """
    check_announced(scope, max_bytes)
    size = 0
    started = False
    refusal: FlorenceError | None = None

    async def counted() -> Message:
        nonlocal size, refusal
        try:
            message = await receive()
            size += len(message.get("body", b""))
            if size > max_bytes:
                raise _too_large(max_bytes)
        except FlorenceError as error:
            refusal = error
            raise
        return message

    async def muted(message: Message) -> None:
        nonlocal started
        if refusal is not None and not started:
            return
        started = True
        await send(message)

    try:
        await app(scope, counted, muted)
    except Exception as error:
        if refusal is None or started or error is refusal:
            raise
        raise refusal from None
    if refusal is not None and not started:
        raise refusal


def with_json(scope: Scope, size: int) -> Scope:
    """The scope of a request whose body was replaced by ``size`` bytes of JSON."""
    replaced = (b"content-type", b"content-length", b"transfer-encoding")
    headers = [(key, value) for key, value in scope["headers"] if key.lower() not in replaced]
    headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % size)]
    return {**scope, "headers": headers}


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(
        f"The body of this request can have at most {readable_size(max_bytes)}, and more was "
        "sent; send fewer or smaller images at a time."
    )

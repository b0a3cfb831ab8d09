"""Bodies of requests: how much one may send, read within that limit, and what all together hold."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from functools import cache
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from florence2.budget import WAIT_S, Budget, Hold, from_environment, memory_limit_bytes
from florence2.errors import FlorenceError
from serve.http.errors import TooLargeError


def kind_of(value: object) -> str:
    """The kind of a JSON value: ``"a list"``, ``"text"``, ``"nothing"``."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    if value is None:
        return "nothing"
    return names.get(type(value), "a number")


MIB: Final = 1024 * 1024

MAX_IMAGE_BYTES: Final = 64 * MIB
MAX_FILES: Final = 1000


@dataclass(frozen=True, slots=True)
class Limits:
    """``encoded_bytes`` is for the routes whose JSON carries a picture in base64.

    Base64 needs four bytes for three, so the default fits one picture of ``MAX_IMAGE_BYTES``.
    """

    json_bytes: int = 32 * MIB
    encoded_bytes: int = MAX_IMAGE_BYTES * 4 // 3 + MIB
    multipart_bytes: int = 512 * MIB


def readable_size(count_bytes: int) -> str:
    """The size as a person reads it: ``"32 MiB"``, ``"1.5 MiB"``, ``"200 bytes"``."""
    if count_bytes < MIB:
        return f"{count_bytes} bytes"
    return f"{round(count_bytes / MIB, 1):g} MiB"


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


HELD_MIB_VARIABLE: Final = "FLORENCE_HELD_MIB"

_SHARE_OF_MEMORY: Final = 8
# What asks how a run is going, or stops it, must get through when nothing else does. Every
# connection and run may have this much beyond the budget, so it is no more than that takes.
_ALWAYS_BYTES: Final = MIB // 16
# Of one that waits, to notice that its client left.
_READ_ON_BYTES: Final = MIB // 4
# JSON is held as it came, as text, and as what is in it.
_COPIES_OF_JSON: Final = 3
_LOOK_AFTER_S: Final = 0.05
_STALLED_S: Final = 60.0
_HELD: Final = "florence.held_bytes"
_DISCONNECT: Final[Message] = {"type": "http.disconnect"}


class StalledError(FlorenceError):
    """A client began to send a body and does not go on."""

    code = "stalled"


@cache
def held_bytes() -> Budget:
    """The process's budget: ``FLORENCE_HELD_MIB``, or else an eighth of the memory."""
    default = memory_limit_bytes() // _SHARE_OF_MEMORY
    return Budget(from_environment(HELD_MIB_VARIABLE, MIB, default), "bytes of images")


def keep_body(scope: Scope) -> Hold:
    """The hold of a request's body, which from now on is the caller's to release.

    For work that goes on behind the answer. Empty outside of ``Uploads``.
    """
    body = scope.get(_HELD)
    return body.keep() if isinstance(body, Body) else Hold(Budget(0, "bytes"))


class Uploads:
    """The requests whose bodies arrive now; all of it on the event loop."""

    def __init__(
        self, budget: Budget, wait_s: float = WAIT_S, stalled_s: float = _STALLED_S
    ) -> None:
        self.budget = budget
        self.wait_s = wait_s
        self.stalled_s = stalled_s
        self._arriving: dict[Body, None] = {}

    def begin(self, scope: Scope, receive: Receive) -> Body:
        """One request: use the body's ``scope`` and ``receive``, and end it."""
        body = Body(self, scope, receive)
        self._arriving[body] = None
        return body

    def has_come(self, body: Body) -> None:
        """Nothing more of it will arrive."""
        self._arriving.pop(body, None)

    def take(self, body: Body, count: int) -> bool:
        """Counts that much more of a body if it may be held, and says whether."""
        hold, wanted = body.hold, body.hold.amount + count
        if wanted <= _ALWAYS_BYTES or self._goes_on(body):
            hold.resize(wanted)
            return True
        return self.budget.grow(hold, count, is_bulk=wanted > MAX_IMAGE_BYTES)

    def _goes_on(self, body: Body) -> bool:
        """Whether it is the first of those that arrive, and few besides them will be released."""
        arriving = sum(one.hold.amount for one in self._arriving)
        first = next((one for one in self._arriving if one.hold.amount or one is body), None)
        return first is body and self.budget.held - arriving <= self.budget.capacity // 4


class Body:
    """One request's body: passed on as it arrives, as soon as there is room for it."""

    def __init__(self, uploads: Uploads, scope: Scope, receive: Receive) -> None:
        self.hold = Hold(uploads.budget)
        self.scope = {**scope, _HELD: self}
        self._uploads = uploads
        self._receive = receive
        self._read: deque[Message] = deque()
        self._reading: asyncio.Task[Message] | None = None
        self._is_whole = False
        self._is_kept = False
        is_json = "json" in header_of(scope, b"content-type").lower()
        self._copies = _COPIES_OF_JSON if is_json else 1

    async def receive(self) -> Message:
        """The next message, as ASGI has it; NoRoomError or StalledError in place of one."""
        message = await self._next()
        if message["type"] != "http.request":
            return message
        if not await self._find_room(len(message.get("body", b"")) * self._copies):
            return _DISCONNECT
        if not message.get("more_body", False):
            self._is_whole = True
            self._uploads.has_come(self)
        return message

    def keep(self) -> Hold:
        """The hold, which ``end`` leaves alone from now on."""
        self._is_kept = True
        return self.hold

    async def end(self) -> None:
        """The request is answered, or its client has left."""
        self._uploads.has_come(self)
        if not self._is_kept:
            self.hold.release()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})

    async def _next(self) -> Message:
        if self._read:
            return self._read.popleft()
        patience_s = None if self._is_whole else self._uploads.stalled_s
        message = await self._read_on(patience_s)
        if message is None:
            raise StalledError(
                f"The body of a request must not pause for {self._uploads.stalled_s:g} s, and "
                "this one did; send it again."
            )
        return message

    async def _read_on(self, patience_s: float | None) -> Message | None:
        """The next message, or None where there is none in time."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._receive())
        await asyncio.wait({self._reading}, timeout=patience_s)
        if not self._reading.done():
            return None
        reading, self._reading = self._reading, None
        return reading.result()

    async def _find_room(self, count: int) -> bool:
        """Waits for it on the event loop; False if the client left meanwhile.

        That it left comes behind what it had sent, so a little more of that is read.
        """
        ends = time.monotonic() + self._uploads.wait_s
        while not self._uploads.take(self, count):
            if time.monotonic() >= ends:
                raise self._uploads.budget.refusal(count, self._uploads.wait_s)
            if sum(len(message.get("body", b"")) for message in self._read) > _READ_ON_BYTES:
                await asyncio.sleep(_LOOK_AFTER_S)
            elif (message := await self._read_on(_LOOK_AFTER_S)) is not None:
                if message["type"] == "http.disconnect":
                    return False
                self._read.append(message)
        return True

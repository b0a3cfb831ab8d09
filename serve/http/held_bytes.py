"""How many bytes of uploads and downloads the whole process holds, and who waits to send more.

Bytes are counted as they arrive, because what a client announces may never come. So two uploads
may each have half of the room and want more: the one that began first goes on then.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from functools import cache
from typing import Final

from starlette.types import Message, Receive, Scope

from florence2.budget import WAIT_S, Budget, Hold, from_environment, memory_limit_bytes
from florence2.errors import FlorenceError
from serve.http.bodies import header_of
from serve.http.limits import MAX_IMAGE_BYTES, MIB

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

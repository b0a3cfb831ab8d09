"""What breaks on the way to the double of the platform by chance: a share of its calls, or all.

Drawn from a seed, by the order in which calls arrive; what was injected is counted by its kind.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class Fault(Enum):
    """What happens to one call."""

    ERROR_500 = "answered with 500, and nothing is done"
    ERROR_502 = "answered with 502, and nothing is done"
    ERROR_429 = "answered with 429, and nothing is done"
    LOST = "carried out, and answered with 504"
    SLOW = "answered late"
    CUT = "carried out, and the answer breaks off in the middle"
    DROPPED = "the connection is closed without a word, and nothing is done"


REFUSED_WITH = {Fault.ERROR_500: 500, Fault.ERROR_502: 502, Fault.ERROR_429: 429}


@dataclass
class RandomFaults:
    """A ``share`` of all calls, each with one of ``kinds``; ``counts`` says how many of each.

    ``in_a_row``: a fault hits so many calls one after the other, which leaves those who try ten
    times without an answer. ``spared`` are methods that never fail.
    """

    share: float
    seed: int
    kinds: tuple[Fault, ...] = tuple(Fault)
    slow_s: float = 0.5
    in_a_row: int = 1
    spared: frozenset[str] = frozenset()
    counts: Counter[Fault] = field(default_factory=Counter)
    num_calls: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._lock = threading.Lock()
        self._left = 0

    def draw(self, method: str) -> Fault | None:
        """What happens to the next call."""
        with self._lock:
            self.num_calls += 1
            if method in self.spared:
                return None
            if not self._left:
                if self._random.random() >= self.share / self.in_a_row:
                    return None
                self._left = self.in_a_row
            self._left -= 1
            fault = self._random.choice(self.kinds)
            self.counts[fault] += 1
            return fault

    def wait(self) -> None:
        """For a call that is answered late."""
        time.sleep(self.slow_s)


class CutResponse(Response):
    """A response whose length is told and whose second half never comes."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        half = bytes(self.body)[: len(self.body) // 2]
        # The server ends the connection of an answer that is shorter than its length says.
        await send({"type": "http.response.body", "body": half, "more_body": True})
        raise BrokenOffError


class BrokenOffError(Exception):
    """The end of a connection, as a test asked."""


def cut(response: Response) -> CutResponse:
    """The first half of a response."""
    return CutResponse(response.body, response.status_code, dict(response.headers))


class Hanging:
    """While ``held``, calls are taken and not answered: a network that swallows packets."""

    def __init__(self) -> None:
        self._until: threading.Event | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        self._until = threading.Event()
        try:
            yield
        finally:
            self._until.set()
            self._until = None

    async def wait(self) -> None:
        """Returns once calls are answered."""
        until = self._until
        while until is not None and not until.is_set():
            await asyncio.sleep(0.05)

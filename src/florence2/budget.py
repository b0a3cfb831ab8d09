"""How much of something a whole process holds at a time: who finds no room waits in line."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Final

from florence2.errors import NoRoomError, RequestError, shown_s
from florence2.stopping import Stop

# Where nothing says how much there is.
_ASSUMED_BYTES: Final = 8 * 2**30
_V2_FILE: Final = "memory.max"
_V1_FILE: Final = "memory.limit_in_bytes"


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """The machine's memory, or the least that a control group above this process allows.

    ``root`` is where ``proc`` and ``sys`` are.
    """
    return min([_machine_bytes(), *_limits(root)])


def _machine_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Some systems have neither the call nor the names.
    except (AttributeError, ValueError, OSError):
        return _ASSUMED_BYTES


def _limits(root: Path) -> Iterator[int]:
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="ascii", errors="replace")
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for line in groups.splitlines():
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if not kinds:
            yield from _on_the_way(mounted, path, _V2_FILE)
        elif "memory" in kinds.split(","):
            yield from _on_the_way(mounted / "memory", path, _V1_FILE)


def _on_the_way(mounted: Path, path: str, name: str) -> Iterator[int]:
    """The limits of a group and of all that contain it.

    In a container the path may be the host's, while its own group is mounted at the top.
    """
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    for depth in range(len(parts) + 1):
        try:
            text = mounted.joinpath(*parts[:depth], name).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        # "max" is no limit; of v1, a number larger than any machine.
        if text.isdecimal() and int(text) > 0:
            yield int(text)


WAIT_S: Final = 30.0
"""How long to wait for room unless told otherwise."""


OPEN_MEGAPIXELS_VARIABLE: Final = "FLORENCE2_OPEN_MEGAPIXELS"


# Pillow keeps RGB in four bytes a pixel, and has a picture twice while it is converted or turned.
_BYTES_PER_PIXEL: Final = 8


# The rest is for weights, activations, and what other programs need.
_SHARE_OF_MEMORY: Final = 4
_LOOK_AFTER_S: Final = 0.1


class Budget:
    """At most ``capacity`` of something, held by all threads together; safe to use from them.

    ``what`` names it in messages. Bulk work leaves a quarter free for others, and waits while
    others wait; among equals who came first goes first. So that it can pass at all, an amount that
    is larger than the capacity is let in beside what takes a quarter of it at most.

    Whoever holds something and waits for more may wait for one who does the same: ask for more
    with ``wait_s=0``, and finish with what is held before waiting.
    """

    def __init__(self, capacity: int, what: str) -> None:
        self.capacity = capacity
        self._what = what
        self._held = 0
        self._news = threading.Condition()
        self._lines: dict[bool, deque[object]] = {False: deque(), True: deque()}

    @property
    def held(self) -> int:
        """What is held now."""
        return self._held

    @property
    def num_waiting(self) -> int:
        """How many wait for room."""
        return sum(len(line) for line in self._lines.values())

    def hold(
        self,
        amount: int,
        *,
        is_bulk: bool = False,
        wait_s: float = WAIT_S,
        stop: Stop | None = None,
    ) -> Hold:
        """Holds ``amount`` once there is room for it; release it.

        Raises NoRoomError after ``wait_s``, and what ``stop`` gives when it is asked, about ten
        times a second.
        """
        turn = object()
        ends = time.monotonic() + wait_s
        line = self._lines[is_bulk]
        with self._news:
            line.append(turn)
            try:
                while not (self._is_next(turn, is_bulk) and self._fits(amount, is_bulk)):
                    self._wait(ends, amount, wait_s, stop)
                return Hold(self, amount)
            finally:
                line.remove(turn)
                self._news.notify_all()

    def grow(self, hold: Hold, amount: int, *, is_bulk: bool = False) -> bool:
        """Adds ``amount`` to what ``hold`` has if there is room for it now, and says whether."""
        with self._news:
            if not self._fits(amount, is_bulk):
                return False
            hold.resize(hold.amount + amount)
            return True

    def refusal(self, amount: int, waited_s: float) -> NoRoomError:
        """What to say to one who waited in vain."""
        waited = f" within {shown_s(waited_s)}" if waited_s else ""
        return NoRoomError(
            f"At most {self.capacity:,} {self._what} are held at a time, and {amount:,} more did "
            f"not find room{waited}; send the request again later."
        )

    def _is_next(self, turn: object, is_bulk: bool) -> bool:
        return self._lines[is_bulk][0] is turn and not (is_bulk and self._lines[False])

    def _fits(self, amount: int, is_bulk: bool) -> bool:
        reserve = self.capacity // 4
        limit = self.capacity - reserve if is_bulk else self.capacity
        return self._held + min(amount, limit - reserve) <= limit

    def _wait(self, ends: float, amount: int, wait_s: float, stop: Stop | None) -> None:
        reason = None if stop is None else stop()
        if reason is not None:
            raise reason
        left_s = ends - time.monotonic()
        if left_s <= 0:
            raise self.refusal(amount, wait_s)
        self._news.wait(left_s if stop is None else min(left_s, _LOOK_AFTER_S))

    def _change(self, amount: int) -> None:
        self._held += amount
        self._news.notify_all()


class Hold:
    """What one holder has of a budget, until it is released; as a context too."""

    def __init__(self, budget: Budget, amount: int = 0) -> None:
        self._budget = budget
        self.amount = 0
        self.resize(amount)

    def resize(self, amount: int) -> None:
        """Holds this much from now on, without waiting: for less, or for what is here already."""
        with self._budget._news:
            self._budget._change(amount - self.amount)
            self.amount = amount

    def release(self) -> None:
        """Holds nothing any more; releasing twice is releasing once."""
        self.resize(0)

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


@cache
def open_pixels() -> Budget:
    """The process's budget of the pixels of images that are open at full size.

    ``FLORENCE2_OPEN_MEGAPIXELS``, or else what a quarter of the memory can hold.
    """
    pixels = memory_limit_bytes() // _SHARE_OF_MEMORY // _BYTES_PER_PIXEL
    return Budget(from_environment(OPEN_MEGAPIXELS_VARIABLE, 10**6, pixels), "pixels of images")


def from_environment(variable: str, unit: int, default: int) -> int:
    """A capacity that an administrator may set, in whole ``unit``; RequestError for junk."""
    text = os.environ.get(variable, "").strip()
    if not text:
        return max(unit, default)
    if not text.isdecimal() or int(text) < 1:
        raise RequestError(
            f"{variable} is a whole number above 0, and {text[:40]!r} was received; correct it or "
            "leave it out."
        )
    return int(text) * unit

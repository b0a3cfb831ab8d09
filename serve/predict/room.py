"""Room for open images: who waits for it, and images opened in parts that have it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from florence2.budget import WAIT_S, Budget, Hold
from florence2.errors import (
    DeadlineError,
    FlorenceError,
    GenerationCancelledError,
    NoRoomError,
)
from serve.predict.full_queue import QUEUE_LIMIT_S

# Three bytes each; a batch of a few large images is answered in parts.
MAX_OPEN_PIXELS: Final = 100_000_000


class Opened(Protocol):
    """Something that holds pixels until it is closed."""

    @property
    def num_pixels(self) -> int: ...

    def close(self) -> None: ...


Source = TypeVar("Source")
Item = TypeVar("Item", bound=Opened)


@dataclass(frozen=True, slots=True)
class Patience:
    """Who waits for room: bulk work or not, until when, and whether still."""

    is_bulk: bool
    ends_s: float | None = None
    should_stop: Callable[[], bool] | None = None

    @property
    def left_s(self) -> float | None:
        """Seconds that are left, None for as long as it takes."""
        return None if self.ends_s is None else max(0.0, self.ends_s - time.monotonic())

    def reason(self) -> FlorenceError | None:
        """Why nobody waits any longer."""
        if self.should_stop is not None and self.should_stop():
            return GenerationCancelledError(
                "The request was cancelled; send it again if it is needed."
            )
        if self.left_s == 0.0:
            return DeadlineError(
                "An answer was wanted sooner than there was room to open the image; allow more "
                "time or ask for less at once."
            )
        return None

    def room(self, budget: Budget, wait_s: float) -> Callable[[int], Hold]:
        """Waits for so many pixels; NoRoomError after ``wait_s``, or the ``reason``."""

        def hold(pixels: int) -> Hold:
            return budget.hold(pixels, is_bulk=self.is_bulk, wait_s=wait_s, stop=self.reason)

        return hold


def in_parts(
    sources: Iterable[Source], open_one: Callable[[Source, float], Item]
) -> Generator[list[Item]]:
    """The sources opened, in order and in parts; a part is closed when the next one is asked for.

    ``open_one`` may wait for so many seconds. Raises its NoRoomError only with nothing in hand: the
    first part is refused soon, so that the caller may come back, a later one when the queue of the
    model would be given up too. Close it, or what the last part holds stays held.
    """
    part: list[Item] = []
    wait_s = WAIT_S
    try:
        for source in sources:
            try:
                item = open_one(source, 0.0 if _pixels(part) else wait_s)
            except NoRoomError:
                if not _pixels(part):
                    raise
                yield part
                _close(part)
                wait_s = QUEUE_LIMIT_S
                item = open_one(source, wait_s)
            part.append(item)
            if _pixels(part) >= MAX_OPEN_PIXELS:
                yield part
                _close(part)
                wait_s = QUEUE_LIMIT_S
        if part:
            yield part
    finally:
        _close(part)


def _pixels(part: list[Item]) -> int:
    return sum(item.num_pixels for item in part)


def _close(part: list[Item]) -> None:
    for item in part:
        item.close()
    part.clear()

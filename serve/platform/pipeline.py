"""Work that overlaps: downloads run ahead of the model, uploads behind it. Nothing polls.

Waiting that a run may have to do ends at once when the run is stopped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Generic, TypeVar

from florence2.budget import Budget, Hold
from florence2.errors import FlorenceError, NoRoomError
from serve.http.bodies import held_bytes
from serve.platform.images import Target
from serve.platform.registry import AWAITED, InferenceRequest
from serve.sdk import sly

QUEUE_LIMIT_S: Final = 600.0
FULL_CODES: Final = frozenset({"no_room", "queue_full"})
MAX_RETRY_S: Final = 5.0
_STEP_S: Final = 0.1

Outcome = TypeVar("Outcome")


class PausedTooLongError(FlorenceError):
    """Nobody fetched results for so long that the run is given up."""

    code = "cancelled"


def wait_while_paused(request: InferenceRequest) -> None:
    """Returns once results were fetched, or the run was stopped.

    The SDK pauses a run at 500 results that wait to be fetched. PausedTooLongError after an hour.
    """
    if request.context.get(AWAITED) or not request.is_paused():
        return
    sly.logger.info("The run waits until its results are fetched.")
    while request.is_paused() and not request.is_stopped():
        if request.paused_for() > request.PAUSE_SLEEP_MAX_WAIT:
            raise PausedTooLongError(
                f"The run was given up, because nobody fetched its {request.pending_num()} "
                "results; fetch them while it goes on."
            )
        time.sleep(_STEP_S)


def room_for_downloads(request: InferenceRequest, *, is_bulk: bool) -> Callable[[int, float], Hold]:
    """Holds bytes of the process's budget for a run; none of it for a run that was stopped."""
    stopped = FlorenceError("The run was stopped.")
    stopped.code = "cancelled"

    def hold(num_bytes: int, wait_s: float) -> Hold:
        try:
            return held_bytes().hold(
                num_bytes,
                is_bulk=is_bulk,
                wait_s=wait_s,
                stop=lambda: stopped if request.is_stopped() else None,
            )
        except FlorenceError as error:
            if error is not stopped:
                raise
            # The run ends by itself before it uses what it gets.
            return Hold(held_bytes())

    return hold


def when_queue_has_room(
    call: Callable[[], Outcome], should_stop: Callable[[], bool], limit_s: float = QUEUE_LIMIT_S
) -> Outcome:
    """What ``call`` returns, called again while the queue or the memory is full.

    The error of a full one after ``limit_s`` seconds of waiting, or once stopped.
    """
    waited_s = 0.0
    while True:
        try:
            return call()
        except FlorenceError as error:
            if error.code not in FULL_CODES or waited_s >= limit_s or should_stop():
                raise
            pause_s = min(float(getattr(error, "retry_after_s", 1.0)), MAX_RETRY_S)
        waited_s += max(pause_s, _STEP_S)
        _sleep(max(pause_s, _STEP_S), should_stop)


def _sleep(seconds: float, should_stop: Callable[[], bool]) -> None:
    steps = max(round(seconds / _STEP_S), 1)
    for _ in range(steps):
        if should_stop():
            return
        time.sleep(seconds / steps)


MAX_BYTES_AHEAD: Final = 256_000_000
# Three bytes each once they are opened.
MAX_BATCH_PIXELS: Final = 100_000_000
BATCHES_AHEAD: Final = 3
BATCHES_BEHIND: Final = 2

Batch = tuple[Target, ...]
RoomForBytes = Callable[[int, float], Hold]
"""Holds so many bytes, waiting so many seconds for them at most; NoRoomError."""

Item = TypeVar("Item")
Fetched = TypeVar("Fetched")


def split_batches(
    targets: Iterable[Target],
    size: int,
    max_bytes: int = MAX_BYTES_AHEAD // 2,
    max_pixels: int = MAX_BATCH_PIXELS,
) -> Iterator[Batch]:
    """Batches of at most ``size`` images, ``max_bytes`` of files and ``max_pixels`` together.

    A larger image is a batch of its own.
    """
    batch: list[Target] = []
    num_bytes = num_pixels = 0
    for target in targets:
        num_bytes += target.size_bytes
        num_pixels += target.num_pixels
        if batch and (len(batch) >= size or num_bytes > max_bytes or num_pixels > max_pixels):
            yield tuple(batch)
            batch, num_bytes, num_pixels = [], target.size_bytes, target.num_pixels
        batch.append(target)
    if batch:
        yield tuple(batch)


def fetch_ahead(
    batches: Iterable[Batch],
    fetch: Callable[[Batch], Fetched],
    max_batches: int = BATCHES_AHEAD,
    max_bytes: int = MAX_BYTES_AHEAD,
    room: RoomForBytes | None = None,
) -> Generator[tuple[Batch, Fetched]]:
    """Each batch with what ``fetch`` gives for it, in order, fetched in a few threads.

    Not more than ``max_batches`` and ``max_bytes`` are on the way or waiting, the bytes only from
    the second batch on. ``room`` holds a batch's bytes until the one after it is asked for; the
    wait for it is 0 s while others of this run are held, because they go on. Close it to give up
    what is not begun.
    """
    pool = ThreadPoolExecutor(max_batches, thread_name_prefix="download")
    waiting: deque[tuple[Batch, Future[Fetched], Hold]] = deque()
    rest = iter(batches)
    held: Batch | None = next(rest, None)
    try:
        while held is not None or waiting:
            while held is not None and (
                hold := _room_for(
                    held, [batch for batch, *_ in waiting], max_batches, max_bytes, room
                )
            ):
                waiting.append((held, pool.submit(fetch, held), hold))
                held = next(rest, None)
            batch, future, hold = waiting.popleft()
            with hold:
                yield batch, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for *_, hold in waiting:
            hold.release()


def _room_for(
    batch: Batch,
    waiting: Sequence[Batch],
    max_batches: int,
    max_bytes: int,
    room: RoomForBytes | None,
) -> Hold | None:
    size = num_bytes(batch)
    if waiting:
        total = sum(map(num_bytes, waiting)) + size
        if len(waiting) >= max_batches or total > max_bytes:
            return None
    if room is None:
        return Hold(Budget(0, "bytes"))
    try:
        return room(size, 0.0 if waiting else QUEUE_LIMIT_S)
    except NoRoomError:
        if waiting:
            return None
        raise


def num_bytes(batch: Batch) -> int:
    """Of the files of a batch."""
    return sum(target.size_bytes for target in batch)


class Behind(Generic[Item]):
    """One thread that settles items in order while the caller makes the next one.

    ``put`` waits while two items are unsettled, and raises what settling an earlier one raised;
    ``finish`` waits for all of them and raises likewise. An item after a raise is not settled.
    """

    def __init__(self, settle: Callable[[Item], None], max_waiting: int = BATCHES_BEHIND) -> None:
        self._settle = settle
        self._max_waiting = max_waiting
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._waiting: deque[Future[None]] = deque()
        self._is_broken = False

    def put(self, item: Item) -> None:
        while len(self._waiting) >= self._max_waiting:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._settle_next, item))

    def finish(self) -> None:
        try:
            while self._waiting:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _settle_next(self, item: Item) -> None:
        if self._is_broken:
            return
        self._is_broken = True
        self._settle(item)
        self._is_broken = False

"""Work that overlaps: downloads run ahead of the model, uploads behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from florence2.budget import Budget, Hold
from florence2.errors import GenerationCancelledError, NoRoomError
from serve.platform.images import Target
from serve.predict.full_queue import QUEUE_LIMIT_S

MAX_BYTES_AHEAD: Final = 256_000_000
# Three bytes each once they are opened.
MAX_BATCH_PIXELS: Final = 100_000_000
BATCHES_AHEAD: Final = 3

Batch = tuple[Target, ...]
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
    budget: Budget,
    should_stop: Callable[[], bool],
    *,
    is_bulk: bool,
    max_batches: int = BATCHES_AHEAD,
    max_bytes: int = MAX_BYTES_AHEAD,
    more_bytes: int = 0,
) -> Generator[tuple[Batch, Fetched, Hold]]:
    """Each batch with what ``fetch`` gives for it, in order, fetched in a few threads.

    Not more than ``max_batches`` and ``max_bytes`` are on the way or waiting, the bytes only from
    the second batch on; ``more_bytes`` for what is made of each file count too. A batch's bytes are
    held of ``budget``; the hold that comes with it is the
    caller's to release, whether or not it asks for the next. The wait for them is 0 s while others
    wait here, because they go on. Raises NoRoomError. A run that is to stop waits for nothing.
    Close it to give up what is not begun.
    """
    pool = ThreadPoolExecutor(max_batches, thread_name_prefix="download")
    ahead: deque[tuple[Batch, Future[Fetched], Hold]] = deque()

    def stop() -> GenerationCancelledError | None:
        return GenerationCancelledError("The run was stopped.") if should_stop() else None

    def room_for(batch: Batch) -> Hold | None:
        size = _num_bytes(batch, more_bytes)
        total = size + sum(_num_bytes(other, more_bytes) for other, *_ in ahead)
        if ahead and (len(ahead) >= max_batches or total > max_bytes):
            return None
        wait_s = 0.0 if ahead else QUEUE_LIMIT_S
        try:
            return budget.hold(size, is_bulk=is_bulk, wait_s=wait_s, stop=stop)
        except GenerationCancelledError:
            # The run ends by itself before it uses what it gets.
            return Hold(budget)
        except NoRoomError:
            if not ahead:
                raise
            return None

    rest = iter(batches)
    following: Batch | None = next(rest, None)
    try:
        while following is not None or ahead:
            while following is not None and (hold := room_for(following)):
                ahead.append((following, pool.submit(fetch, following), hold))
                following = next(rest, None)
            batch, future, hold = ahead[0]
            fetched = future.result()
            ahead.popleft()
            yield batch, fetched, hold
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for *_, hold in ahead:
            hold.release()


def _num_bytes(batch: Batch, more_bytes: int) -> int:
    return sum(target.size_bytes + more_bytes for target in batch)

"""Work that is settled behind the caller, in order, while the caller makes the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final, Generic, TypeVar

MAX_WAITING: Final = 2

Item = TypeVar("Item")


class Settler(Generic[Item]):
    """One thread that settles items in order while the caller makes the next one.

    ``put`` waits while two items are unsettled, and raises what settling an earlier one raised;
    the end of the context waits for all of them and raises likewise. An item after a raise is not
    settled.
    """

    def __init__(
        self,
        settle: Callable[[Item], None],
        max_waiting: int = MAX_WAITING,
        thread_name: str = "upload",
    ) -> None:
        self._settle = settle
        self._max_waiting = max_waiting
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=thread_name)
        self._waiting: deque[Future[None]] = deque()
        self._is_broken = False

    def __enter__(self) -> Settler[Item]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            while self._waiting:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def put(self, item: Item) -> None:
        while len(self._waiting) >= self._max_waiting:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._settle_next, item))

    def _settle_next(self, item: Item) -> None:
        if self._is_broken:
            return
        self._is_broken = True
        self._settle(item)
        self._is_broken = False

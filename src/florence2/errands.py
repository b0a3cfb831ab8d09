"""Work that is done once: ahead of its need by a helper, or else by whoever needs it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, Generic, TypeVar, cast

from florence2.errors import as_value

T = TypeVar("T")

_NONE: Final = object()


class Errand(Generic[T]):
    """The result of ``work``, which is called once, by the first thread that begins.

    So nobody waits behind other errands: one that no helper has begun is done by the thread that
    asks for the result. ``work`` and what it holds are released as soon as it is over.
    """

    __slots__ = ("_claim", "_error", "_is_over", "_value", "_work")

    def __init__(self, work: Callable[[], T]) -> None:
        self._work: Callable[[], T] | None = work
        self._claim = threading.Lock()
        self._is_over = threading.Event()
        self._value: object = _NONE
        self._error: BaseException | None = None

    def run(self) -> None:
        """Does the work here and now, unless somebody has begun it; raises nothing."""
        if not self._claim.acquire(blocking=False):
            return
        work, self._work = self._work, None
        try:
            if work is not None:
                self._value = work()
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is needed
            self._error = as_value(error)
        finally:
            self._is_over.set()

    def result(self) -> T:
        """What ``work`` gave or raised; done on this thread if nobody has begun."""
        self.run()
        self._is_over.wait()
        if self._error is not None:
            raise self._error
        if self._value is _NONE:
            raise RuntimeError("An errand that was dropped has no result.")
        return cast(T, self._value)

    def drop(self) -> None:
        """Nobody needs the result: what was not begun never is, and what is held is released."""
        if self._claim.acquire(blocking=False):
            self._work = None
            self._is_over.set()
        # An error that was raised has a traceback, whose frames hold this errand.
        self._value, self._error = _NONE, None

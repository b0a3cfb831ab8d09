"""Calls something once nothing has happened for a while."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class IdleTimer:
    """``action`` runs when ``timeout_s`` have passed since the last ``touch``; one timer at most.

    The SDK starts a thread for every request instead, and loses some when requests are parallel.
    """

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action
        self._lock = threading.Lock()
        self._touched = 0.0
        self._timer: threading.Timer | None = None

    def touch(self, timeout_s: float) -> None:
        """Something happened; begin to wait again."""
        with self._lock:
            self._touched = time.monotonic()
            if self._timer is None:
                self._start(timeout_s, timeout_s)

    def cancel(self) -> None:
        """Nothing to wait for until the next ``touch``."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _start(self, wait_s: float, timeout_s: float) -> None:
        self._timer = threading.Timer(wait_s, self._look, (timeout_s,))
        self._timer.daemon = True
        self._timer.start()

    def _look(self, timeout_s: float) -> None:
        with self._lock:
            left = self._touched + timeout_s - time.monotonic()
            if self._timer is None:
                return
            if left > 0:
                self._start(left, timeout_s)
                return
            self._timer = None
        try:
            self._action()
        # A timer thread has nobody to tell; the model stays where it is.
        except Exception:
            logger.exception("The idle model could not be moved away")

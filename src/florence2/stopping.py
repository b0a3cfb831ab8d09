"""Giving up work that nobody waits for any longer, between two passes of the network."""

from __future__ import annotations

from collections.abc import Callable

from florence2.errors import FlorenceError

Stop = Callable[[], FlorenceError | None]
"""Says why an answer is no longer wanted, and None as long as it is."""

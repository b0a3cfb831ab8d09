"""Giving up work that nobody waits for any longer, between two passes of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from florence2.errors import FlorenceError

Stop = Callable[[], FlorenceError | None]
"""Says why an answer is no longer wanted, and None as long as it is."""

Watch = Callable[[], Mapping[int, FlorenceError]]
"""Looked at before every pass of the network: the items to give up, each with its reason."""

BetweenPasses = Callable[[], None]
"""Called before every pass of the network; it may have the engine answer something else."""


def watch_over(stops: Sequence[Stop | None], between_passes: BetweenPasses | None) -> Watch:
    """A watch that lets ``between_passes`` run and then asks every item's own ``Stop``."""

    def watch() -> dict[int, FlorenceError]:
        if between_passes is not None:
            between_passes()
        reasons = ((item, stop()) for item, stop in enumerate(stops) if stop is not None)
        return {item: reason for item, reason in reasons if reason is not None}

    return watch


def stop_of_all(stops: Iterable[Stop | None]) -> Stop | None:
    """The Stop of what several share: it is given up once each of them has given it up."""
    listed = list(stops)
    each = [stop for stop in listed if stop is not None]
    if len(each) < len(listed):
        return None

    def stop_all() -> FlorenceError | None:
        reason: FlorenceError | None = None
        for stop in each:
            reason = stop()
            if reason is None:
                return None
        return reason

    return stop_all

"""What a batch was, for metrics, and how fast answers come."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from florence2.engine.answering import Outcome, identity
from florence2.engine.tickets import Priority
from florence2.records import Result
from florence2.scheduler_queue import Piece

logger = logging.getLogger(__name__)

RETRY_AFTER_S: Final = (1.0, 60.0)
FIRST_RETRY_AFTER_S: Final = 5.0
"""What a full queue says before any batch has shown how fast answers come."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What was answered between two passes of the network.

    ``prompts`` counts the asks answered, ``together`` those that shared the batch with them,
    themselves included, ``images`` the different images among them, ``requests`` whose asks they
    were, ``failures`` the asks without a result, ``queue_depth`` the asks that wait now,
    ``tokens`` those of the answers. ``seconds`` is the time since the run's report before,
    without that of clicks answered in between; ``waited_s`` is the longest time from an ask's
    arrival to its turn.
    """

    priority: Priority
    prompts: int
    images: int
    queue_depth: int
    tokens: int
    seconds: float
    waited_s: float
    requests: int = 1
    failures: int = 0
    together: int = 1


Observer = Callable[[BatchReport], None]


@dataclass(frozen=True, slots=True)
class Answered:
    """A piece with its outcome; its turn came ``waited_s`` after its request."""

    piece: Piece
    outcome: Outcome
    waited_s: float


def report_of(
    answered: Sequence[Answered],
    priority: Priority,
    seconds: float,
    queue_depth: int,
    together: int,
) -> BatchReport:
    """The report of what was answered in ``seconds``."""
    results = [one.outcome for one in answered if isinstance(one.outcome, Result)]
    return BatchReport(
        priority=priority,
        prompts=len(answered),
        images=len({identity(getattr(one.piece.ask, "image", None)) for one in answered}),
        queue_depth=queue_depth,
        tokens=sum(len(step.token_ids) for one in results for step in one.steps or (one,)),
        seconds=seconds,
        waited_s=max((one.waited_s for one in answered), default=0.0),
        requests=len({one.piece.ticket for one in answered}),
        failures=len(answered) - len(results),
        together=together,
    )


class Pace:
    """Asks per second, recent batches counting most."""

    def __init__(self) -> None:
        self._asks_per_s: float | None = None

    def note(self, report: BatchReport) -> None:
        """Takes one more batch into account."""
        if report.seconds > 0 and report.prompts:
            rate = report.prompts / report.seconds
            before = rate if self._asks_per_s is None else self._asks_per_s
            self._asks_per_s = (3 * before + rate) / 4

    def seconds_for(self, num_asks: int) -> float:
        """About how long so many asks take, from 1 s to 60 s."""
        if self._asks_per_s is None:
            return FIRST_RETRY_AFTER_S
        low, high = RETRY_AFTER_S
        return min(high, max(low, num_asks / self._asks_per_s))


class Reports:
    """Hands every report on to the observer, and learns the pace from it."""

    def __init__(self, observer: Observer | None) -> None:
        self.pace = Pace()
        self._observer = observer

    def note(self, report: BatchReport) -> None:
        """Takes one more batch into account; an observer that fails is only logged."""
        self.pace.note(report)
        if self._observer is None:
            return
        try:
            self._observer(report)
        except Exception:
            logger.exception("The observer of batches failed")

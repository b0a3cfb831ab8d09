"""One thread owns the model: requests of many callers share batches, and a click goes first."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from florence2.engine.answering import AskRun, More, Outcome, Settle, identity
from florence2.engine.ask import AnyImage, Ask
from florence2.engine.engine import Coming, Engine
from florence2.engine.tickets import Piece, Priority, Ticket, TicketQueue
from florence2.errors import (
    DeadlineError,
    FlorenceError,
    GenerationCancelledError,
    InternalError,
    OutOfMemoryError,
    QueueFullError,
    StoppedError,
    as_value,
    stopped,
)
from florence2.records import Failure, Result

__all__ = [
    "BatchReport",
    "DeadlineError",
    "GenerationCancelledError",
    "InternalError",
    "Observer",
    "Priority",
    "QueueFullError",
    "Scheduler",
    "StoppedError",
]

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


Deliver = Callable[[Priority, Sequence[Answered], float, int], None]
"""Takes what was answered since the pass before, the seconds since then, the asks in hand then."""

MorePieces = Callable[[Priority, int, int], list[Piece]]
"""Gives up to so many further pieces of a priority, when so many are in hand."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Whose turn it was, and how many requests began together."""

    priority: Priority
    requests: int


class Run:
    """Answers pieces; delivers what is known before every pass, and at the end.

    It holds no piece that is delivered, because a run may last as long as requests come. An error
    that is nobody's fault in particular is that of the asks in hand only if each of them meets it
    alone too.
    """

    def __init__(
        self,
        engine: Engine,
        pieces: list[Piece],
        deliver: Deliver,
        coming: Coming,
        between_passes: Callable[[], None] | None = None,
        more: MorePieces | None = None,
    ) -> None:
        self._engine = engine
        self._deliver = deliver
        self._between_passes = between_passes
        self._more = more
        self._coming = coming
        self._priority = pieces[0].ticket.priority
        self._first = pieces
        self._count = 0
        self._open: dict[int, tuple[Piece, float]] = {}
        self._answered: list[Answered] = []
        self._mark = time.monotonic()

    def answer(self) -> None:
        """Returns once every piece is delivered."""
        try:
            self._run_of(self._settle, self._join).run()
        except FlorenceError as error:
            self._settle_open(as_value(error))
        except Exception:
            logger.exception("A batch of %d prompts failed", len(self._open))
            self._answer_one_by_one()
        self._flush()

    def _answer_one_by_one(self) -> None:
        if len(self._open) == 1:
            self._settle_open(InternalError())
        for number, (piece, _) in list(self._open.items()):
            try:
                self._run_of(partial(self._settle_alone, number), None).run([piece.ask])
            except FlorenceError as error:
                self._settle(number, as_value(error))
            except Exception:
                logger.exception("A prompt failed alone")
                self._settle(number, InternalError())

    def _run_of(self, settle: Settle, more: More | None) -> AskRun:
        return AskRun(self._engine, settle, self._before_pass, more, self._coming)

    def _join(self, room: int) -> list[Ask]:
        pieces, self._first = self._first, []
        if not pieces and self._more is not None:
            pieces = self._more(self._priority, room, len(self._open))
        now = time.monotonic()
        for number, piece in enumerate(pieces, start=self._count):
            self._open[number] = piece, now - piece.ticket.arrived
        self._count += len(pieces)
        return [piece.ask for piece in pieces]

    def _settle(self, number: int, outcome: Outcome) -> None:
        piece, waited_s = self._open.pop(number)
        self._answered.append(Answered(piece, outcome, waited_s))

    def _settle_alone(self, number: int, _: int, outcome: Outcome) -> None:
        self._settle(number, outcome)

    def _settle_open(self, error: FlorenceError) -> None:
        for number in list(self._open):
            self._settle(number, error)

    def _before_pass(self) -> None:
        self._flush()
        if self._between_passes is not None:
            began = time.monotonic()
            self._between_passes()
            self._mark += time.monotonic() - began

    def _flush(self) -> None:
        answered, self._answered = self._answered, []
        if answered:
            now = time.monotonic()
            seconds, self._mark = now - self._mark, now
            together = len(answered) + len(self._open)
            self._deliver(self._priority, answered, seconds, together)


GATHER_S: Final = 0.003
"""How long a batch waits for as many requests as the last one had, if that had several."""


T = TypeVar("T")


class Scheduler:
    """Answers the asks of many threads on one thread of its own, until ``close``.

    ``max_batch`` is counted in asks, ``max_queued`` too: from that many waiting asks of a priority
    on a further request of it is refused. ``observer`` is called on the model's thread after every
    batch, just before the callers get their answers; ``on_lost`` once, on the same thread, when
    the engine's device has failed for good and the asks in hand have got that as their answer.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int | None = None,
        max_queued: int = 4096,
        observer: Observer | None = None,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._on_lost = on_lost
        self._max_batch = max_batch or engine.prompt_batch
        self._max_queued = max_queued
        self._reports = Reports(observer)
        self._news = threading.Condition()
        self._queues = {priority: TicketQueue() for priority in Priority}
        self._postponed: list[Piece] = []
        self._actions: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._open: set[Ticket] = set()
        self._is_closed = False
        self._last: Turn | None = None
        self._thread = threading.Thread(target=self._work, name="florence2-model", daemon=True)
        self._thread.start()

    @property
    def queue_depth(self) -> int:
        """Asks that wait for their batch."""
        with self._news:
            return sum(self._depth(priority) for priority in Priority)

    @property
    def is_closed(self) -> bool:
        """Whether nothing is answered any more."""
        return self._is_closed

    def run(
        self,
        asks: Sequence[Ask],
        *,
        priority: Priority = Priority.INTERACTIVE,
        deadline_s: float | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Result | Failure]:
        """One result or failure per ask, in order; the calling thread waits for all of them.

        ``deadline_s`` counts from now; asks without an answer by then fail with the code
        ``deadline``. ``should_stop`` is asked on the calling thread about ten times a second; once
        true, asks without an answer fail with ``cancelled``. Raises QueueFullError at once, and
        StoppedError when the scheduler is closed before everything is answered.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("The model's thread cannot wait for itself; use the engine there.")
        ticket = Ticket(asks, priority, self._max_batch, deadline_s, should_stop)
        self._admit(ticket)
        try:
            reason = ticket.wait()
            if reason is not None:
                self._give_up(ticket, reason)
        finally:
            self._forget(ticket)
        if isinstance(ticket.reason, StoppedError):
            # Not the reason itself, whose traceback would hold the ticket that holds the reason.
            raise stopped()
        return ticket.results()

    def call(self, action: Callable[[], T]) -> T:
        """Runs ``action`` on the model's thread after the batch in hand, ahead of all that waits.

        What it raises is raised here; StoppedError if the scheduler is closed before its turn.
        """
        if threading.current_thread() is self._thread:
            return action()
        future: Future[T] = Future()
        with self._news:
            self._check_open()
            self._actions.append((action, future))
            self._news.notify()
        return future.result()

    def close(self) -> None:
        """Answers nothing more: whoever waits gets StoppedError, the batch in hand is given up.

        Returns once the pass in hand is over, so that the engine may be closed next.
        """
        self._stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _admit(self, ticket: Ticket) -> None:
        with self._news:
            self._check_open()
            if not ticket.asks:
                return
            # By priority: someone at the screen is not refused because a run fills the queue.
            depth = self._depth(ticket.priority)
            if depth >= self._max_queued:
                raise QueueFullError(
                    f"At most {self._max_queued} prompts may wait for an answer, and {depth} do; "
                    "send the request again later.",
                    self._reports.pace.seconds_for(depth),
                )
            self._open.add(ticket)
            self._queues[ticket.priority].add(ticket)
            self._news.notify()
        # While the model is busy with others; whoever is first at an image prepares it.
        self._engine.preparer.also_ahead(self._coming())

    def _depth(self, priority: Priority) -> int:
        postponed = sum(piece.ticket.priority is priority for piece in self._postponed)
        return self._queues[priority].num_asks + postponed

    def _check_open(self) -> None:
        if self._is_closed:
            raise stopped()

    def _give_up(self, ticket: Ticket, reason: FlorenceError) -> None:
        with self._news:
            if ticket.is_done:
                return
            ticket.give_up(reason)
            self._queues[ticket.priority].discard(ticket)
            self._postponed = [piece for piece in self._postponed if piece.ticket != ticket]
        # What was begun of its images is of no use to anybody else.
        self._engine.preparer.ahead(self._coming())

    def _forget(self, ticket: Ticket) -> None:
        """Leaves nothing of a ticket behind, also when its caller was interrupted."""
        self._give_up(ticket, stopped())
        with self._news:
            self._open.discard(ticket)

    def _stop(self) -> None:
        with self._news:
            self._is_closed = True
            for ticket in list(self._open):
                self._give_up(ticket, stopped())
            while self._actions:
                self._actions.popleft()[1].set_exception(stopped())
            self._news.notify()

    def _work(self) -> None:
        try:
            while not self._is_closed:
                self._work_once()
                self._tell_if_lost()
        finally:
            # Whatever ends this thread, nobody is left waiting for it.
            self._stop()

    def _work_once(self) -> None:
        """By itself: in the loop its variables would hold a request's images till the next one."""
        action, pieces = self._next()
        if action is not None:
            _act(*action)
        elif pieces:
            self._answer(pieces)

    def _tell_if_lost(self) -> None:
        if self._on_lost is not None and self._engine.is_lost:
            tell, self._on_lost = self._on_lost, None
            tell()

    def _next(self) -> tuple[tuple[Callable[[], Any], Future[Any]] | None, list[Piece]]:
        """Waits for something to do: an action, or else a batch."""
        with self._news:
            self._news.wait_for(lambda: self._is_closed or self._actions or self.queue_depth)
            if self._last is not None and self._last.requests > 1:
                self._news.wait_for(self._is_company_here, GATHER_S)
            if self._is_closed:
                return None, []
            return (self._actions.popleft(), []) if self._actions else (None, self._pick())

    def _is_company_here(self) -> bool:
        tickets = sum(len(queue) for queue in self._queues.values())
        is_enough = self._last is None or tickets >= self._last.requests
        return self._is_closed or bool(self._actions) or bool(self._postponed) or is_enough

    def _pick(self) -> list[Piece]:
        if self._postponed:
            postponed, self._postponed = self._postponed, []
            return postponed
        # After a click comes a bulk batch, in which clicks go on being answered: both get on.
        is_bulk_due = self._last is not None and self._last.priority is Priority.INTERACTIVE
        for priority in sorted(Priority, reverse=is_bulk_due):
            if pieces := self._queues[priority].pick(self._max_batch):
                return pieces
        return []

    def _more(self, priority: Priority, room: int, num_open: int) -> list[Piece]:
        """Asks that join a run while rows of its batch are free; none when others' turn is due."""
        with self._news:
            is_due = bool(self._is_closed or self._actions or self._postponed)
            if priority is Priority.INTERACTIVE:
                is_due = is_due or len(self._queues[Priority.BULK]) > 0
            room = min(room, self._max_batch - num_open)
            return [] if is_due or room < 1 else self._queues[priority].pick(room)

    def _coming(self) -> list[AnyImage]:
        with self._news:
            return [
                image
                for priority in Priority
                for image in self._queues[priority].images_ahead(self._max_batch)
            ]

    def _between_passes(self) -> None:
        """Answers the clicks that came during a bulk batch, before its next pass."""
        with self._news:
            pieces = self._queues[Priority.INTERACTIVE].pick(self._max_batch)
        if pieces:
            # Those that come meanwhile wait for a pass of the bulk batch, so that it gets on.
            Run(self._engine, pieces, self._deliver_nested, self._coming).answer()

    def _answer(self, pieces: list[Piece]) -> None:
        self._last = Turn(pieces[0].ticket.priority, len({piece.ticket for piece in pieces}))
        is_bulk = self._last.priority is Priority.BULK
        between_passes = self._between_passes if is_bulk else None
        deliver, more = self._deliver, self._more
        Run(self._engine, pieces, deliver, self._coming, between_passes, more).answer()

    def _deliver(
        self, priority: Priority, answered: Sequence[Answered], seconds: float, together: int
    ) -> None:
        report = report_of(answered, priority, seconds, self.queue_depth, together)
        self._reports.note(report)
        with self._news:
            for one in answered:
                one.piece.ticket.settle(one.piece.place, one.outcome)

    def _deliver_nested(
        self, priority: Priority, answered: Sequence[Answered], seconds: float, together: int
    ) -> None:
        """As ``_deliver``; what had no room beside a bulk batch is asked again right after it."""
        kept = [one for one in answered if not isinstance(one.outcome, OutOfMemoryError)]
        with self._news:
            self._postponed += [
                one.piece
                for one in answered
                if isinstance(one.outcome, OutOfMemoryError) and not one.piece.ticket.is_done
            ]
        if kept:
            self._deliver(priority, kept, seconds, together)


def _act(action: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(action())
    except BaseException as error:  # noqa: BLE001 - it is raised where the caller waits
        future.set_exception(error)

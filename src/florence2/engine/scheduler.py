"""One thread owns the model: requests of many callers share batches, and a click goes first."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from florence2.engine.answering import answer
from florence2.engine.ask import Ask, Outcome
from florence2.engine.encoding import AnyImage
from florence2.engine.engine import Asker, Engine
from florence2.engine.work_queue import (
    FIRST_DEVICE,
    Action,
    Priority,
    QueuedAsk,
    Request,
    WorkQueue,
)
from florence2.errors import (
    FlorenceError,
    InternalError,
    OutOfMemoryError,
    StoppedError,
    as_value,
    stopped,
)
from florence2.images import identity
from florence2.records import Failure, Result

__all__ = ["BatchReport", "Observer", "OtherDevice", "Priority", "Scheduler"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What was answered between two passes of the network.

    ``prompts`` counts the asks answered, ``together`` those that shared the batch with them,
    themselves included, ``images`` the different images among them, ``requests`` whose asks they
    were, ``failures`` the asks without a result, ``queue_depth`` the asks that wait now,
    ``tokens`` those of the answers. ``seconds`` is the time since the batch's report before,
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


class OtherDevice(Protocol):
    """A device beside the scheduler's own that takes asks of the same queue."""

    def start(self, queue: WorkQueue, number: int, observer: Observer | None) -> None:
        """Begins to answer; ``number`` is what the queue knows the device by."""

    def park(self) -> None:
        """Moves the weights from the device to memory."""

    def resume(self) -> None:
        """Moves them back."""

    def close(self) -> None:
        """Answers nothing more; the queue is closed already."""


class AskBatch(Asker[QueuedAsk]):
    """Asks that are answered together, and those that join them; a click's runs within a bulk one.

    Delivers what is known before every pass, and at the end. It holds nothing that is delivered,
    because a batch may go on for as long as requests come. An error that is nobody's fault in
    particular is that of the asks in hand only if each of them meets it alone too.
    """

    def __init__(
        self,
        engine: Engine,
        queue: WorkQueue,
        observer: Observer | None,
        asks: list[QueuedAsk],
        *,
        is_awaited: bool,
        is_within_bulk: bool = False,
    ) -> None:
        self.is_awaited = is_awaited
        self._engine = engine
        self._queue = queue
        self._observer = observer
        self._priority = asks[0].request.priority
        self._first = asks
        self._is_within_bulk = is_within_bulk
        # Those that come during a batch within wait for a pass of the bulk one, so that it gets on.
        self._is_open_to_others = not is_within_bulk
        # Asks in hand, each with the seconds it waited for its turn.
        self._in_hand: dict[QueuedAsk, float] = {}
        self._settled: list[tuple[QueuedAsk, Outcome, float]] = []
        self._reported = time.monotonic()

    def run(self) -> None:
        """Returns once every ask is delivered."""
        try:
            answer(self._engine, self)
        except FlorenceError as error:
            for queued in list(self._in_hand):
                self.settle(queued, as_value(error))
        except Exception:
            logger.exception("A batch of %d prompts failed", len(self._in_hand))
            self._run_one_by_one()
        self._deliver()

    def _run_one_by_one(self) -> None:
        self._is_open_to_others = False
        is_alone = len(self._in_hand) == 1
        for queued in list(self._in_hand):
            self._first = [queued]
            try:
                if is_alone:
                    self.settle(queued, InternalError())
                else:
                    answer(self._engine, self)
            except FlorenceError as error:
                self.settle(queued, as_value(error))
            except Exception:
                logger.exception("A prompt failed alone")
                self.settle(queued, InternalError())

    def next_asks(self, room: int) -> list[tuple[QueuedAsk, Ask]]:
        """Those that the batch began with, then others that wait."""
        asks, self._first = self._first, []
        if not asks and self._is_open_to_others:
            asks = self._queue.joining(self._priority, room, len(self._in_hand))
        now = time.monotonic()
        for queued in asks:
            self._in_hand.setdefault(queued, now - queued.request.arrived)
        return [(queued, queued.ask) for queued in asks]

    def settle(self, key: QueuedAsk, outcome: Outcome) -> None:
        """Keeps the outcome for the next delivery."""
        self._settled.append((key, outcome, self._in_hand.pop(key)))

    def coming_images(self) -> list[AnyImage]:
        """Those of the asks that wait."""
        return self._queue.coming_images()

    def before_pass(self) -> None:
        """Delivers; within a bulk batch it answers the clicks that came meanwhile."""
        self._deliver()
        if self._priority is Priority.BULK and (clicks := self._queue.clicks()):
            began = time.monotonic()
            AskBatch(
                self._engine,
                self._queue,
                self._observer,
                clicks,
                is_awaited=self.is_awaited,
                is_within_bulk=True,
            ).run()
            self._reported += time.monotonic() - began

    def _deliver(self) -> None:
        settled, self._settled = self._settled, []
        if not settled:
            return
        now = time.monotonic()
        seconds, self._reported = now - self._reported, now
        together = len(settled) + len(self._in_hand)
        if self._is_within_bulk:
            # What had no room beside the bulk batch is asked again right after it.
            self._queue.postpone(
                queued for queued, outcome, _ in settled if isinstance(outcome, OutOfMemoryError)
            )
            settled = [one for one in settled if not isinstance(one[1], OutOfMemoryError)]
        if settled:
            self._report(settled, seconds, together)
            self._queue.settle((queued, outcome) for queued, outcome, _ in settled)

    def _report(
        self, settled: Sequence[tuple[QueuedAsk, Outcome, float]], seconds: float, together: int
    ) -> None:
        """Tells the observer; one that fails is only logged."""
        self._queue.note_pace(len(settled), seconds)
        if self._observer is None:
            return
        results = [outcome for _, outcome, _ in settled if isinstance(outcome, Result)]
        report = BatchReport(
            priority=self._priority,
            prompts=len(settled),
            images=len({identity(getattr(one.ask, "image", None)) for one, _, _ in settled}),
            queue_depth=self._queue.num_waiting,
            tokens=sum(len(step.token_ids) for one in results for step in one.steps or (one,)),
            seconds=seconds,
            waited_s=max(waited_s for _, _, waited_s in settled),
            requests=len({queued.request for queued, _, _ in settled}),
            failures=len(settled) - len(results),
            together=together,
        )
        try:
            self._observer(report)
        except Exception:
            logger.exception("The observer of batches failed")


class Scheduler:
    """Answers the asks of many threads on one thread of its own, until ``close``.

    ``max_batch`` is counted in asks, ``max_queued`` too: from that many waiting asks of a priority
    on a further request of it is refused. ``observer`` is called on the model's thread after every
    batch, just before the callers get their answers; ``on_lost`` once, on the same thread, when
    the engine's device has failed for good and the asks in hand have got that as their answer.
    ``others`` answer beside it, each a device.
    Without ``has_clicks`` nobody waits for the end of a pass, so that batches are as large as was
    asked, whatever the pace of the machine, and their answers the same to the last digit.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int | None = None,
        max_queued: int = 4096,
        observer: Observer | None = None,
        on_lost: Callable[[], None] | None = None,
        has_clicks: bool = True,
        others: Sequence[OtherDevice] = (),
    ) -> None:
        self._engine = engine
        self.others = tuple(others)
        """The devices that answer beside this one."""
        self._has_clicks = has_clicks
        self._observer = observer
        self._on_lost = on_lost
        most = max_batch or engine.prompt_batch
        self._queue = WorkQueue(most, max_queued, self.num_devices)
        self._thread = threading.Thread(target=self._work, name="florence2-model", daemon=True)
        self._thread.start()
        for number, other in enumerate(self.others, start=FIRST_DEVICE + 1):
            other.start(self._queue, number, observer)

    @property
    def num_devices(self) -> int:
        """How many answer side by side."""
        return 1 + len(self.others)

    @property
    def queue_depth(self) -> int:
        """Asks that wait for their batch."""
        return self._queue.num_waiting

    @property
    def is_closed(self) -> bool:
        """Whether nothing is answered any more."""
        return self._queue.is_closed

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
        request = Request(asks, priority, self._queue.max_batch, deadline_s, should_stop)
        self._queue.add(request)
        reason: FlorenceError | None = None
        try:
            # While the model is busy with others; whoever is first at an image prepares it.
            self._engine.preparer.also_ahead(self._queue.coming_images())
            reason = request.wait()
        finally:
            # Also when the caller was interrupted: what nobody waits for is not begun.
            self._queue.remove(request, reason or stopped())
            if request.reason is not None:
                self._engine.preparer.ahead(self._queue.coming_images())
        if isinstance(request.reason, StoppedError):
            # Not the reason itself, whose traceback would hold the request that holds the reason.
            raise stopped()
        return request.results()

    def call(self, action: Callable[[], T]) -> T:
        """Runs ``action`` on the model's thread after the batch in hand, ahead of all that waits.

        What it raises is raised here; StoppedError if the scheduler is closed before its turn.
        """
        if threading.current_thread() is self._thread:
            return action()
        waiting = Action(action)
        self._queue.add_action(waiting)
        return waiting.done.result()

    def park(self) -> None:
        """Moves the weights from all devices to memory, after the batch in hand."""
        self.call(self._engine.park)
        for other in self.others:
            other.park()

    def resume(self) -> None:
        """Moves the weights back to their devices."""
        self.call(self._engine.resume)
        for other in self.others:
            other.resume()

    def close(self) -> None:
        """Answers nothing more: whoever waits gets StoppedError, the batch in hand is given up.

        Returns once the pass in hand is over, so that the engine may be closed next.
        """
        self._queue.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        for other in self.others:
            other.close()

    def _work(self) -> None:
        try:
            while not self._queue.is_closed:
                self._work_once()
                self._tell_if_lost()
        finally:
            # Whatever ends this thread, nobody is left waiting for it.
            self._queue.close()

    def _work_once(self) -> None:
        """By itself: in the loop its variables would hold a request's images till the next one."""
        work = self._queue.next_work()
        if isinstance(work, Action):
            work.run()
        elif work:
            batch = AskBatch(
                self._engine, self._queue, self._observer, work, is_awaited=self._has_clicks
            )
            batch.run()

    def _tell_if_lost(self) -> None:
        if self._on_lost is not None and self._engine.is_lost:
            tell, self._on_lost = self._on_lost, None
            tell()

"""Devices beside the first: a process each, which takes asks of the scheduler's queue.

The parent's side is ``DeviceWorker``, one thread a device; the process's is ``main``. Between them
go pickled tuples over a socket: whichever side ends, the other one notices.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any, Final

import torch

from florence2.api import CACHE_BYTES, Florence2
from florence2.engine.ask import Ask
from florence2.engine.encoding import Preparer
from florence2.engine.scheduler import BatchReport, Observer, Priority, Scheduler
from florence2.engine.work_queue import Action, QueuedAsk, WorkQueue
from florence2.errors import DeviceLostError, FlorenceError, StoppedError
from florence2.images import identity
from florence2.records import Failure, Result
from florence2.runtimes.device import choose_device

logger = logging.getLogger(__name__)

_LOOK_S: Final = 0.02
_IDLE_LOOK_S: Final = 0.5
_END_S: Final = 10.0
# Between starts that end before anything was answered, from the second on.
_RESTART_S: Final = (1.0, 60.0)
# Each ask waits on a thread of its own for its place in a batch.
_THREADS: Final = 256


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What one process loads, and onto what. ``cores`` of None are all that there are."""

    name: str
    device: str
    runtime: str = "auto"
    precision: str = "auto"
    title: str | None = None
    adapters: tuple[tuple[str, str], ...] = ()
    max_batch: int | None = None
    cache_bytes: int = CACHE_BYTES
    has_clicks: bool = True
    cores: tuple[int, ...] | None = None


def share_cores(first: str, others: Sequence[str]) -> list[tuple[int, ...] | None]:
    """The cores of each device's process; of those on the CPU each gets its part.

    ``first`` is that of this process, which computes with as many threads as it has cores from now
    on.
    """
    if not others:
        return [None]
    devices = [str(choose_device(first)), *others]
    on_cpu = [place for place, device in enumerate(devices) if device == "cpu"]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares: list[tuple[int, ...] | None] = [None] * len(devices)
    if len(on_cpu) < 2 or not cores:
        return shares
    for number, place in enumerate(on_cpu):
        # With more processes than cores, some share one.
        shares[place] = tuple(cores[number :: len(on_cpu)]) or (cores[number % len(cores)],)
    if (own := shares[0]) is not None:
        torch.set_num_threads(len(own))
    return shares


class DeviceWorker:
    """A device in a process of its own, started again whenever it ends.

    What the process had in hand when it ended is asked again, once, by whichever device is free.
    Images are made ready by ``preparer``, of the process that asks.
    """

    def __init__(self, plan: WorkerPlan, preparer: Preparer) -> None:
        self.plan = plan
        self._preparer = preparer
        self._sending = threading.Lock()
        self._connection: Connection | None = None
        self._is_parked = False
        self.pid: int | None = None
        """Of the process, once it has loaded its model; None while there is none."""

    def start(self, queue: WorkQueue, number: int, observer: Observer | None) -> None:
        """Begins to answer what is in the queue; the model is loaded meanwhile."""
        self._queue, self._number, self._observer = queue, number, observer
        self._thread = threading.Thread(
            target=self._work, name=f"florence2-{self.plan.device}", daemon=True
        )
        self._thread.start()

    def park(self) -> None:
        """Moves the weights from the device to memory."""
        self._is_parked = True
        self._tell("park")

    def resume(self) -> None:
        """Moves them back."""
        self._is_parked = False
        self._tell("resume")

    def close(self) -> None:
        """Ends the process; returns once it is gone."""
        self._thread.join()

    def _tell(self, what: str) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            self._send(connection, (what,))
        except OSError:
            # A process that has ended has nothing on the device.
            logger.debug("%s: its process is gone", self.plan.device)

    def _send(self, connection: Connection, message: tuple[Any, ...]) -> None:
        packed = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with self._sending:
            connection.send_bytes(packed)

    def _work(self) -> None:
        failed = 0
        while not self._queue.is_closed:
            hands = _Hands()
            try:
                with self._process() as connection:
                    self._answer(connection, hands)
            except (EOFError, OSError, _NotLoadedError) as error:
                failed = 0 if hands.num_answered else failed + 1
                if self._queue.is_closed:
                    return
                logger.error(
                    "The process of %s ended (%s); it is started again, and what it had in hand, "
                    "%d questions, is asked again",
                    self.plan.device,
                    error or type(error).__name__,
                    len(hands.asked),
                )
                self._queue.ask_again(hands.asked.values())
                self._wait(failed)
            # The thread must not end while the queue counts on it.
            except Exception:
                logger.exception("Asking the process of %s failed", self.plan.device)
                self._queue.ask_again(hands.asked.values())
                failed += 1
                self._wait(failed)

    def _wait(self, num_failed: int) -> None:
        if num_failed < 2:
            return
        until = time.monotonic() + min(_RESTART_S[1], _RESTART_S[0] * 2 ** (num_failed - 2))
        while not self._queue.is_closed and time.monotonic() < until:
            time.sleep(_LOOK_S)

    @contextmanager
    def _process(self) -> Iterator[Connection]:
        """A process with its model loaded; it is gone afterwards."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "florence2.workers", str(theirs.fileno())]
            # The platform starts the app from a clone, where the package is not installed.
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        connection = Connection(ours.detach())
        try:
            connection.send_bytes(pickle.dumps(self.plan))
            self._wait_until_loaded(connection)
            self.pid, self._connection = process.pid, connection
            if self._is_parked:
                self._tell("park")
            yield connection
        finally:
            # One that loads its model hears nothing before it has it.
            ends_s = _END_S if self._queue.is_closed and self.pid is not None else 0.1
            self.pid = self._connection = None
            connection.close()
            try:
                process.wait(ends_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _wait_until_loaded(self, connection: Connection) -> None:
        while not connection.poll(_LOOK_S):
            if self._queue.is_closed:
                raise EOFError
        kind, *rest = pickle.loads(connection.recv_bytes())
        if kind != "loaded":
            raise _NotLoadedError(rest[0])

    def _answer(self, connection: Connection, hands: _Hands) -> None:
        """Until the queue is closed; EOFError or OSError once the process has ended."""
        while not self._queue.is_closed:
            self._take(connection, hands)
            wait_s = _LOOK_S if hands.asked else 0.0
            while connection.poll(wait_s):
                self._receive(pickle.loads(connection.recv_bytes()), hands)
                wait_s = 0.0
            self._give_up(connection, hands)

    def _take(self, connection: Connection, hands: _Hands) -> None:
        """Sends the process what it has room for: a batch, and the next one to go on with."""
        if not hands.asked:
            work = self._queue.next_work(self._number, _IDLE_LOOK_S)
            if not isinstance(work, Action):
                self._ask(connection, work, hands)
            return
        self._ask(connection, self._queue.clicks(self._number), hands)
        most = self._queue.max_batch
        room = 2 * most - len(hands.asked)
        in_hand = max(0, len(hands.asked) - most)
        if room > 0:
            joining = self._queue.joining(Priority.BULK, room, in_hand, self._number)
            self._ask(connection, joining, hands)

    def _ask(self, connection: Connection, asks: Sequence[QueuedAsk], hands: _Hands) -> None:
        by_image: dict[object, list[int]] = {}
        # All of them first: what is in no hands would be lost with the process.
        for number, queued in hands.add(asks):
            image = getattr(queued.ask, "image", None)
            by_image.setdefault(identity(image), []).append(number)
        for numbers in by_image.values():
            together = [hands.asked[number] for number in numbers]
            try:
                sent = self._sendable([one.ask for one in together])
            except FlorenceError as error:
                self._queue.settle([(one, error) for one in together])
                hands.drop(numbers)
                continue
            self._send(connection, ("ask", together[0].request.priority, numbers, sent))

    def _sendable(self, asks: list[Ask]) -> list[Ask]:
        """The asks with their image made ready, once for all."""
        if not isinstance(asks[0], Ask):
            return asks
        if isinstance(asks[0].image, Failure):
            # Who waits is asked here; the other process would not understand it.
            return [replace(ask, stop=None) for ask in asks]
        image = self._preparer.take(asks[0].image)  # type: ignore[arg-type]
        if isinstance(image, FlorenceError):
            raise image
        return [replace(ask, image=image, stop=None) for ask in asks]

    def _receive(self, message: tuple[Any, ...], hands: _Hands) -> None:
        kind, *rest = message
        if kind == "report":
            self._report(*rest)
            return
        numbers, outcomes = rest
        settled = [
            (queued, outcome)
            for number, outcome in zip(numbers, outcomes, strict=True)
            if (queued := hands.asked.get(number)) is not None
        ]
        self._queue.settle(settled)
        hands.num_answered += len(settled)
        hands.drop(numbers)

    def _report(self, report: BatchReport) -> None:
        self._queue.note_pace(report.prompts, report.seconds)
        if self._observer is None:
            return
        try:
            self._observer(replace(report, queue_depth=self._queue.num_waiting))
        except Exception:
            logger.exception("The observer of batches failed")

    def _give_up(self, connection: Connection, hands: _Hands) -> None:
        """Tells the process what nobody waits for any longer."""
        given_up = [
            (number, reason)
            for number, queued in hands.asked.items()
            if isinstance(queued.ask, Ask)
            and queued.ask.stop is not None
            and (reason := queued.ask.stop()) is not None
        ]
        if given_up:
            numbers = [number for number, _ in given_up]
            self._queue.settle([(hands.asked[number], reason) for number, reason in given_up])
            hands.drop(numbers)
            self._send(connection, ("cancel", numbers))


class _NotLoadedError(Exception):
    """The process could not load the model."""


@dataclass(slots=True, eq=False)
class _Hands:
    """What one process has been asked and has not answered."""

    asked: dict[int, QueuedAsk] = field(default_factory=dict)
    num_answered: int = 0
    _last: int = 0

    def add(self, asks: Sequence[QueuedAsk]) -> list[tuple[int, QueuedAsk]]:
        """Each with the number that the process knows it by."""
        numbered = list(enumerate(asks, start=self._last))
        self._last += len(asks)
        self.asked.update(numbered)
        return numbered

    def drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.asked.pop(number, None)


# The process's side


class _Process:
    """Answers what comes over the connection until it ends."""

    def __init__(self, connection: Connection, plan: WorkerPlan) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._cancelled: set[int] = set()
        self._model = _loaded(plan)
        self._scheduler = Scheduler(
            self._model.engine,
            max_batch=plan.max_batch,
            max_queued=sys.maxsize,
            observer=lambda report: self._send("report", report),
            # The parent starts another one, and asks again what has no answer.
            on_lost=lambda: os._exit(3),
            has_clicks=plan.has_clicks,
        )

    def run(self) -> None:
        engine = self._model.engine
        moves = {"park": engine.park, "resume": engine.resume}
        self._send("loaded")
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                while True:
                    kind, *rest = pickle.loads(self._connection.recv_bytes())
                    if kind == "ask":
                        pool.submit(self._ask, *rest)
                    elif kind == "cancel":
                        self._cancelled.update(*rest)
                    else:
                        self._scheduler.call(moves[kind])
            except (EOFError, OSError):
                # The parent is done, or gone.
                self._scheduler.close()
        self._model.close()

    def _ask(self, priority: Priority, numbers: list[int], asks: list[Ask]) -> None:
        try:
            stoppable = [
                replace(ask, stop=self._stop_of(number)) if isinstance(ask, Ask) else ask
                for number, ask in zip(numbers, asks, strict=True)
            ]
            outcomes = self._scheduler.run(stoppable, priority=priority)
        except StoppedError:
            return
        # Asked again elsewhere; this process ends.
        if any(isinstance(one, Failure) and one.code == DeviceLostError.code for one in outcomes):
            return
        self._cancelled.difference_update(numbers)
        self._send("answered", numbers, outcomes)

    def _stop_of(self, number: int) -> Callable[[], FlorenceError | None]:
        def stop() -> FlorenceError | None:
            return StoppedError("Nobody waits.") if number in self._cancelled else None

        return stop

    def _send(self, *message: str | BatchReport | list[int] | list[Result | Failure]) -> None:
        packed = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        try:
            with self._sending:
                self._connection.send_bytes(packed)
        except OSError:
            logger.debug("The parent is gone")


def _loaded(plan: WorkerPlan) -> Florence2:
    return Florence2.load(
        plan.name,
        plan.device,
        plan.runtime,
        precision=plan.precision,
        title=plan.title,
        adapters=dict(plan.adapters),
        cache_bytes=plan.cache_bytes,
    )


def main() -> None:
    """The process of one device: ``python -m florence2.workers FD``, started by DeviceWorker."""
    # Ctrl-C is for the parent, which then closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    plan: WorkerPlan = pickle.loads(connection.recv_bytes())
    if plan.cores is not None:
        os.sched_setaffinity(0, plan.cores)
        torch.set_num_threads(len(plan.cores))
    try:
        process = _Process(connection, plan)
    except FlorenceError as error:
        connection.send_bytes(pickle.dumps(("failed", str(error))))
        return
    process.run()


if __name__ == "__main__":
    # Under its own name, which what is pickled here and there refers to.
    from florence2 import workers

    workers.main()

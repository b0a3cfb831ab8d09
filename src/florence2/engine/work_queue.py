"""What waits for the model: requests of many callers, whose turn it is, and actions besides."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from florence2.engine.ask import Ask, Outcome, failure_of
from florence2.engine.encoding import AnyImage, EncodedImage
from florence2.errors import (
    DeadlineError,
    FlorenceError,
    GenerationCancelledError,
    InternalError,
    QueueFullError,
    RequestError,
    shown,
    shown_s,
    stopped,
)
from florence2.images import identity
from florence2.pixels import PreparedImage
from florence2.records import Failure, Result

logger = logging.getLogger(__name__)

LOOK_AFTER_S: Final = 0.1
"""How often a waiting caller is asked whether it still waits."""

GATHER_S: Final = 0.003
"""How long a batch waits for as many requests as the last one had, if that had several."""

RETRY_AFTER_S: Final = (1.0, 60.0)
FIRST_RETRY_AFTER_S: Final = 5.0
"""What a full queue says before any batch has shown how fast answers come."""

FIRST_DEVICE: Final = 0
"""The device of this process, where actions are done and encoded images are; others have 1, 2, …"""

MAX_PLACES: Final = 10_000
"""Images of which it is remembered which device has seen them."""


class Priority(IntEnum):
    """Who is answered first: someone who looks at the screen, then runs over many images."""

    INTERACTIVE = 0
    BULK = 1


class Request:
    """The asks of one caller; each is answered once, and what comes later is dropped.

    ``parts`` are the places of the asks that nobody has begun: those about one image together,
    at most ``max_batch`` in each; ``num_waiting`` counts them. The queue changes a request only
    under its own lock.
    """

    def __init__(
        self,
        asks: Sequence[Ask],
        priority: Priority,
        max_batch: int,
        deadline_s: float | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        if deadline_s is not None and math.isnan(deadline_s):
            raise RequestError(
                f"A deadline is a number of seconds from now, and {shown(deadline_s)} was "
                "received; leave it out to wait as long as it takes."
            )
        # A list of its own: asks that held their request would keep each other's images alive.
        self._reasons: list[FlorenceError] = []
        self.asks = [_watched(ask, self._reasons) for ask in asks]
        self.priority = priority
        self.arrived = time.monotonic()
        self.parts = _by_image(asks, max_batch)
        self.num_waiting = len(asks)
        self._asked_again: set[int] = set()
        self._deadline_s = deadline_s
        self._should_stop = should_stop
        self._results: list[Result | Failure | None] = [None] * len(asks)
        self._num_open = len(asks)
        self._is_done = threading.Event()

    @property
    def is_done(self) -> bool:
        """Whether every ask has its result."""
        return not self._num_open

    @property
    def reason(self) -> FlorenceError | None:
        """Why nobody waits any longer, if so."""
        return self._reasons[0] if self._reasons else None

    def take(self, room: int) -> list[QueuedAsk]:
        """Up to ``room`` asks about one image, which are then begun."""
        part = self.parts.popleft()
        if len(part) > room:
            self.parts.appendleft(part[room:])
        self.num_waiting -= len(part[:room])
        return [QueuedAsk(self, place) for place in part[:room]]

    def may_ask_again(self, place: int) -> bool:
        """Whether this is the first time that an ask was lost with the process that had it."""
        if place in self._asked_again:
            return False
        self._asked_again.add(place)
        return True

    @property
    def next_image(self) -> object:
        """That of the asks whose turn comes next."""
        return getattr(self.asks[self.parts[0][0]], "image", None)

    def settle(self, place: int, outcome: Outcome | Failure) -> None:
        """Notes the answer to one ask."""
        if self._results[place] is not None:
            return
        if isinstance(outcome, FlorenceError):
            self._results[place] = failure_of(outcome, getattr(self.asks[place], "image", None))
        else:
            self._results[place] = outcome
        self._num_open -= 1
        if self.is_done:
            self._is_done.set()

    def give_up(self, reason: FlorenceError) -> None:
        """Settles every open ask with ``reason``; those in the batch in hand leave it."""
        self._reasons.append(reason)
        self.parts.clear()
        self.num_waiting = 0
        for place in range(len(self._results)):
            self.settle(place, reason)

    def wait(self) -> FlorenceError | None:
        """Waits until all is answered, or gives the reason why the caller waits no longer."""
        while not self.is_done:
            reason = self._overdue()
            if reason is not None or self._is_done.wait(self._patience_s()):
                return reason
        return None

    def results(self) -> list[Result | Failure]:
        """All results in the order of the asks, once done."""
        return [result for result in self._results if result is not None]

    def _left_s(self) -> float | None:
        return (
            None if self._deadline_s is None else self.arrived + self._deadline_s - time.monotonic()
        )

    def _patience_s(self) -> float | None:
        left_s = self._left_s()
        look_s = None if self._should_stop is None else LOOK_AFTER_S
        limits = [limit for limit in (left_s, look_s) if limit is not None]
        return min(max(0.0, min(limits)), threading.TIMEOUT_MAX) if limits else None

    def _overdue(self) -> FlorenceError | None:
        try:
            if self._should_stop is not None and self._should_stop():
                return GenerationCancelledError(
                    "The request was cancelled; send it again if it is needed."
                )
        except Exception:
            logger.exception("Asking whether a request is still wanted failed")
            return InternalError()
        left_s = self._left_s()
        if left_s is not None and left_s <= 0:
            return DeadlineError(
                "The time for an answer was over before it was there: "
                f"{shown_s(max(0.0, self._deadline_s or 0.0))} from when it was asked for; allow "
                "more time or ask for less at once."
            )
        return None


@dataclass(frozen=True, slots=True)
class QueuedAsk:
    """One ask of a request, by its place there."""

    request: Request
    place: int

    @property
    def ask(self) -> Ask:
        """What is asked."""
        return self.request.asks[self.place]


def _watched(ask: Ask, reasons: list[FlorenceError]) -> Ask:
    """The ask, which is given up once there is a reason or by itself."""
    if not isinstance(ask, Ask):
        return ask
    own = ask.stop

    def stop() -> FlorenceError | None:
        if reasons:
            return reasons[0]
        return None if own is None else own()

    return replace(ask, stop=stop)


def _is_possible(device: int, queued: QueuedAsk) -> bool:
    """An image that was encoded is on the first device."""
    is_encoded = isinstance(getattr(queued.ask, "image", None), EncodedImage)
    return device == FIRST_DEVICE or not is_encoded


def _content_of(image: object) -> object:
    return image.content_hash if isinstance(image, PreparedImage) else identity(image)


def _by_image(asks: Sequence[Ask], max_batch: int) -> deque[list[int]]:
    places: dict[object, list[int]] = {}
    for place, ask in enumerate(asks):
        places.setdefault(identity(getattr(ask, "image", None)), []).append(place)
    return deque(
        group[start : start + max_batch]
        for group in places.values()
        for start in range(0, len(group), max_batch)
    )


T = TypeVar("T")


class Action(Generic[T]):
    """Something to do on the model's thread; ``done`` has its value or what it raised."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self.done: Future[T] = Future()

    def run(self) -> None:
        """Does it; raises nothing here."""
        try:
            self.done.set_result(self._work())
        except BaseException as error:  # noqa: BLE001 - it is raised where the caller waits
            self.done.set_exception(error)


class WorkQueue:
    """What a device does next: actions first, then asks. Safe between threads.

    The devices of one model share a queue. What comes next goes to whoever asks for work first,
    but someone at the screen is answered by the device that has seen the image, if that is idle.

    ``max_batch`` and ``max_queued`` are counted in asks; from ``max_queued`` waiting asks of a
    priority on a further request of it is refused. By priority: someone at the screen is not
    refused because a run fills the queue.
    """

    def __init__(self, max_batch: int, max_queued: int, num_devices: int = 1) -> None:
        self.max_batch = max_batch
        self._num_devices = num_devices
        self._idle: set[int] = set()
        self._seen_by: OrderedDict[object, int] = OrderedDict()
        # Which device has an ask that is begun; only where there are several.
        self._in_hand: dict[QueuedAsk, int] = {}
        self._max_queued = max_queued
        self._changed = threading.Condition()
        self._is_closed = False
        self._actions: deque[Action[Any]] = deque()
        self._postponed: list[QueuedAsk] = []
        self._requests = {priority: deque[Request]() for priority in Priority}
        self._open: set[Request] = set()
        self._last_priority: Priority | None = None
        self._last_num_requests = 0
        self._asks_per_s: float | None = None

    @property
    def is_closed(self) -> bool:
        """Whether nothing is answered any more."""
        return self._is_closed

    @property
    def num_waiting(self) -> int:
        """Asks that wait for their batch."""
        with self._changed:
            return sum(self._num_waiting(priority) for priority in Priority)

    def add(self, request: Request) -> None:
        """Puts a request at the end of the line of its priority; QueueFullError, StoppedError."""
        with self._changed:
            self._check_open()
            if request.is_done:
                return
            num_waiting = self._num_waiting(request.priority)
            if num_waiting >= self._max_queued:
                raise QueueFullError(
                    f"At most {self._max_queued} prompts may wait for an answer, and "
                    f"{num_waiting} do; send the request again later.",
                    self._seconds_for(num_waiting),
                )
            self._open.add(request)
            self._requests[request.priority].append(request)
            self._changed.notify_all()

    def add_action(self, action: Action[Any]) -> None:
        """Has an action done before all asks that wait; StoppedError once closed."""
        with self._changed:
            self._check_open()
            self._actions.append(action)
            self._changed.notify_all()

    def remove(self, request: Request, reason: FlorenceError) -> None:
        """Leaves nothing of a request behind; what has no answer yet is given up."""
        with self._changed:
            self._open.discard(request)
            if request.is_done:
                return
            request.give_up(reason)
            if request in self._requests[request.priority]:
                self._requests[request.priority].remove(request)
            self._postponed = [one for one in self._postponed if one.request is not request]

    def close(self) -> None:
        """Gives up whatever waits or is in hand, now and from now on."""
        with self._changed:
            self._is_closed = True
            for request in list(self._open):
                self.remove(request, stopped())
            while self._actions:
                self._actions.popleft().done.set_exception(stopped())
            self._changed.notify_all()

    def next_work(
        self, device: int = FIRST_DEVICE, wait_s: float | None = None
    ) -> Action[Any] | list[QueuedAsk]:
        """Waits for an action, or else the asks that begin a batch; none once closed.

        Nor are there any when another device was faster, or after ``wait_s``.
        """
        with self._changed:
            self._idle.add(device)
            try:
                self._changed.wait_for(lambda: self._is_closed or self._has_work(device), wait_s)
                if self._last_num_requests > 1:
                    self._changed.wait_for(self._are_enough_here, GATHER_S)
            finally:
                self._idle.discard(device)
            if self._is_closed:
                return []
            if device == FIRST_DEVICE and self._actions:
                return self._actions.popleft()
            if asks := self._first_asks(device):
                self._last_priority = asks[0].request.priority
                self._last_num_requests = len({one.request for one in asks})
            return asks

    def joining(
        self, priority: Priority, room: int, num_in_hand: int, device: int = FIRST_DEVICE
    ) -> list[QueuedAsk]:
        """Asks that join a batch while rows of it are free; none when others' turn is due."""
        with self._changed:
            is_due = bool(self._is_closed or self._actions or self._postponed)
            if priority is Priority.INTERACTIVE:
                is_due = is_due or bool(self._requests[Priority.BULK])
            limit = min(room, self.max_batch - num_in_hand)
            return [] if is_due else self._pick(priority, limit, device)

    def clicks(self, device: int = FIRST_DEVICE) -> list[QueuedAsk]:
        """Interactive asks, which are answered within a bulk batch."""
        with self._changed:
            return self._pick(Priority.INTERACTIVE, self.max_batch, device)

    def ask_again(self, asks: Iterable[QueuedAsk]) -> None:
        """Asks whose process ended before it had answered; one that has lost two has failed."""
        with self._changed:
            for queued in asks:
                self._in_hand.pop(queued, None)
                if queued.request.may_ask_again(queued.place):
                    self._postponed.append(queued)
                else:
                    queued.request.settle(queued.place, InternalError())
            self._postponed = [one for one in self._postponed if not one.request.is_done]
            self._changed.notify_all()

    def postpone(self, asks: Iterable[QueuedAsk]) -> None:
        """Asks that had no room beside a batch in hand, whose turn is right after it."""
        with self._changed:
            for queued in asks:
                self._in_hand.pop(queued, None)
                if not queued.request.is_done:
                    self._postponed.append(queued)

    def settle(self, outcomes: Iterable[tuple[QueuedAsk, Outcome | Failure]]) -> None:
        """Gives asks their outcomes."""
        with self._changed:
            for queued, outcome in outcomes:
                self._in_hand.pop(queued, None)
                queued.request.settle(queued.place, outcome)

    def coming_images(self) -> list[AnyImage]:
        """The images of the asks whose turn comes next, a batch of each priority at most."""
        with self._changed:
            return [
                image
                for requests in self._requests.values()
                for image in islice(self._images(requests), self.max_batch)
            ]

    def note_pace(self, num_asks: int, seconds: float) -> None:
        """Learns how fast answers come, recent batches counting most."""
        if seconds > 0 and num_asks:
            rate = num_asks / seconds
            before = rate if self._asks_per_s is None else self._asks_per_s
            self._asks_per_s = (3 * before + rate) / 4

    def _seconds_for(self, num_asks: int) -> float:
        if self._asks_per_s is None:
            return FIRST_RETRY_AFTER_S
        low, high = RETRY_AFTER_S
        return min(high, max(low, num_asks / self._asks_per_s))

    def _check_open(self) -> None:
        if self._is_closed:
            raise stopped()

    def _num_waiting(self, priority: Priority) -> int:
        postponed = sum(one.request.priority is priority for one in self._postponed)
        return sum(request.num_waiting for request in self._requests[priority]) + postponed

    def _are_enough_here(self) -> bool:
        num_requests = sum(len(requests) for requests in self._requests.values())
        is_enough = num_requests >= self._last_num_requests
        return self._is_closed or bool(self._actions) or bool(self._postponed) or is_enough

    def _has_work(self, device: int) -> bool:
        if device == FIRST_DEVICE and self._actions:
            return True
        if any(_is_possible(device, one) for one in self._postponed):
            return True
        return any(self._request_for(device, priority) is not None for priority in Priority)

    def _first_asks(self, device: int) -> list[QueuedAsk]:
        if postponed := [one for one in self._postponed if _is_possible(device, one)]:
            self._postponed = [one for one in self._postponed if not _is_possible(device, one)]
            self._note_taken(postponed, device)
            return postponed
        # After a click comes a bulk batch, in which clicks go on being answered: both get on.
        is_bulk_due = self._last_priority is Priority.INTERACTIVE
        for priority in sorted(Priority, reverse=is_bulk_due):
            if asks := self._pick(priority, self.max_batch, device):
                return asks
        return []

    def _pick(self, priority: Priority, limit: int, device: int) -> list[QueuedAsk]:
        """Up to ``limit`` asks: one image of each request in turn, until the batch is full."""
        picked: list[QueuedAsk] = []
        requests = self._requests[priority]
        limit = min(limit, self._share(priority, device))
        while len(picked) < limit and (request := self._request_for(device, priority)):
            self._note_seen(request.next_image, device)
            room = limit - len(picked)
            is_cut = len(request.parts[0]) > room
            picked += request.take(room)
            if is_cut:
                # A request cut by a full batch stays first: the rest of that image comes next.
                break
            requests.remove(request)
            if request.parts:
                requests.append(request)
        self._note_taken(picked, device)
        return picked

    def _share(self, priority: Priority, device: int) -> int:
        """How many of the asks that wait a device may take.

        What is left of a run is shared, so that no device waits at its end for what another one
        has: none gets more than its part of all that is not answered, what it has in hand included.
        """
        num_waiting = self._num_waiting(priority)
        if priority is Priority.INTERACTIVE:
            # Whoever comes first answers those, whatever else it has in hand.
            return math.ceil(num_waiting / self._num_devices)
        num_own = sum(one == device for one in self._in_hand.values())
        share = math.ceil((num_waiting + len(self._in_hand)) / self._num_devices)
        return max(0, share - num_own)

    def _note_taken(self, asks: Iterable[QueuedAsk], device: int) -> None:
        if self._num_devices > 1:
            self._in_hand.update(dict.fromkeys(asks, device))

    def _request_for(self, device: int, priority: Priority) -> Request | None:
        """The first whose next asks a device may take."""
        requests = self._requests[priority]
        if self._num_devices == 1:
            return requests[0] if requests else None
        return next((one for one in requests if self._is_for(device, one)), None)

    def _is_for(self, device: int, request: Request) -> bool:
        image = request.next_image
        if isinstance(image, EncodedImage) and device != FIRST_DEVICE:
            return False
        if request.priority is Priority.BULK:
            return True
        owner = self._seen_by.get(_content_of(image), device)
        return owner == device or owner not in self._idle

    def _note_seen(self, image: object, device: int) -> None:
        if self._num_devices == 1:
            return
        self._seen_by[_content_of(image)] = device
        self._seen_by.move_to_end(_content_of(image))
        if len(self._seen_by) > MAX_PLACES:
            self._seen_by.popitem(last=False)

    def _images(self, requests: Iterable[Request]) -> Iterator[AnyImage]:
        for request in requests:
            for places in islice(request.parts, self.max_batch):
                ask = request.asks[places[0]]
                if isinstance(ask, Ask):
                    yield ask.image

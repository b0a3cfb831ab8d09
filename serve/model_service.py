"""Which checkpoint answers now: chosen, loaded, switched, put to sleep, stopped."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from florence2.api import Florence2
from florence2.engine.scheduler import Observer, Scheduler, StoppedError

logger = logging.getLogger(__name__)

MAX_QUEUED: Final = 4096
RELOADING: Final = (
    "The device failed, and the model is being loaded again; send the request again when "
    "/is_ready says so."
)
NOT_DEPLOYED: Final = (
    "No model is deployed, so nothing can be answered; choose a model and press Serve, or send "
    "the request again when /is_ready says so."
)


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A checkpoint's name, id or folder, and how it is to run."""

    name: str
    device: str = "auto"
    precision: str = "auto"
    runtime: str = "auto"


@dataclass(frozen=True, slots=True, eq=False)
class Deployed:
    """A model that has answered its self-test, and the one thread that runs it."""

    choice: ModelChoice
    model: Florence2
    scheduler: Scheduler


class Deployment:
    """At most one model at a time. Safe to use from several threads.

    Two models do not fit on every device, so the one before is freed before the next is loaded,
    and loaded again if the next one fails.

    A model whose device failed for good is loaded again, once. If that fails, or its device fails
    a second time, ``on_hopeless`` is called with a sentence: nothing but a new process helps.
    """

    def __init__(
        self,
        observer: Observer | None = None,
        *,
        max_batch: int | None = None,
        max_queued: int = MAX_QUEUED,
        load: Callable[[ModelChoice], Florence2] | None = None,
        on_hopeless: Callable[[str], None] | None = None,
    ) -> None:
        self._observer = observer
        self._on_hopeless = on_hopeless
        self._has_reloaded = False
        self._why_none = NOT_DEPLOYED
        self._max_batch = max_batch
        self._max_queued = max_queued
        self._load = load or _load
        self._current: Deployed | None = None
        self._is_frozen = False
        self._lock = threading.RLock()

    @property
    def current(self) -> Deployed:
        """The deployed model; StoppedError when there is none."""
        current = self._current
        if current is None:
            raise StoppedError(self._why_none)
        return current

    @property
    def is_deployed(self) -> bool:
        return self._current is not None

    @property
    def is_ready(self) -> bool:
        """Whether a request would be answered: a model is deployed, and its device works."""
        current = self._current
        return current is not None and not current.model.engine.is_lost

    @property
    def is_frozen(self) -> bool:
        """Whether the weights are away from the device until the next request."""
        return self._is_frozen

    def switch(self, choice: ModelChoice) -> Deployed:
        """Frees the model before and loads ``choice``; what fails leaves the one before running.

        Requests that wait are refused, to be sent again. Raises CheckpointError or DeviceError.
        """
        with self._lock:
            before = self._current
            self.stop()
            self._has_reloaded = False
            try:
                self._current = self._started(choice)
            except BaseException:
                if before is not None:
                    self._bring_back(before.choice)
                raise
            return self._current

    def stop(self) -> None:
        """Ends the model and frees its memory; nothing happens when there is none."""
        with self._lock:
            before, self._current, self._is_frozen = self._current, None, False
            self._why_none = NOT_DEPLOYED
            if before is not None:
                before.scheduler.close()
                before.model.close()

    def freeze(self) -> bool:
        """Moves the weights from the device into memory; False where they are there already."""
        with self._lock:
            current = self._current
            if current is None or current.model.device == "cpu":
                return False
            current.scheduler.call(current.model.engine.park)
            self._is_frozen = True
            return True

    def wake(self) -> None:
        """Moves the weights of a frozen model back to its device."""
        if not self._is_frozen:
            return
        with self._lock:
            current = self._current
            if self._is_frozen and current is not None:
                current.scheduler.call(current.model.engine.resume)
            self._is_frozen = False

    def _started(self, choice: ModelChoice) -> Deployed:
        # Every thread that computes gets workers of its own from OpenMP, and with more workers
        # than cores it puts them to sleep between any two operations: a request then takes three
        # times as long. So the thread that loads ends, and its workers with it.
        with ThreadPoolExecutor(1, thread_name_prefix="load") as loading:
            model = loading.submit(self._load, choice).result()
        scheduler = Scheduler(
            model.engine,
            max_batch=self._max_batch,
            max_queued=self._max_queued,
            observer=self._observer,
            on_lost=self._on_lost,
        )
        return Deployed(choice, model, scheduler)

    def _on_lost(self) -> None:
        """On the model's thread, which has to end before its model can be freed."""
        threading.Thread(target=self._reload, name="reload", daemon=True).start()

    def _reload(self) -> None:
        """Loads the model again whose device failed, unless another was chosen meanwhile."""
        with self._lock:
            lost = self._current
            if lost is None or not lost.model.engine.is_lost:
                return
            logger.error("%s: its device failed; requests in hand failed with it", lost.choice.name)
            self.stop()
            self._why_none = RELOADING
            hopeless = (
                f"The device of {lost.choice.name} failed and the model cannot be loaded again in "
                "this process; start it anew."
            )
            if not self._has_reloaded:
                self._has_reloaded = True
                self._bring_back(lost.choice)
            if self._current is not None:
                logger.warning("%s was loaded again and answers", lost.choice.name)
                return
            self._why_none = hopeless
        logger.error("%s", hopeless)
        if self._on_hopeless is not None:
            self._on_hopeless(hopeless)

    def _bring_back(self, choice: ModelChoice) -> None:
        try:
            self._current = self._started(choice)
        # The error that is on its way up says why; that nothing runs now is for the log.
        except Exception:
            logger.exception("%s could not be loaded again", choice.name)


def _load(choice: ModelChoice) -> Florence2:
    return Florence2.load(choice.name, choice.device, choice.runtime, precision=choice.precision)

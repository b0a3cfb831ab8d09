"""The registry of requests, told which of them somebody stands waiting for."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

from florence2.errors import FlorenceError, GenerationCancelledError, QueueFullError, as_value
from serve.platform.failures import FailedImageError, platform_failure
from serve.sdk import sly

Manager: TypeAlias = sly.nn.inference.inference_request.InferenceRequestsManager
InferenceRequest: TypeAlias = sly.nn.inference.inference_request.InferenceRequest
AWAITED: Final = "awaited"
FORGET_AFTER_S: Final = 60
MAX_SCHEDULED: Final = 1000
_RETRY_AFTER_S: Final = 5.0
_LOOK_AFTER_S: Final = 0.1


class PausedTooLongError(FlorenceError):
    """Nobody fetched results for so long that the run is given up."""

    code = "cancelled"


def wait_while_paused(request: InferenceRequest) -> None:
    """Returns once results were fetched, or the run was stopped.

    The SDK pauses a run at 500 results that wait to be fetched. PausedTooLongError after an hour.
    """
    if request.context.get(AWAITED) or not request.is_paused():
        return
    sly.logger.info("The run waits until its results are fetched.")
    while request.is_paused() and not request.is_stopped():
        if request.paused_for() > request.PAUSE_SLEEP_MAX_WAIT:
            raise PausedTooLongError(
                f"The run was given up, because nobody fetched its {request.pending_num()} "
                "results; fetch them while it goes on."
            )
        time.sleep(_LOOK_AFTER_S)


@contextmanager
def ended_when_stopped(request: InferenceRequest) -> Iterator[None]:
    """What ends work because its request was stopped is no error of it."""
    try:
        yield
    except GenerationCancelledError:
        if not request.is_stopped():
            raise


class _Request(InferenceRequest):  # type: ignore[misc]
    """A request that says that it goes on until it has ended, and has all that came of it.

    The SDK's says so in the one stage of asking the model. Clients that look in another stage stop
    to wait: before it they take nothing for the answer, and after it they miss the last part.
    """

    def is_inferring(self) -> bool:
        """Whether more may come of it."""
        return not self.is_finished()

    def is_expired(self) -> bool:
        """Only one that has ended: the SDK stops what counted nothing done for an hour, such as a
        run that waits for its turn or writes the figures of a long video."""
        return self.is_finished() and bool(super().is_expired())


class RequestsManager(Manager):  # type: ignore[misc]
    """The SDK's registry, whose ``run`` marks the request as awaited and soon forgets it.

    The SDK pauses every run at 500 results that nobody has fetched. The caller of ``run`` fetches
    at the end only, so that pause would last until it is given up an hour later.
    """

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        super().__init__(executor)
        self._places = threading.BoundedSemaphore(MAX_SCHEDULED)

    def create(self, inference_request_uuid: str | None = None) -> InferenceRequest:
        """A new request; the SDK names it after the time, which two may share and all can guess."""
        request = _Request(uuid_=inference_request_uuid or uuid.uuid4().hex, manager=self)
        self.add(request)
        return request

    def knows(self, inference_request_uuid: str) -> bool:
        """Whether there is such a request; does not block."""
        return inference_request_uuid in self._inference_requests

    def stop_all(self) -> None:
        """Everything that runs or waits for its turn ends with what it has done."""
        for request in list(self._inference_requests.values()):
            if not request.is_finished():
                request.stop()

    def wait_until_finished(self, limit_s: float) -> None:
        """Returns once all requests are over, or after ``limit_s``."""
        end_s = time.monotonic() + limit_s
        while time.monotonic() < end_s and not all(
            request.is_finished() for request in list(self._inference_requests.values())
        ):
            time.sleep(_LOOK_AFTER_S)

    def schedule_task(self, func: Any, *args: Any, **kwargs: Any) -> tuple[InferenceRequest, Any]:  # noqa: ANN401
        """Work behind an answer; the SDK's line for it has no end. QueueFullError."""
        if not self._places.acquire(blocking=False):
            raise QueueFullError(
                f"At most {MAX_SCHEDULED} runs are taken on at a time, and all of these places are "
                "taken; send the request again later.",
                _RETRY_AFTER_S,
            )
        try:
            request, future = super().schedule_task(func, *args, **kwargs)
        except BaseException:
            self._places.release()
            raise
        future.add_done_callback(self._leave_place)
        return request, future

    def _leave_place(self, _future: Future[Any]) -> None:
        self._places.release()

    def _handle_error_in_async(
        self,
        inference_request_uuid: str,
        *work: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """A failed request is kept for an hour, and with its error's frames all it worked on.

        An error of the way to the platform is told as one, in a sentence.
        """
        request = self._inference_requests.get(inference_request_uuid)
        try:
            return super()._handle_error_in_async(inference_request_uuid, *work)
        finally:
            if request is not None and request.exception is not None:
                if (failure := platform_failure(request.exception)) is not None:
                    request.exception = FailedImageError(failure)
                as_value(request.exception)

    def run(self, func: Any, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:  # noqa: ANN401
        """The results of ``func``, or its error; blocks.

        In the caller's own thread: the SDK's takes another one, from those of the work that goes on
        in the background, and waits for it.
        """
        request: InferenceRequest = kwargs.get("inference_request") or self.create()
        kwargs["inference_request"] = request
        request.context[AWAITED] = True
        try:
            self._on_inference_start(request)
            self._handle_error_in_async(request.uuid, func, args, kwargs)
            self._on_inference_end(None, request.uuid)
            if request.exception is not None:
                raise request.exception
            results: list[dict[str, Any]] = request.pop_pending_results()
            return results
        finally:
            self.remove_after(request.uuid, FORGET_AFTER_S)

"""What all runs over images of the platform share: what the app gives them, and their books."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

from florence2.budget import Budget
from florence2.engine.ask import Ask
from florence2.engine.encoding import AnyImage
from florence2.errors import FlorenceError
from florence2.records import Failure, Result
from serve.limits import FailureLimit
from serve.platform.failures import (
    FailedImageError,
    NotFoundError,
    PartialFailureError,
    failure_of,
)
from serve.platform.images import Target
from serve.platform.registry import InferenceRequest
from serve.platform.request_state import State
from serve.predict.predictor import AheadImage, Call, Predicted
from serve.sdk import sly
from serve.settings import Settings

_SHOWN_IDS: Final = 20


class ModelChangedError(FlorenceError):
    """Another model was deployed while a run went on, whose labels say which model made them."""

    code = "not_deployed"


@dataclass(frozen=True, slots=True)
class RunServices:
    """What runs need of the app, the same for all of them.

    ``predict`` and ``ask`` give an outcome for each image or question, in order. ``settings_of``
    makes settings of a request's state; what it raises ends the run. ``upload`` is the SDK's
    ``upload_predictions``, bound to the app. ``budget`` is of the bytes of images that the process
    holds. ``task_id`` names created projects. ``model_of`` tells for a run's manifest which model
    answers, and StoppedError while none does; ``is_model_coming`` whether one is being loaded. Each
    of the ``num_devices`` that answer side by side gets a batch. ``prepare`` makes images ready
    for ``predict`` ahead of their turn, and leaves what it cannot. ``learn`` is told of classes
    that clients get without a prediction of ours. ``resume_command`` is what goes on with a run
    that was typed.
    """

    predict: Callable[
        [Sequence[AnyImage | AheadImage], Settings, Call], Sequence[Predicted | Failure]
    ]
    ask: Callable[[Sequence[Ask], Call], Sequence[Result | Failure]]
    settings_of: Callable[[State], Settings]
    upload: Callable[..., None]
    budget: Budget
    task_id: int | None
    default_batch_size: int
    model_of: Callable[[Settings], Mapping[str, Any]] = field(default=lambda settings: {})
    is_model_coming: Callable[[], bool] = field(default=lambda: False)
    num_devices: int = 1
    prepare: Callable[[Sequence[Any], Settings, Call], Sequence[Any]] = field(
        default=lambda images, settings, call: images
    )
    learn: Callable[[sly.Annotation], None] = field(default=lambda annotation: None)
    resume_command: str | None = None

    def check_model(self, settings: Settings, began_with: Mapping[str, Any]) -> None:
        """ModelChangedError where another model answers now, StoppedError where none does."""
        current = dict(self.model_of(settings))
        if current != began_with:
            raise ModelChangedError(
                f"The run began with {_named(began_with)}, and {_named(current)} was deployed "
                "while it went on; deploy the one before again, or give the rest a run of its own."
            )


def _named(model: Mapping[str, Any]) -> str:
    """A model as a manifest tells of it."""
    return " ".join(str(value) for value in model.values()) or "no model"


FAILED_IMAGES: Final = sly.logger.getChild("failed_images")
"""Names each image that failed once a run is over, for those who have no report of it."""


class Ledger:
    """The books of one run, from its first image to its end; a context around its work.

    ``lost``: what an image that failed has not got. ``num_before`` of the ``total`` images were
    done before, by the run that this one goes on with.

    A run that went through ends with PartialFailureError if images failed and it ``must_be_whole``,
    and otherwise with FailedImageError, the first failure, if all failed; one that was stopped with
    neither. One that an error broke off: PartialFailureError if images were done, else the error.
    """

    def __init__(
        self,
        request: InferenceRequest,
        total: int,
        lost: str,
        *,
        must_be_whole: bool,
        num_before: int = 0,
    ) -> None:
        self._request = request
        self._total = total
        self._lost = lost
        self._must_be_whole = must_be_whole
        self._num_before = self._num_done = num_before
        self._failures: list[tuple[int, Failure]] = []
        request.set_stage(InferenceRequest.Stage.INFERENCE, num_before, total)

    def add_done(self, entries: list[dict[str, Any]], count: int) -> None:
        """``count`` more images are done; ``entries`` are the results of these and of others."""
        self._request.add_results(entries)
        self._num_done += count
        if count:
            self._request.done(count)

    def add_failure(self, target: Target, failure: Failure) -> bool:
        """False for an image that a stopped run has merely not got to: that is no failure."""
        if failure.code == "cancelled" and self._request.is_stopped():
            return False
        self._failures.append((target.image_id, failure))
        self._request.done(1)
        return True

    def check(self, limit: FailureLimit) -> None:
        """Raises TooManyFailuresError once more images failed than may."""
        num_failed = len(self._failures)
        limit.check(num_failed, self._num_done - self._num_before + num_failed)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        sly.logger.info(
            f"Run over images: {self._num_done} of {self._total} done, "
            f"{len(self._failures)} failed."
        )
        for image_id, failure in self._failures:
            FAILED_IMAGES.warning(f"Image {image_id} failed: {failure.message}")
        if isinstance(error, Exception):
            if self._num_done:
                raise self._broken_off(error) from error
        elif error is None and self._failures and not self._request.is_stopped():
            self._raise_failures(self._failures[0][1])

    def _broken_off(self, error: Exception) -> PartialFailureError:
        failed = f" {len(self._failures)} of the images failed ({self._ids})."
        cause = failure_of(error, "The run failed")
        advice = "" if cause.code == NotFoundError.code else " Start it again for the rest."
        return PartialFailureError(
            f"The run stopped after {self._num_done} of {self._total} images were done: "
            f"{cause.message}{failed if self._failures else ''}{advice}"
        )

    def _raise_failures(self, first: Failure) -> None:
        count = len(self._failures)
        if count == self._total and (count == 1 or not self._must_be_whole):
            raise FailedImageError(first)
        if self._must_be_whole:
            verb = "has" if count == 1 else "have"
            others = " The others are done." if count < self._total else ""
            raise PartialFailureError(
                f"{count} of {self._total} images failed and {verb} {self._lost} ({self._ids}), "
                f"the first because: {first.message}{others} Send these ids again."
            )

    @property
    def _ids(self) -> str:
        ids = [str(image_id) for image_id, _ in self._failures]
        more = f" and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else ""
        return f"{'id' if len(ids) == 1 else 'ids'} {', '.join(ids[:_SHOWN_IDS])}{more}"

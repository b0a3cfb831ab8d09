"""What a run has done and what failed, and how it ends."""

from __future__ import annotations

from florence2.records import Failure
from serve.platform.failures import (
    FailedImageError,
    ImageFailure,
    failed_in_part,
    stopped_early,
)
from serve.platform.images import Target
from serve.platform.registry import InferenceRequest
from serve.sdk import sly


class Ledger:
    """The books of one run. ``lost``: what an image that failed has not got.

    Failures are in ``request.context["failures"]`` from the moment they happen.
    """

    def __init__(self, request: InferenceRequest, total: int, lost: str) -> None:
        self._request = request
        self._total = total
        self._lost = lost
        self._num_done = 0
        self._failures: list[ImageFailure] = []
        self._log: list[dict[str, object]] = request.context.setdefault("failures", [])

    def done(self, count: int) -> None:
        """``count`` more images are done."""
        self._num_done += count
        if count:
            self._request.done(count)

    def fail(self, target: Target, failure: Failure) -> bool:
        """Records a failure; False for an image that a stopped run has merely not got to."""
        if failure.code == "cancelled" and self._request.is_stopped():
            return False
        failed = ImageFailure(target.image_id, target.name, failure)
        self._failures.append(failed)
        self._log.append(failed.to_json())
        self._request.done(1)
        return True

    def close(self, *, must_be_whole: bool) -> None:
        """The end of a run that went through, or was stopped.

        PartialFailureError if images failed and the run ``must_be_whole``. Otherwise
        FailedImageError, with the first failure, if all failed.
        """
        self._summarize()
        if not self._failures or self._request.is_stopped():
            return
        if len(self._failures) == self._total and (self._total == 1 or not must_be_whole):
            raise FailedImageError(self._failures[0].failure)
        if must_be_whole:
            raise failed_in_part(self._failures, self._total, self._lost)

    def close_broken(self, error: Exception) -> None:
        """The end of a run that ``error`` broke off: PartialFailureError if images were done."""
        self._summarize()
        if self._num_done:
            raise stopped_early(error, self._num_done, self._total, self._failures) from error

    def _summarize(self) -> None:
        sly.logger.info(
            f"Run over images: {self._num_done} of {self._total} done, "
            f"{len(self._failures)} failed."
        )
        for failed in self._failures:
            sly.logger.warning(f"Image {failed.image_id} failed: {failed.failure.message}")

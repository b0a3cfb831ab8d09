"""Runs over images of the platform, in place of the SDK's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from florence2.engine.ask import AnyImage
from florence2.errors import DeviceLostError, FlorenceError
from florence2.records import Failure
from serve.platform.failures import (
    FailedImageError,
    ImageFailure,
    failed_in_part,
    failure_of,
    stopped_early,
)
from serve.platform.images import (
    Destination,
    Download,
    HasAnnotation,
    Images,
    RunServices,
    Source,
    State,
    Target,
    batch_size_of,
    destination_of,
    ids_source,
    project_source,
    resolve,
)
from serve.platform.pipeline import (
    FULL_CODES,
    Batch,
    Behind,
    fetch_ahead,
    room_for_downloads,
    split_batches,
    wait_while_paused,
    when_queue_has_room,
)
from serve.platform.registry import InferenceRequest
from serve.platform.upload import (
    MAX_FAILED_BATCHES,
    Labeled,
    Uploading,
    failed_entry,
    predicted_entry,
)
from serve.sdk import sly
from serve.settings import Settings


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


Outcome = HasAnnotation | Failure
Settled = tuple[Batch, Sequence[Outcome]]

# These end a run whatever the image: the request is wrong, or the model is gone.
FATAL_CODES = FULL_CODES | {"bad_request", "cancelled", "device_lost", "not_deployed", "not_found"}


def run_image_ids(
    api: sly.Api, state: State, request: InferenceRequest, services: RunServices
) -> None:
    """Predicts the images whose ids are in ``state``; results go to ``request``.

    Without an upload the results carry the failures too, and only a run where all images failed
    raises: the first failure. With an upload, PartialFailureError for any image that failed.
    """
    destination = destination_of(state)
    run = _prepare(services, api, state, request, ids_source(state), destination)
    run.work(must_be_whole=destination.mode is not None)


def run_project(
    api: sly.Api, state: State, request: InferenceRequest, services: RunServices
) -> None:
    """Predicts a project's images; PartialFailureError at the end for any image that failed."""
    run = _prepare(services, api, state, request, project_source(state), destination_of(state))
    run.work(must_be_whole=True)


def _prepare(
    services: RunServices,
    api: sly.Api,
    state: State,
    request: InferenceRequest,
    source: Source,
    destination: Destination,
) -> ImagesRun:
    batch_size = batch_size_of(state, services.default_batch_size)
    settings = services.settings_of(state, api)
    images = resolve(api, source)
    if destination.mode is not None:
        images = images.without_repeats()
    request.context.setdefault("dataset_info", {}).update(images.datasets)
    return ImagesRun(services, api, request, images, settings, batch_size, destination)


def fetch_batch(download: Download, api: sly.Api, batch: Batch) -> list[AnyImage]:
    """An image or a Failure for every target of the batch."""
    infos = [target.info for target in batch if target.failure is None]
    found = iter(download(api, infos) if infos else [])
    return [next(found) if target.failure is None else target.failure for target in batch]


@dataclass(frozen=True)
class ImagesRun:
    """One run: what is to be done with which images."""

    services: RunServices
    api: sly.Api
    request: InferenceRequest
    images: Images
    settings: Settings
    batch_size: int
    destination: Destination

    def work(self, *, must_be_whole: bool) -> None:
        """Does all images, or stops when the request is stopped; see ``run_image_ids``."""
        total = len(self.images.targets)
        self.request.set_stage(InferenceRequest.Stage.INFERENCE, 0, total)
        lost = "new labels" if self.destination.mode else "result"
        ledger = Ledger(self.request, total, f"no {lost}")
        try:
            self._predict_all(self._settler(ledger))
        except Exception as error:
            ledger.close_broken(error)
            raise
        ledger.close(must_be_whole=must_be_whole)

    def _predict_all(self, settle: Callable[[Settled], None]) -> None:
        behind: Behind[Settled] = Behind(settle)
        batches = split_batches(self.images.targets, self.batch_size)
        fetched = fetch_ahead(
            batches,
            lambda batch: fetch_batch(self.services.download, self.api, batch),
            room=room_for_downloads(self.request, is_bulk=len(self.images.targets) > 1),
        )
        try:
            with closing(fetched):
                for batch, images in fetched:
                    if self.destination.mode is None:
                        wait_while_paused(self.request)
                    if self.request.is_stopped():
                        break
                    try:
                        outcomes = self._predict(images)
                    except DeviceLostError as error:
                        # The run ends here, and says which images it ends with.
                        lost = failure_of(error, "The device failed")
                        behind.put((batch, [lost] * len(batch)))
                        raise
                    behind.put((batch, outcomes))
        finally:
            behind.finish()

    def _predict(self, images: Sequence[AnyImage]) -> Sequence[Outcome]:
        try:
            return self._ask(images)
        except Exception as error:
            if self.request.is_stopped():
                return [Failure("cancelled", "The run was stopped.")] * len(images)
            if isinstance(error, FlorenceError) and error.code in FATAL_CODES:
                raise
            sly.logger.error(f"{len(images)} images cannot be predicted", exc_info=True)
            if len(images) == 1:
                return [failure_of(error, "The image cannot be predicted")]
        return [outcome for image in images for outcome in self._predict([image])]

    def _ask(self, images: Sequence[AnyImage]) -> Sequence[Outcome]:
        usable = [image for image in images if not isinstance(image, Failure)]
        outcomes = iter(self._ask_model(usable) if usable else [])
        return [image if isinstance(image, Failure) else next(outcomes) for image in images]

    def _ask_model(self, images: Sequence[AnyImage]) -> Sequence[Outcome]:
        is_bulk = len(self.images.targets) > 1

        def call() -> Sequence[Outcome]:
            return self.services.predict(
                images,
                self.settings,
                api=self.api,
                is_bulk=is_bulk,
                should_stop=self.request.is_stopped,
            )

        outcomes = when_queue_has_room(call, self.request.is_stopped) if is_bulk else call()
        if len(outcomes) != len(images):
            raise RuntimeError(f"{len(images)} images were predicted with {len(outcomes)} results")
        for outcome in outcomes:
            if isinstance(outcome, Failure) and outcome.code == DeviceLostError.code:
                raise DeviceLostError(outcome.message)
            if isinstance(outcome, Failure) and outcome.code == "not_deployed":
                raise FailedImageError(outcome)
        return outcomes

    def _settler(self, ledger: Ledger) -> Callable[[Settled], None]:
        if self.destination.mode is None:
            return lambda settled: self._return(settled, ledger)
        uploading = Uploading(self.services, self.api, self.destination, self.request)
        return lambda settled: self._upload(settled, uploading, ledger)

    def _return(self, settled: Settled, ledger: Ledger) -> None:
        entries = []
        done = 0
        for target, outcome in zip(*settled, strict=True):
            if not isinstance(outcome, Failure):
                entries.append(predicted_entry(self.services, target, outcome))
                done += 1
            elif ledger.fail(target, outcome):
                entries.append(failed_entry(self.services, target, outcome))
        self.request.add_results(entries)
        ledger.done(done)

    def _upload(self, settled: Settled, uploading: Uploading, ledger: Ledger) -> None:
        labeled = [
            Labeled(target, outcome.annotation)
            for target, outcome in zip(*settled, strict=True)
            if not isinstance(outcome, Failure)
        ]
        failures = uploading.upload(labeled)
        entries = []
        done = 0
        for target, outcome in zip(*settled, strict=True):
            failure = outcome if isinstance(outcome, Failure) else failures.get(target.image_id)
            if failure is None:
                done += 1
            elif ledger.fail(target, failure):
                entries.append(failed_entry(self.services, target, failure))
        self.request.add_results(entries)
        ledger.done(done)
        if uploading.is_hopeless:
            last = next(iter(failures.values()))
            raise FailedImageError(
                Failure(
                    last.code,
                    f"{MAX_FAILED_BATCHES} batches in a row could not be uploaded: {last.message}",
                )
            )

"""Predictions for images of the platform, in place of the SDK's own runs."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from florence2.budget import Hold
from florence2.engine.encoding import AnyImage
from florence2.engine.scheduler import Priority
from florence2.errors import DeviceLostError, FlorenceError, RequestError
from florence2.records import Failure
from serve.limits import FailureLimit
from serve.platform.failures import FailedImageError, NotFoundError, failure_json, failure_of
from serve.platform.images import (
    Target,
    check_project_is_there,
    download_images,
    each_or_failure,
    resolve,
)
from serve.platform.patience import Patience, at_once
from serve.platform.pipeline import (
    Batch,
    fetch_ahead,
    split_batches,
)
from serve.platform.reference import resolve_reference
from serve.platform.registry import InferenceRequest, ended_when_stopped, wait_while_paused
from serve.platform.request_state import (
    Destination,
    Source,
    State,
    batch_size_of,
    check_resume,
    is_about_one_image,
)
from serve.platform.run import Ledger, ModelChangedError, RunServices
from serve.platform.run_records import RunRecord
from serve.platform.upload import (
    Labeled,
    Uploading,
    entry_of,
    uploaded_entry,
    with_words_described,
)
from serve.predict.details import slides_of
from serve.predict.full_queue import FULL_CODES, when_queue_has_room
from serve.predict.predictor import AHEAD_BYTES, AheadImage, Call, Deadline, Predicted
from serve.sdk import sly
from serve.settings import Settings, has_sliding_window
from serve.settler import Settler


@dataclass(frozen=True, slots=True)
class AlreadyLabeled:
    """An image that is not asked about, because of the labels that it has.

    ``by_this_run``: it had written them when it was cut off, and not noted. The others are skipped.
    """

    by_this_run: bool


Outcome = Predicted | Failure | AlreadyLabeled
Settled = tuple[Batch, Sequence[Outcome]]
Images = Sequence[AnyImage | AheadImage | AlreadyLabeled]
Asked = tuple[Batch, Images, Future[list[Outcome]]]
"""A batch that the model is asked about."""

# These end a run whatever the image: the request is wrong, or the model is gone.
FATAL_CODES: Final = FULL_CODES | {
    "bad_request",
    "cancelled",
    "cluster",
    "device_lost",
    "not_deployed",
    "not_found",
}
MAX_FAILED_BATCHES: Final = 3
_MAX_LOADING_S: Final = 600.0
_MAX_LOADINGS: Final = 5
_LOOK_AFTER_S: Final = 0.1
# While the labels of one batch are made, the model answers the next, whose prompts take the rows
# that become free.
_BATCHES_ASKED: Final = 2


def run_image_ids(
    api: sly.Api, state: State, request: InferenceRequest, services: RunServices
) -> None:
    """Predicts the images whose ids are in ``state``; results go to ``request``.

    Without an upload the results carry the failures too, and only a run where all images failed
    raises: the first failure. With an upload, PartialFailureError for any image that failed.
    """
    deadline, destination = Deadline.of(state), Destination.of(state)
    run = PredictionRun(services, api, state, request, Source.of_ids(state), destination, deadline)
    run.work(must_be_whole=destination.mode is not None)


def run_project(
    api: sly.Api, state: State, request: InferenceRequest, services: RunServices
) -> None:
    """Predicts a project's images; PartialFailureError at the end for any image that failed.

    With ``resume`` in ``state`` it goes on with the newest run of the same settings and model that
    wrote to the project: what is done is left alone, what failed is tried again.
    """
    deadline, source = Deadline.of(state), Source.of_project(state)
    # It may be stopped while it waits for a sign of who worked on the run before.
    with ended_when_stopped(request):
        run = PredictionRun(services, api, state, request, source, Destination.of(state), deadline)
        run.work(must_be_whole=True)


class PredictionRun:
    """One run: what is to be done with which images."""

    def __init__(
        self,
        services: RunServices,
        api: sly.Api,
        state: State,
        request: InferenceRequest,
        source: Source,
        destination: Destination,
        deadline: Deadline,
    ) -> None:
        self._services = services
        self._api = api
        self._request = request
        self._deadline = deadline
        self._limit = FailureLimit.parse(state.get("max_failures"))
        self._is_about_one = is_about_one_image(state)
        self._shows_windows = self._is_about_one and has_sliding_window(state.get("settings"))
        asked_size = batch_size_of(state, services.default_batch_size)
        self._batch_size = asked_size * services.num_devices
        self._settings = self._settings_of(state)
        check_resume(state, source, destination)
        images = resolve(api, source)
        is_writing = destination.mode is not None
        targets = images.without_repeats().targets if is_writing else images.targets
        self._is_bulk = len(targets) > 1
        # Somebody waits for a single image.
        self._patience: Patience | None = None
        if self._is_bulk:
            first = next((one.project_id for one in targets if one.project_id), None)
            self._patience = Patience(partial(_any_answer, api, first), request.is_stopped)
        self._uploading: Uploading | None = None
        self._record: RunRecord | None = None
        self._skipped: tuple[Target, ...] = ()
        self._num_before, self._is_over = 0, False
        self._model: dict[str, Any] = {}
        if is_writing:
            self._model = dict(services.model_of(self._settings))
            record = RunRecord(
                api,
                self._settings,
                self._model,
                destination,
                len(targets),
                self._patience,
                is_of_project=source.project_id is not None,
                is_copying=any(destination.is_copying(one.project_id) for one in targets),
                resume_command=services.resume_command,
            )
            if state.get("resume") and source.project_id is not None:
                ids = {target.image_id for target in targets}
                done = record.resume(source.project_id, ids, request.is_stopped)
                targets = tuple(one for one in targets if one.image_id not in done)
                self._num_before = len(done)
            if destination.mode == "skip_labeled" and not record.is_resumed:
                self._skipped = tuple(one for one in targets if _has_labels(one))
                targets = tuple(one for one in targets if not _has_labels(one))
            self._record = record
            self._uploading = Uploading(services, api, destination, request, record, self._patience)
        self._targets = targets
        self._destination = destination
        request.context.setdefault("dataset_info", {}).update(images.datasets)

    @property
    def num_before(self) -> int:
        """How many images an earlier run had done, with which this one goes on."""
        return self._num_before

    @property
    def num_pending(self) -> int:
        """How many images there are to do."""
        return len(self._targets)

    @property
    def record(self) -> RunRecord | None:
        """The books of a run that writes."""
        return self._record

    def _settings_of(self, state: State) -> Settings:
        """A reference on one image is looked at once for all the images of a run."""
        settings = self._services.settings_of(state)
        if settings.reference is None or settings.reference.image_id is None:
            return settings
        call = Call(api=self._api)
        return resolve_reference(
            settings, self._api, lambda asks: self._services.ask(asks, call), image=None
        )

    def work(self, *, must_be_whole: bool) -> None:
        """Does all images, or stops when the request is stopped; see ``run_image_ids``."""
        lost = "no result" if self._uploading is None else "no new labels"
        fetched = fetch_ahead(
            split_batches(self._targets, self._batch_size),
            self._fetch,
            self._services.budget,
            self._request.is_stopped,
            is_bulk=self._is_bulk,
            more_bytes=AHEAD_BYTES if self._is_bulk else 0,
        )
        with (
            ExitStack() as books,
            Ledger(
                self._request,
                len(self._targets) + self._num_before,
                lost,
                must_be_whole=must_be_whole,
                num_before=self._num_before,
            ) as ledger,
            Settler[Settled](lambda settled: self._settle(settled, ledger)) as settler,
            closing(fetched),
            closing(self._asked(fetched)) as asked,
        ):
            if self._record is not None:
                books.enter_context(self._record)
                books.callback(self._tell_record_of_stop)
                self._skip()
            is_suspect = False
            for batch, images, answers in asked:
                try:
                    outcomes = self._outcomes(answers, images, again=is_suspect)
                except DeviceLostError as error:
                    # They are named; the others are asked of the model once it is loaded again.
                    failed = failure_of(error, "The device failed")
                    settler.put((batch, [_told_without_model(one) or failed for one in images]))
                    if not self._model_came_back():
                        raise
                    # The next one may be lost for having been asked beside these.
                    is_suspect = True
                    continue
                is_suspect = False
                self._tell_record_of_answers(batch, images, outcomes)
                settler.put((batch, outcomes))

    def _asked(self, fetched: Iterable[tuple[Batch, Images, Hold]]) -> Generator[Asked]:
        """Each batch, in order, once the one after it is asked about too. Of a run that is stopped
        those that are in hand. Close it, and nobody waits for what is not answered."""
        in_hand: deque[Asked] = deque()
        with ThreadPoolExecutor(_BATCHES_ASKED, thread_name_prefix="predict") as pool:
            try:
                for batch, images, hold in fetched:
                    if self._request.is_stopped():
                        hold.release()
                        break
                    answers = pool.submit(self._predict, images)
                    answers.add_done_callback(partial(_release, hold))
                    in_hand.append((batch, images, answers))
                    if len(in_hand) == _BATCHES_ASKED:
                        yield in_hand.popleft()
                    if self._uploading is None and self._request.is_paused():
                        yield from in_hand
                        in_hand.clear()
                        wait_while_paused(self._request)
                yield from in_hand
            finally:
                self._is_over = True

    def _outcomes(
        self, answers: Future[list[Outcome]], images: Images, *, again: bool
    ) -> list[Outcome]:
        """What a batch was answered; where it was lost with the device, ``again`` once."""
        try:
            return answers.result()
        except DeviceLostError:
            if not again:
                raise
        return self._predict(images)

    def _skip(self) -> None:
        """Images that have labels already are done."""
        entries = [entry_of(target, skipped=True) for target in self._skipped]
        self._request.add_results(entries)
        for target in self._skipped:
            self._note(target, is_skipped=True)

    def _note(
        self, target: Target, failure: Failure | None = None, *, is_skipped: bool = False
    ) -> None:
        """What became of an image, in the record of a run that writes."""
        if self._record is None or self._uploading is None:
            return
        project_id, copied_to = self._uploading.written_to(target)
        self._record.settled(
            project_id, target, failure, copied_to=copied_to, is_skipped=is_skipped
        )

    def _tell_record_of_answers(
        self,
        batch: Batch,
        images: Images,
        outcomes: Sequence[Outcome],
    ) -> None:
        """While the images are in memory: some of their labels are drawn."""
        if self._record is None:
            return
        for target, image, outcome in zip(batch, images, outcomes, strict=True):
            if isinstance(outcome, Predicted):
                file = image.content if isinstance(image, AheadImage) else image
                self._record.answered(target, file, outcome)

    def _tell_record_of_stop(self) -> None:
        if self._record is not None and self._request.is_stopped():
            self._record.stopped()

    def _fetch(self, batch: Batch) -> Images:
        """For every target of the batch what the model is to see, a Failure, or that it needs no
        answer. Of many images it is made ready here, as the model would wait for it."""
        images = self._download(batch)
        if not self._is_bulk:
            return images
        call = Call(Priority.BULK, should_stop=self._request.is_stopped)
        return self._services.prepare(images, self._settings, call)

    def _download(self, batch: Batch) -> list[AnyImage | AlreadyLabeled]:
        """For every target of the batch an image, a Failure, or that it needs no answer."""
        known = self._already_labeled(batch)
        infos = [one.info for one in batch if one.failure is None and one.image_id not in known]
        tried = at_once if self._patience is None else self._patience.tried
        downloaded = iter(download_images(self._api, infos, tried))
        found = [
            target.failure or known.get(target.image_id) or next(downloaded) for target in batch
        ]
        is_all_lost = all(isinstance(one, Failure) for one in found)
        if self._patience is not None and is_all_lost and not self._request.is_stopped():
            self._check_projects_are_there(batch)
        return found

    def _check_projects_are_there(self, batch: Batch) -> None:
        """NotFoundError where no image of a batch came, as there is no project any more."""
        for project_id in {target.project_id for target in batch}:
            try:
                check_project_is_there(self._api, project_id)
            except NotFoundError:
                raise
            except Exception as error:  # noqa: BLE001  (the SDK and its transport raise anything)
                sly.logger.warning(f"Project {project_id} cannot be looked up: {error!r}")

    def _already_labeled(self, batch: Batch) -> dict[int, AlreadyLabeled | Failure]:
        """Of a run that goes on: the images that it had labeled when it was cut off, and in the
        mode for unlabeled images those that somebody else has labeled."""
        record, uploading = self._record, self._uploading
        if record is None or uploading is None or not record.is_resumed:
            return {}
        ids_of: dict[int | None, list[Target]] = defaultdict(list)
        for target in batch:
            is_in_place = uploading.written_to(target) == (target.project_id, None)
            may_be_done = _has_labels(target) or record.is_intended(target.image_id)
            if target.failure is None and is_in_place and may_be_done:
                ids_of[target.dataset_id].append(target)
        found: dict[int, AlreadyLabeled | Failure] = {}
        tried = at_once if self._patience is None else self._patience.tried
        for dataset_id, group in ids_of.items():
            read = partial(self._api.annotation.download_json_batch, dataset_id)
            # Others were only to be labeled when the run was cut off.
            labeled = {one.image_id for one in group if _has_labels(one)}
            stored = each_or_failure([one.image_id for one in group], read, _unread, tried)
            for image_id, annotation in stored.items():
                if isinstance(annotation, Failure):
                    found[image_id] = annotation
                elif record.found(image_id, annotation, group[0].project_id or 0):
                    found[image_id] = AlreadyLabeled(by_this_run=True)
                elif self._destination.mode == "skip_labeled" and image_id in labeled:
                    found[image_id] = AlreadyLabeled(by_this_run=False)
        return found

    def _predict(self, images: Images) -> list[Outcome]:
        """An outcome for every image; where all fail together, each is tried alone."""
        try:
            usable = [one for one in images if not isinstance(one, Failure | AlreadyLabeled)]
            predicted = iter(self._ask_model(usable) if usable else ())
            return [_told_without_model(one) or next(predicted) for one in images]
        except Exception as error:
            if self._has_to_stop():
                cancelled = Failure("cancelled", "The run was stopped.")
                return [_told_without_model(one) or cancelled for one in images]
            if isinstance(error, FlorenceError) and error.code in FATAL_CODES:
                raise
            sly.logger.error(f"{len(images)} images cannot be predicted", exc_info=True)
            if len(images) == 1:
                return [failure_of(error, "The image cannot be predicted")]
        return [outcome for image in images for outcome in self._predict([image])]

    def _ask_model(self, images: Sequence[AnyImage | AheadImage]) -> Sequence[Outcome]:
        """The answers of the model that the run began with, which may have to be loaded again."""
        for _ in range(_MAX_LOADINGS):
            try:
                return self._answers_of(images)
            except ModelChangedError:
                raise
            except FlorenceError as error:
                if error.code != "not_deployed" or not self._model_came_back():
                    raise
        return self._answers_of(images)

    def _model_came_back(self) -> bool:
        """Whether the model is there again that was away while it, or another, was loaded."""
        if not self._is_bulk:
            return False
        for _ in range(round(_MAX_LOADING_S / _LOOK_AFTER_S)):
            if self._has_to_stop() or not self._services.is_model_coming():
                break
            time.sleep(_LOOK_AFTER_S)
        try:
            return bool(self._services.model_of(self._settings))
        except FlorenceError:
            return False

    def _check_model(self) -> None:
        """ModelChangedError where it is not the one that the record names."""
        if self._record is not None and self._is_bulk:
            self._services.check_model(self._settings, self._model)

    def _answers_of(self, images: Sequence[AnyImage | AheadImage]) -> Sequence[Outcome]:
        should_stop = self._has_to_stop

        def predict() -> Sequence[Outcome]:
            priority = Priority.BULK if self._is_bulk else Priority.INTERACTIVE
            call = Call(priority, self._deadline.left_s, should_stop, self._api)
            return self._services.predict(images, self._settings, call)

        outcomes = when_queue_has_room(predict, should_stop) if self._is_bulk else predict()
        if len(outcomes) != len(images):
            raise RuntimeError(f"{len(images)} images were predicted with {len(outcomes)} results")
        for outcome in outcomes:
            if isinstance(outcome, Failure) and outcome.code == DeviceLostError.code:
                raise DeviceLostError(outcome.message)
            if isinstance(outcome, Failure) and outcome.code == "not_deployed":
                raise FailedImageError(outcome)
        self._check_model()
        return outcomes

    def _has_to_stop(self) -> bool:
        """Whether nobody waits for answers any more."""
        return self._is_over or self._request.is_stopped()

    def _settle(self, settled: Settled, ledger: Ledger) -> None:
        """Uploads a batch, or returns it; what failed is told of both."""
        pairs = [
            (target, self._for_client(target, one)) for target, one in zip(*settled, strict=True)
        ]
        refused: dict[int, Failure] = {}
        if self._uploading is not None:
            refused = self._uploading.upload(
                [
                    Labeled(target, outcome.annotation)
                    for target, outcome in pairs
                    if isinstance(outcome, Predicted)
                ]
            )
        entries = []
        num_done = 0
        for target, outcome in pairs:
            result = refused.get(target.image_id, outcome)
            if isinstance(result, Failure):
                if ledger.add_failure(target, result):
                    entries.append(entry_of(target, error=failure_json(result)))
                    self._note(target, result)
                continue
            num_done += 1
            is_skipped = isinstance(result, AlreadyLabeled) and not result.by_this_run
            self._note(target, is_skipped=is_skipped)
            if is_skipped:
                entries.append(entry_of(target, skipped=True))
            elif isinstance(result, AlreadyLabeled):
                entries.append(uploaded_entry(target))
            elif self._uploading is None:
                entries.append(self._entry_of(target, result))
                if self._is_about_one:
                    self._request.final_result = entries[-1]
        ledger.add_done(entries, num_done)
        ledger.check(self._limit)
        if self._uploading is not None and self._uploading.num_lost_batches >= MAX_FAILED_BATCHES:
            last = next(iter(refused.values()))
            raise FailedImageError(
                Failure(
                    last.code,
                    f"{MAX_FAILED_BATCHES} batches in a row could not be uploaded: {last.message}",
                )
            )

    def _entry_of(self, target: Target, predicted: Predicted) -> dict[str, Any]:
        notes = {"notes": list(predicted.notes)} if predicted.notes else {}
        entry = entry_of(target, predicted.annotation, **notes)
        return {**entry, "data": slides_of(predicted)} if self._shows_windows else entry

    def _for_client(self, target: Target, outcome: Outcome) -> Outcome:
        """An answer that is not written here, as the image's project takes it where a client is to
        write it that adds no tags."""
        if (
            self._uploading is not None
            or self._settings.unknown_tags != "description"
            or not isinstance(outcome, Predicted)
            or target.project_id is None
        ):
            return outcome
        annotation = outcome.annotation
        if not annotation.img_tags and not any(label.tags for label in annotation.labels):
            return outcome
        project_id, metas = target.project_id, self._request.context.setdefault("project_meta", {})
        try:
            if project_id not in metas:
                found = self._api.project.get_meta(project_id)
                metas[project_id] = sly.ProjectMeta.from_json(found)
        except Exception as error:  # noqa: BLE001  (the SDK and its transport raise what they like)
            # The client may still be able to write what it gets.
            sly.logger.warning(f"The tags of project {project_id} cannot be read: {error!r}")
            return outcome
        fitted = with_words_described(annotation, metas[project_id])
        if isinstance(fitted, sly.Annotation):
            return replace(outcome, annotation=fitted)
        return Failure(
            RequestError.code,
            f"Project {project_id} has no tag {fitted!r} of type text for images, in which to keep "
            "what is said about the image; add it to the project and ask again.",
        )


def _release(hold: Hold, answered: Future[list[Outcome]]) -> None:
    hold.release()


def _told_without_model(
    image: AnyImage | AheadImage | AlreadyLabeled,
) -> Failure | AlreadyLabeled | None:
    """What becomes of an image whatever the model says; None where that is its answer."""
    return image if isinstance(image, Failure | AlreadyLabeled) else None


def _any_answer(api: sly.Api, project_id: int | None) -> object:
    """Asks the platform what costs it little."""
    return None if project_id is None else api.project.get_info_by_id(project_id)


def _unread(image_id: int, error: Exception) -> Failure:
    return failure_of(error, f"The labels of image {image_id} cannot be read", "bad_annotation")


def _has_labels(target: Target) -> bool:
    return target.info is not None and bool(target.info.labels_count)

"""``florence2 label --project``: a project of the platform, labeled from any machine.

The run is the app's own, ``serve.platform.project_run``: what one of both has begun, the other can
go on with.
"""

from __future__ import annotations

import logging
import shlex
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from florence2.engine.ask import Ask
from florence2.engine.encoding import AnyImage
from florence2.errors import FlorenceError, RequestError, shown
from florence2.records import Failure, Result
from serve.console import say
from serve.labeling.progress import StopSwitch, progress_bar, stop_on_signals
from serve.limits import held_bytes
from serve.model_service import Deployed
from serve.platform.project_run import PredictionRun
from serve.platform.request_state import Destination, Source, State, UploadMode
from serve.platform.run import FAILED_IMAGES, RunServices
from serve.platform.run_store import info_of, page_path
from serve.platform.upload import SdkUpload
from serve.predict.predictor import AheadImage, Call, Deadline, Predicted, Predictor
from serve.process import end_process
from serve.provenance import Manifest
from serve.sdk import sly
from serve.settings import Settings

DEFAULT_MODE: Final[UploadMode] = "append"
_SHOWN_FAILURES: Final = 5
_GRACE_S: Final = 10.0
_SDK_RETRIES: Final = 3
_INTERRUPTED: Final = 130


@dataclass(frozen=True, slots=True)
class ProjectJob:
    """Which images of a project, and how what is found there gets to them.

    ``datasets`` are names, paths such as ``street/night``, or ids; without any it is all of them.
    ``is_anew``: earlier runs are not gone on with.
    """

    project_id: int
    datasets: tuple[str, ...] = ()
    mode: UploadMode = DEFAULT_MODE
    batch: int = 8
    is_anew: bool = False
    max_failures: str | None = None
    arguments: tuple[str, ...] = ()

    def state(self, dataset_ids: Sequence[int] | None) -> State:
        """As a client of the app would ask for it."""
        return {
            "project_id": self.project_id,
            "dataset_ids": None if dataset_ids is None else list(dataset_ids),
            "upload_mode": self.mode,
            "batch_size": self.batch,
            "max_failures": self.max_failures,
            "resume": not self.is_anew,
        }

    def command(self) -> str:
        """The command line that goes on with this run."""
        kept = [word for word in self.arguments if word != "--again"]
        return shlex.join(["florence2", *kept])


@dataclass(slots=True)
class ProjectReport:
    """The end of a run: ``counts`` are of all of it, ``num_images`` of what this process did."""

    run_id: str
    counts: Mapping[str, int]
    num_images: int
    num_pending: int
    seconds: float
    failures: Sequence[tuple[int, Failure]] = ()
    is_interrupted: bool = False
    error: str | None = None

    @property
    def exit_code(self) -> int:
        """0 all fine, 1 some failed, 2 nothing could be done, 130 interrupted."""
        if self.is_interrupted:
            return _INTERRUPTED
        has_done = any(self.counts.get(name) for name in ("labeled", "empty", "skipped"))
        if not has_done and (self.num_pending or self.counts.get("failed") or self.error):
            return 2
        return 1 if self.counts.get("failed") or self.error else 0

    def lines(self, job: ProjectJob) -> list[str]:
        """For a terminal."""
        counts, rate = self.counts, self.num_images / self.seconds if self.seconds else 0.0
        skipped = f"{counts['skipped']} had labels, " if counts.get("skipped") else ""
        lines = [
            f"{counts.get('labeled', 0)} labeled ({counts.get('labels', 0)} labels), "
            f"{counts.get('empty', 0)} with nothing found, {skipped}"
            f"{counts.get('failed', 0)} failed; this run: {self.num_images} images, "
            f"{rate:.2f} images/s.",
            f"Run {self.run_id}; take its labels back with: "
            f"florence2 undo {job.project_id} --run {self.run_id}",
        ]
        if self.counts.get("images", 0) > 1:
            page = page_path(job.project_id, self.run_id)
            lines.append(f"What to review first is on its page in the team files: {page}")
        if self.error:
            lines.insert(0, f"Stopped early: {self.error}")
        if self.failures:
            codes = Counter(failure.code for _, failure in self.failures).most_common()
            lines.append("Failed: " + ", ".join(f"{count} {code}" for code, count in codes))
            shown_first = self.failures[:_SHOWN_FAILURES]
            lines += [f"  image {image_id}: {failure.message}" for image_id, failure in shown_first]
            if len(self.failures) > _SHOWN_FAILURES:
                lines.append(f"  ... and {len(self.failures) - _SHOWN_FAILURES} more")
        num_left = self.num_pending - self.num_images
        if num_left > 0 or self.failures:
            what = f"{num_left} images are still to do" if num_left > 0 else "Some failed"
            lines += [f"{what}; go on with:", job.command()]
        return lines


@dataclass(slots=True)
class CommandRequest:
    """What a run asks of its request, where a person watches it and nobody fetches results."""

    stop: StopSwitch
    uuid: str = field(default_factory=lambda: uuid.uuid4().hex)
    context: dict[str, Any] = field(default_factory=dict)
    failures: list[tuple[int, Failure]] = field(default_factory=list)
    advance: Callable[[int], None] = field(default=lambda count: None)
    num_done: int = 0

    def is_stopped(self) -> bool:
        return self.stop()

    def add_results(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Only failures are kept: the rest is on the platform."""
        for entry in entries:
            if (error := entry.get("error")) is not None:
                self.failures.append((entry["image_id"], Failure(**error)))

    def done(self, count: int) -> None:
        self.num_done += count
        self.advance(count)

    def set_stage(self, stage: str, current: int, total: int) -> None:
        """A bar says as much."""


class ProjectModel(Protocol):
    """What answers a run, on this machine or on others. ``told`` is for the run's manifest."""

    @property
    def num_devices(self) -> int: ...

    def predict(
        self, images: Sequence[AnyImage | AheadImage], settings: Settings, call: Call
    ) -> list[Predicted | Failure]: ...

    def prepare(self, images: Sequence[Any], settings: Settings, call: Call) -> Sequence[Any]: ...

    def ask(self, asks: Sequence[Ask], call: Call) -> Sequence[Result | Failure]: ...

    def told(self, adapter: str | None) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in this process."""

    predictor: Predictor
    deployed: Deployed

    @property
    def num_devices(self) -> int:
        return self.deployed.scheduler.num_devices

    def predict(
        self, images: Sequence[AnyImage | AheadImage], settings: Settings, call: Call
    ) -> list[Predicted | Failure]:
        return self.predictor.predict(images, settings, call)

    def prepare(self, images: Sequence[Any], settings: Settings, call: Call) -> Sequence[Any]:
        return self.predictor.prepare(images, settings, call)

    def ask(self, asks: Sequence[Ask], call: Call) -> Sequence[Result | Failure]:
        return self.predictor.ask(asks, call)

    def told(self, adapter: str | None) -> Mapping[str, Any]:
        return self.deployed.told(adapter)


def label_project(
    api: sly.Api, settings: Settings, job: ProjectJob, load: Callable[[], ProjectModel]
) -> ProjectReport:
    """Labels what is left to label of a project of the platform, and says how that went.

    Unless it is to begin anew it goes on with the newest run of the same settings and model, in
    whichever process that was. Raises FlorenceError where nothing was done, RunHeldError where
    another process works on that run, and what the SDK raises where the platform fails.
    """
    # The run waits for a platform that is away in a way that Ctrl-C ends; the SDK does not.
    api.retry_count = min(api.retry_count, _SDK_RETRIES)
    with stop_on_signals() as stop, ended_in_time(stop), logged_as_lines():
        dataset_ids = _dataset_ids_of(api, job)
        request = CommandRequest(stop)
        model = load()
        services = RunServices(
            predict=model.predict,
            ask=model.ask,
            settings_of=lambda state: settings,
            upload=SdkUpload().upload_predictions,
            budget=held_bytes(),
            task_id=None,
            default_batch_size=job.batch,
            model_of=lambda settings: model.told(settings.model),
            num_devices=model.num_devices,
            resume_command=job.command(),
            prepare=model.prepare,
        )
        state = job.state(dataset_ids)
        run = PredictionRun(
            services,
            api,
            state,
            request,
            Source.of_project(state),
            Destination.of(state),
            Deadline.of(state),
        )
        return _worked(run, request, job, stop)


def _worked(
    run: PredictionRun, request: CommandRequest, job: ProjectJob, stop: StopSwitch
) -> ProjectReport:
    record, began = run.record, time.monotonic()
    if record is None:
        raise RequestError(f"A project is labeled in a mode, and {shown(job.mode)} is none.")
    if (earlier := record.earlier) is not None:
        say(_said_of_earlier(earlier, run.num_before, run.num_pending))
    error: Exception | None = None
    is_interrupted = False
    with progress_bar(run.num_pending) as advance:
        request.advance = advance
        try:
            with stop.after_batch():
                run.work(must_be_whole=True)
        except KeyboardInterrupt:
            is_interrupted = True
        except FlorenceError as raised:
            error = raised
    if error is not None and not record.counts:
        raise error
    is_part = request.num_done < run.num_pending
    return ProjectReport(
        record.run_id,
        record.counts,
        request.num_done,
        run.num_pending,
        time.monotonic() - began,
        request.failures,
        is_interrupted=is_interrupted or (stop.pulled and is_part),
        # What failed is named in lines of its own.
        error=None if error is None or not is_part else str(error),
    )


def _said_of_earlier(earlier: Manifest, num_before: int, num_pending: int) -> str:
    if not num_pending:
        return (
            f"Run {earlier.run} of {earlier.started} has done all {num_before} images; "
            "--again begins anew."
        )
    return (
        f"Going on with run {earlier.run} of {earlier.started}, which has done {num_before} of "
        f"{num_before + num_pending} images; --again begins anew."
    )


def _dataset_ids_of(api: sly.Api, job: ProjectJob) -> list[int] | None:
    """None for all of them."""
    info_of(api, job.project_id)
    return list(datasets_of(api, job.project_id, job.datasets)) if job.datasets else None


def datasets_of(api: sly.Api, project_id: int, named: Sequence[str] = ()) -> dict[int, str]:
    """The paths of a project's datasets by their ids, or of those that are named; RequestError."""
    rows = {row.id: row for row in api.dataset.get_list(project_id, recursive=True)}
    paths = {key: _path_of(key, rows) for key in rows}
    found: dict[int, str] = {}
    for name in named:
        fitting = [key for key, row in rows.items() if name in (row.name, paths[key])]
        if not fitting and name.isdecimal() and int(name) in rows:
            fitting = [int(name)]
        if not fitting:
            known = ", ".join(sorted(paths.values())[:10]) or "none"
            raise RequestError(
                f"Project {project_id} has no dataset {name!r}; choose from its own: {known}."
            )
        found |= {key: paths[key] for key in fitting}
    return found if named else paths


def _path_of(dataset_id: int, rows: Mapping[int, Any]) -> str:
    row = rows[dataset_id]
    parent = _path_of(row.parent_id, rows) + "/" if row.parent_id in rows else ""
    return f"{parent}{row.name}"


@contextmanager
def ended_in_time(stop: StopSwitch) -> Iterator[None]:
    """After a second Ctrl-C the process ends, whatever the platform does not answer.

    A thread that waits for an answer cannot be told to end, and the interpreter waits for it.
    """

    def watch() -> None:
        stop.interrupted.wait()
        time.sleep(_GRACE_S)
        end_process(
            "Interrupted while the platform had not answered; the same command goes on.",
            _INTERRUPTED,
        )

    threading.Thread(target=watch, name="ending", daemon=True).start()
    yield


class _Lines(logging.Handler):
    """The SDK writes its log to stdout, as JSON."""

    def emit(self, record: logging.LogRecord) -> None:
        # The report names these.
        if record.name != FAILED_IMAGES.name:
            say(record.getMessage())


@contextmanager
def logged_as_lines() -> Iterator[None]:
    """Warnings of a run for a person at a terminal."""
    logger, lines = sly.logger, _Lines(logging.WARNING)
    before, level = list(logger.handlers), logger.level
    logger.handlers, logger.level = [lines], logging.WARNING
    try:
        yield
    finally:
        logger.handlers, logger.level = before, level

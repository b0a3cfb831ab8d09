"""``florence2 upload``: labeled images of a folder or a bucket, into a project of the platform.

What is uploaded is noted beside the labels, so that whoever goes on knows what is left. What the
platform has already stays as it is there.
"""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Final

from florence2.errors import GenerationCancelledError
from florence2.records import Failure
from serve.labeling.files import FolderInUseError, OutputError, opened_workspace
from serve.labeling.journal import is_output
from serve.labeling.platform_project import ended_in_time, logged_as_lines
from serve.labeling.progress import progress_bar, stop_on_signals
from serve.platform.failures import failure_of
from serve.scaling.platform_target import LabeledFolder, PlatformTarget, Uploaded
from serve.scaling.shards import RUN_NAME, Committed, committed_in
from serve.scaling.storage import Storage, is_remote
from serve.sdk import sly

NOTES: Final = "uploaded"
_UNIT: Final = 100
_UNITS_IN_DATASET: Final = 100
_THREADS: Final = 4
_SDK_RETRIES: Final = 3
_SHOWN_FAILURES: Final = 5
_INTERRUPTED: Final = 130
_DEFAULT_DATASET: Final = "florence2"


@dataclass(frozen=True, slots=True)
class UploadJob:
    """What ``florence2 label`` wrote to ``labeled``, and the project that it goes to.

    ``dataset`` is the name of the first dataset there. ``is_again``: also what was uploaded before.
    """

    labeled: str
    project_id: int
    dataset: str | None = None
    is_again: bool = False

    def dataset_name(self, number: int) -> str:
        """Of the dataset with this number: 10,000 images of a folder are in one."""
        place = self.labeled if is_remote(self.labeled) else str(Path(self.labeled).resolve())
        name = self.dataset or place.rstrip("/").rsplit("/", 1)[-1] or _DEFAULT_DATASET
        return name if number == 0 else f"{name}-{number + 1}"

    def command(self) -> str:
        """The command line that goes on with it."""
        words = ["florence2", "upload", self.labeled, "--project", str(self.project_id)]
        return shlex.join(words + (["--dataset", self.dataset] if self.dataset else []))


@dataclass(frozen=True, slots=True)
class Unit:
    """Images that are uploaded and noted together: a shard in its folder, or part of a folder.

    ``names`` of None: all images of ``folder``, which is below what was labeled.
    """

    number: int
    folder: str = ""
    names: frozenset[str] | None = None


@dataclass(slots=True)
class UploadReport:
    """The end of an upload: of the ``total`` images that were left ``done`` were looked at."""

    project_id: int
    total: int
    done: int = 0
    added: int = 0
    kept: int = 0
    labels: int = 0
    image_tags: int = 0
    runs: set[str] = field(default_factory=set)
    failures: list[tuple[str, Failure]] = field(default_factory=list)
    error: str | None = None
    is_interrupted: bool = False

    def add(self, unit: Uploaded) -> None:
        self.done += len(unit.names) + len(unit.failures)
        self.added += unit.added
        self.kept += unit.kept
        self.labels += unit.labels
        self.image_tags += unit.image_tags
        self.runs |= {run for run, counts in unit.runs.items() if _num_written(counts)}
        self.failures += [(name, Failure(*told)) for name, *told in unit.failures]

    @property
    def exit_code(self) -> int:
        """0 all fine, 1 some failed, 2 nothing could be done, 130 interrupted."""
        if self.is_interrupted:
            return _INTERRUPTED
        if not self.failures and self.error is None:
            return 0
        return 1 if self.done > len(self.failures) else 2

    def lines(self, job: UploadJob) -> list[str]:
        """For a terminal."""
        if not self.total:
            return [
                f"All images were uploaded to project {self.project_id} before; --again looks at "
                "them again."
            ]
        lines = [] if self.error is None else [f"Stopped early: {self.error}"]
        kept = f", {self.kept} had labels there and stay as they are" if self.kept else ""
        tags = f" ({self.image_tags} tags of images)" if self.image_tags else ""
        lines.append(
            f"{self.added} images and {self.labels} labels{tags} uploaded to project "
            f"{self.project_id}{kept}, {len(self.failures)} failed."
        )
        lines += [f"  {name}: {one.message}" for name, one in self.failures[:_SHOWN_FAILURES]]
        if len(self.failures) > _SHOWN_FAILURES:
            place = f"{job.labeled.rstrip('/')}/{NOTES}/{self.project_id}"
            lines.append(
                f"  ... and {len(self.failures) - _SHOWN_FAILURES} more, all of them in {place}"
            )
        for run in sorted(self.runs):
            lines.append(
                f"Take the labels of run {run} back with: florence2 undo {self.project_id} "
                f"--run {run}"
            )
        if self.done < self.total or self.failures:
            left = self.total - self.done
            # Of those that were in hand nobody has noted how far they came.
            what = f"{left} images are not known to be uploaded" if left else "Some failed"
            lines += [f"{what}; go on with:", job.command()]
        return lines


def upload_labeled(api: sly.Api, job: UploadJob) -> UploadReport:
    """Uploads what is left to upload, and says how that went.

    RequestError for what is not labeled, or a project that it cannot go to.
    """
    with (
        stop_on_signals() as stop,
        ended_in_time(stop),
        logged_as_lines(),
        Uploads(api, job, stop) as uploads,
    ):
        units = list(uploads.units_left())
        if not units and not uploads.is_begun:
            raise OutputError(
                f"Labeled images are uploaded, and {job.labeled!r} has none yet; label some first."
            )
        report = UploadReport(job.project_id, sum(uploads.size_of(unit) for unit in units))
        with progress_bar(lambda: report.total, "Uploading") as advance:

            def done(unit: Unit, uploaded: Uploaded) -> None:
                report.add(uploaded)
                num_images = len(uploaded.names) + len(uploaded.failures)
                # Of a shard some may be undone.
                report.total += num_images - uploads.size_of(unit)
                advance(num_images)

            with stop.after_batch():
                for unit in units:
                    uploads.add(unit)
                report.error = uploads.finish(done)
        report.is_interrupted = stop.pulled and report.done < report.total
    return report


class Uploads:
    """Uploads units, a few at the same time; a context around that work.

    In it nobody else uploads from the same folder into the same project: OutputError.
    """

    def __init__(self, api: sly.Api, job: UploadJob, should_stop: Callable[[], bool]) -> None:
        # An upload waits for a platform that is away in a way that Ctrl-C ends; the SDK does not.
        api.retry_count = min(api.retry_count, _SDK_RETRIES)
        self._target = Storage(job.labeled)
        self._shards = _shards_in(self._target)
        self._folder = None if self._shards is not None else _folder_of(self._target)
        self._job = job
        self._should_stop = should_stop
        self._platform = PlatformTarget(api, job.project_id, should_stop)
        self._known: dict[int, Uploaded] = {}
        self._is_cut = False
        self._alone = ExitStack()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="upload")
        self._pending: list[tuple[Unit, Future[Uploaded]]] = []
        self._has_failed = threading.Event()

    @property
    def is_begun(self) -> bool:
        """Whether anything was uploaded before."""
        return bool(self._known)

    def units_left(self) -> Iterator[Unit]:
        """What was labeled and is not uploaded, or failed to be."""
        if self._shards is not None:
            for number, one in self._shards.items():
                known = self._known.get(number)
                if known is None or known.failures:
                    yield Unit(number, one.folder)
            return
        done = {name for unit in self._known.values() for name in unit.names}
        left = [name for name in (self._folder.entries if self._folder else ()) if name not in done]
        first = max(self._known, default=-1) + 1
        for number, begin in enumerate(range(0, len(left), _UNIT), first):
            yield Unit(number, names=frozenset(left[begin : begin + _UNIT]))

    def size_of(self, unit: Unit) -> int:
        """Images of a unit."""
        if unit.names is not None:
            return len(unit.names)
        shard = (self._shards or {})[unit.number]
        return shard.labeled + shard.empty

    def add(self, unit: Unit) -> None:
        """Uploads it as soon as there is a thread for it."""
        self._pending.append((unit, self._threads.submit(self._upload, unit)))

    def finish(self, done: Callable[[Unit, Uploaded], None]) -> str | None:
        """Waits for all of them; a sentence where something ended the upload."""
        error: str | None = None
        while self._pending:
            unit, uploaded = self._pending.pop(0)
            try:
                done(unit, uploaded.result())
            except CancelledError:
                # It was not begun.
                continue
            except GenerationCancelledError:
                self._is_cut = True
            except Exception as raised:  # noqa: BLE001  (the SDK and its transport raise anything)
                error = (
                    error or failure_of(raised, "The upload ended", advice="upload again").message
                )
        units = self._noted().values()
        # A folder's images that failed are in another unit once they are tried again.
        mended = {name for unit in units for name in unit.names} if self._folder else set()
        has_failures = any(name not in mended for unit in units for name, *_ in unit.failures)
        if error is None and not self._is_cut and not has_failures:
            self._platform.ended(units)
        return error

    def __enter__(self) -> Uploads:
        if self._target.local is not None:
            self._alone.enter_context(_alone_in(self._target.local / self._notes_folder))
        if self._job.is_again:
            for name in self._note_names():
                self._target.delete(f"{self._notes_folder}/{name}")
        self._known = self._noted()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._has_failed.set()
        self._threads.shutdown(cancel_futures=True)
        self._alone.close()

    def _upload(self, unit: Unit) -> Uploaded:
        if self._should_stop() or self._has_failed.is_set():
            raise CancelledError
        try:
            with self._on_disk(unit) as folder:
                names = folder.entries if unit.names is None else unit.names
                dataset = self._job.dataset_name(unit.number // _UNITS_IN_DATASET)
                uploaded = self._platform.upload(folder, list(names), dataset, unit.number)
            note = json.dumps(asdict(uploaded), ensure_ascii=False) + "\n"
            self._target.write(self._note_name(unit.number), note.encode("utf-8"))
        except BaseException:
            self._has_failed.set()
            raise
        return uploaded

    @contextmanager
    def _on_disk(self, unit: Unit) -> Iterator[LabeledFolder]:
        if self._folder is not None:
            yield self._folder
        elif (local := self._target.local) is not None:
            yield LabeledFolder(local / unit.folder)
        else:
            with TemporaryDirectory(prefix="florence2-") as copy:
                self._target.download(unit.folder, Path(copy))
                yield LabeledFolder(Path(copy))

    def _note_name(self, number: int) -> str:
        return f"{self._notes_folder}/{number:06}.json"

    @property
    def _notes_folder(self) -> str:
        return f"{NOTES}/{self._job.project_id}"

    def _note_names(self) -> list[str]:
        return [name for name in self._target.names(self._notes_folder) if name.endswith(".json")]

    def _noted(self) -> dict[int, Uploaded]:
        names = self._note_names()
        stored = self._target.read_many(f"{self._notes_folder}/{name}" for name in names)
        try:
            return {
                int(Path(name).stem): Uploaded.of_json(one)
                for name, one in zip(names, stored, strict=True)
            }
        except (ValueError, TypeError) as error:
            raise OutputError(
                f"What is uploaded is noted in {self._notes_folder!r} of {self._target.address!r}, "
                f"and a file there says something else ({error}); remove it, or use --again."
            ) from error


def _num_written(counts: Mapping[str, int]) -> int:
    return counts.get("labels", 0) + counts.get("tags", 0)


def _alone_in(notes: Path) -> AbstractContextManager[object]:
    """Entered: nobody else uploads what is noted there. OutputError where somebody does."""
    workspace = ExitStack()
    try:
        workspace.enter_context(opened_workspace(notes))
    except FolderInUseError as error:
        raise OutputError(
            "One process at a time uploads from a folder into a project, and another one notes in "
            f"{str(notes)!r} now; wait until it ends, then the same command goes on."
        ) from error
    except OutputError as error:
        raise OutputError(
            f"What is uploaded is noted beside the labels, and {str(notes)!r} cannot be written; "
            "make it a folder of yours, or upload a copy."
        ) from error
    return workspace


def _shards_in(target: Storage) -> dict[int, Committed] | None:
    """By their numbers; None where labels are not in shards."""
    if target.read(RUN_NAME) is None:
        return None
    return {one.shard: one for one in committed_in(target)}


def _folder_of(target: Storage) -> LabeledFolder:
    if target.local is None or not is_output(target.local):
        raise OutputError(
            f"What florence2 label wrote is uploaded, and {target.address!r} is nothing of that "
            "kind; give what was given to it as --out."
        )
    return LabeledFolder(target.local)

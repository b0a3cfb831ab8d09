"""One ``florence2 label``: from settings and two folders to a project and a report."""

from __future__ import annotations

import shlex
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from florence2.errors import FlorenceError, RequestError
from florence2.tasks import OutputKind
from serve.console import complain, say
from serve.labeling.exports import (
    COCO_DIR,
    VAL_FRACTION,
    YOLO_DIR,
    Export,
    export_coco,
    export_yolo,
)
from serve.labeling.files import OutputError, Workspace, hash_of, opened_workspace, stamp_of
from serve.labeling.images import EXTENSIONS, Findings, ImageFile, find_images, is_image
from serve.labeling.journal import (
    JOURNAL_NAME,
    OUTPUT_MARKER,
    Journal,
    check_usable,
    is_begun,
    open_journal,
    output_around,
)
from serve.labeling.page import write_page
from serve.labeling.pipeline import Labeling, label_images
from serve.labeling.previews import PREVIEWS_DIR, draw_missing_previews
from serve.labeling.progress import StopSwitch, progress_bar, stop_on_signals
from serve.labeling.project import DATASET, GrowingProject
from serve.labeling.report import (
    Report,
    RunCounts,
    count_suffixes,
    named,
    report_lines,
    write_report,
)
from serve.labeling.settings import journal_settings
from serve.labeling.undo import keep_manifest
from serve.limits import NO_LIMIT, FailureLimit
from serve.naming import possible_titles
from serve.predict.predictor import Predictor, rules_of
from serve.provenance import RUN_TAG, Manifest, RunState, new_run_id, now
from serve.sdk import sly
from serve.settings import Settings


@contextmanager
def earlier_labels_moved(
    workspace: Workspace,
    journal_name: str = JOURNAL_NAME,
    is_begun: Callable[[Path], bool] = is_begun,
) -> Iterator[None]:
    """Moves an earlier run's files to a folder beside this one; the journal goes last.

    They come back when the new run labels nothing and ends with an error.
    """
    root = workspace.root.resolve()
    if not (root / journal_name).exists():
        yield
        return
    number = 1
    while (target := root.with_name(f"{root.name}.old-{number}")).exists():
        number += 1
    target.mkdir()
    # Before the first file comes: a kill midway must not make previews look like images.
    (target / OUTPUT_MARKER).touch()
    _move_all(root, target, journal_name)
    say(f"The earlier labels are now in {target}")
    try:
        yield
    except BaseException:
        if not is_begun(root):
            for name in _names(root):
                shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()
            _move_all(target, root, journal_name)
            (target / OUTPUT_MARKER).unlink()
            target.rmdir()
            say(f"The earlier labels are back in {root}")
        raise


def _names(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if not path.name.startswith(".")]


def _move_all(source: Path, target: Path, journal_name: str) -> None:
    for name in sorted(_names(source), key=lambda name: name == journal_name):
        (source / name).rename(target / name)


_SHOWN_LOST: Final = 5
_SHAPES: Final = {
    OutputKind.GROUNDING: sly.Rectangle,
    OutputKind.LABELED_BOXES: sly.Rectangle,
    OutputKind.POLYGONS: sly.Polygon,
}


@dataclass(frozen=True, slots=True)
class Job:
    """Where from, where to, and how; nothing here changes what the labels are."""

    images: Path
    out: Path
    batch: int = 8
    recursive: bool = False
    link: bool = False
    coco: bool = False
    yolo: bool = False
    val_fraction: float = VAL_FRACTION
    draw: bool = False
    retry_failed: bool = False
    relabel_changed: bool = False
    overwrite: bool = False
    max_failures: FailureLimit = NO_LIMIT
    arguments: tuple[str, ...] = ()

    def command(self, *extra: str) -> str:
        """The command line of this job, to be typed again."""
        dropped = ("--overwrite", "--retry-failed", "--relabel-changed")
        kept = [word for word in self.arguments if word not in dropped]
        return shlex.join(["florence2", *kept, *extra])


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checkpoint by its name; it is loaded only when there is work.

    ``fingerprint`` is what tells two checkpoints of one name apart, or None while it is not on
    this machine.
    """

    name: str
    load: Callable[[], Predictor]
    fingerprint: Callable[[], str | None] = lambda: None


@dataclass(slots=True)
class _OpenRun:
    """What is open while a run goes on."""

    settings: Settings
    job: Job
    project: GrowingProject
    journal: Journal
    manifest: Manifest
    workspace: Workspace
    changed: set[str] = field(default_factory=set)

    def pending(self) -> Iterator[ImageFile]:
        """What this run is to look at: what is new, or only what failed before; and what changed,
        if it is told to."""
        for file in _all_images(self.job):
            if self._is_wanted(file.key):
                yield file

    def survey(self) -> int:
        """Learns which labeled images have changed since; gives the number of ``pending``."""
        count = 0
        for file in _all_images(self.job):
            if self._has_changed(file):
                self.changed.add(file.key)
            count += self._is_wanted(file.key)
        return count

    def _is_wanted(self, key: str) -> bool:
        if self.job.relabel_changed and key in self.changed:
            return True
        if self.job.retry_failed:
            return self.journal.has_failed(key)
        return not self.journal.is_known(key)

    def _has_changed(self, file: ImageFile) -> bool:
        """By its size, and by its content only where the time of the last change is another."""
        source = self.journal.source_of(file.key)
        if source is None:
            return False
        try:
            stamp = stamp_of(file.path)
            if stamp.size_bytes != source.stamp.size_bytes:
                return True
            return stamp != source.stamp and hash_of(file.path) != source.hash
        except OSError:
            # It was labeled, and cannot be read any more.
            return True


def label_folder(settings: Settings, job: Job, model: ModelSource) -> Report:
    """Labels what is left to label and returns the report, which is also in the folder.

    Raises FlorenceError when the run cannot begin; what was labeled before stays as it is.
    """
    _check_input(job)
    with stop_on_signals() as stop, opened_workspace(job.out) as workspace:
        is_new = job.overwrite or not is_begun(workspace.root)
        if is_new and not job.retry_failed:
            model = _loaded_now(workspace, model, is_kept_away=job.overwrite)
        if not job.overwrite:
            return _run(settings, job, model, stop, workspace)
        with earlier_labels_moved(workspace):
            return _run(settings, job, model, stop, workspace)


def _loaded_now(workspace: Workspace, model: ModelSource, *, is_kept_away: bool) -> ModelSource:
    """The model before anything in the folder changes: what does not load, changes nothing."""
    if not (is_kept_away and (workspace.root / JOURNAL_NAME).exists()):
        check_usable(workspace.root)
    predictor = model.load()
    return replace(model, load=lambda: predictor)


def _run(
    settings: Settings, job: Job, model: ModelSource, stop: StopSwitch, workspace: Workspace
) -> Report:
    noted = {
        "images": str(job.images.resolve()),
        "recursive": job.recursive,
        **journal_settings(settings, model.name),
        "checkpoint": model.fingerprint(),
    }
    project = GrowingProject(workspace, link=job.link)
    with closing(open_journal(workspace, noted, project.is_kept)) as journal:
        if journal.lost:
            say(
                f"{len(journal.lost)} images were labeled and their files in the project are gone "
                f"or damaged; they count as not labeled: {named(journal.lost)}"
            )
        run = _OpenRun(settings, job, project, journal, new_manifest(settings, noted), workspace)
        counts, error = _work(run, model, stop)
        _end_manifest(run, counts, error)
        if journal.renewed:
            journal.recount()
        report = _report(run, counts, noted, error)
    for line in report_lines(report, job.out):
        say(line)
    _write_report(report, run)
    if report.totals.labeled + report.totals.empty and not counts.interrupted:
        problem = _export(job, project)
        if problem is not None:
            report = replace(report, error=report.error or problem)
            with suppress(OutputError):
                _write_report(report, run)
    return report


def _write_report(report: Report, run: _OpenRun) -> None:
    """The report, for people and for programs. Raises OutputError where there is no room."""
    workspace = run.workspace
    try:
        write_report(report, workspace)
        entries = run.journal.entries()
        write_page(report, entries, run.manifest, run.job.images, run.project, workspace)
    except OSError as error:
        raise OutputError(
            f"The labels are safe, and the report could not be written into "
            f"{str(workspace.root)!r} ({error.strerror or error}); make room and run it again."
        ) from error


def _all_images(job: Job, findings: Findings | None = None) -> Iterator[ImageFile]:
    skip = job.out.resolve()
    return find_images(job.images, recursive=job.recursive, skip=skip, findings=findings)


def _check_input(job: Job) -> None:
    if job.overwrite and job.retry_failed:
        raise RequestError(
            "--overwrite begins anew and --retry-failed goes on with what is there; give one of "
            "them."
        )
    if not 0 <= job.val_fraction < 1:
        raise RequestError(
            "The share of images for validation is from 0 to below 1 and got "
            f"{job.val_fraction}; write for example --val-fraction 0.2."
        )
    check_images(job.images, job.out, recursive=job.recursive)


def check_images(images: Path, out: Path, *, recursive: bool) -> None:
    """RequestError for what is no folder with images, or no image."""
    shown = str(images)
    if not images.exists():
        raise RequestError(f"Images are read from a folder and {shown!r} does not exist.")
    if images.is_file() and not is_image(images.name):
        raise RequestError(
            f"An image file ends in one of {', '.join(EXTENSIONS)} and {shown!r} does not."
        )
    if images.resolve() == out.resolve():
        raise RequestError(f"Images and labels need two folders and got {shown!r} for both.")
    _check_is_no_output(images)
    findings = Findings()
    try:
        found = find_images(images, recursive=recursive, skip=out.resolve(), findings=findings)
        has_image = next(found, None) is not None
    except OSError as error:
        raise RequestError(f"{shown!r} cannot be read ({error.strerror}).") from error
    if not has_image:
        hint = "; add --recursive to look into its subfolders" if findings.subfolders else ""
        others = f", but {count_suffixes(findings.suffixes)}" if findings.suffixes else ""
        raise RequestError(
            f"A folder to label holds images ({', '.join(EXTENSIONS)}) "
            f"and {shown!r} holds none{others}{hint}."
        )


def _check_is_no_output(images: Path) -> None:
    """Previews and exports look like images; the images of a project are some."""
    source = images.resolve()
    around = output_around(source)
    folder = source if source.is_dir() else source.parent
    if around is not None and folder.parts[-2:] != (DATASET, "img"):
        raise RequestError(
            f"Previews and exports are not labeled, and {str(images)!r} belongs to the labels that "
            f"an earlier run wrote into {str(around)!r}; name the folder of the images themselves."
        )


def _work(run: _OpenRun, model: ModelSource, stop: StopSwitch) -> tuple[RunCounts, str | None]:
    """Runs until done, stopped, or stuck; the second value says in a sentence what it stuck on."""
    total = run.survey()
    if not total:
        return RunCounts(), None
    counts = RunCounts()
    try:
        predictor = model.load()
        _prepare(run)
        with progress_bar(total) as advance:
            labeling = Labeling(
                predictor,
                run.settings,
                run.project,
                run.journal,
                advance,
                stop,
                counts,
                run.manifest.run,
                previews=run.job.out / PREVIEWS_DIR if run.job.draw else None,
                limit=run.job.max_failures,
            )
            with stop.after_batch():
                label_images(run.pending(), labeling, batch=run.job.batch)
    except KeyboardInterrupt:
        counts.interrupted = True
    except OSError as error:
        problem = OutputError(f"Writing into {str(run.job.out)!r} failed ({error.strerror}).")
        return counts, _unless_first(run, problem)
    except FlorenceError as error:
        return counts, _unless_first(run, error)
    # Whatever the model or a library raises, what is labeled gets its report.
    except Exception as error:  # noqa: BLE001
        return counts, _unless_first(run, error)
    return counts, None


def _unless_first(run: _OpenRun, error: Exception) -> str:
    if not run.journal.totals.images:
        _end_manifest(run, RunCounts(), error_sentence(error))
        raise error
    return error_sentence(error)


def error_sentence(error: Exception) -> str:
    """What a report says about an error that ended its run."""
    if isinstance(error, FlorenceError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    return f"Something unexpected happened ({type(error).__name__}: {error}; {where})."


def new_manifest(settings: Settings, noted: Mapping[str, Any]) -> Manifest:
    """That of a run which begins now; ``noted`` are the settings as a journal keeps them."""
    told = ("task", "prompts", "model", "checkpoint")
    return Manifest(
        run=new_run_id(),
        model={"name": noted["model"], "checkpoint": noted["checkpoint"]},
        task=noted["task"],
        prompts=noted["prompts"],
        settings={key: value for key, value in noted.items() if key not in told},
        run_tag=RUN_TAG.name if settings.run_tag else None,
        started=now(),
    )


def _end_manifest(run: _OpenRun, counts: RunCounts, error: str | None) -> None:
    """A run that had nothing to do is not noted."""
    if not counts.outcomes and error is None and not counts.interrupted:
        return
    state: RunState = "stopped" if counts.interrupted else "failed" if error else "done"
    ended = run.manifest.ended(state, {"images": counts.images, **counts.outcomes}, error)
    try:
        keep_manifest(run.workspace, ended)
    except OSError as problem:
        complain(f"The end of run {ended.run} could not be noted ({problem.strerror}).")


def _prepare(run: _OpenRun) -> None:
    run.project.create()
    if run.settings.run_tag:
        run.manifest = replace(run.manifest, run_tag=run.project.tag_runs())
    # Before its first label: a run that is killed is known all the same.
    keep_manifest(run.workspace, run.manifest)
    if run.job.draw:
        (run.job.out / PREVIEWS_DIR).mkdir(exist_ok=True)
    declare_classes(run.project, run.settings)


def declare_classes(project: GrowingProject, settings: Settings) -> None:
    """The classes that are asked for, before any image has them."""
    shape = _SHAPES.get(settings.steps[-1].output)
    if shape is sly.Polygon and settings.geometry == "bitmap":
        shape = sly.Bitmap
    if shape is not None:
        project.declare(asked_classes(settings), shape)


def asked_classes(settings: Settings) -> tuple[str, ...]:
    """The user's classes in the order in which they were named, as labels will have them."""
    asked = dict.fromkeys(settings.classes_by_phrase.values())
    wanted = rules_of(settings).wants
    return tuple(
        possible_titles(name, "rectangle", settings.class_suffix)[0]
        for name in asked
        if wanted(name, "rectangle")
    )


def _report(run: _OpenRun, counts: RunCounts, noted: dict[str, Any], error: str | None) -> Report:
    job, journal = run.job, run.journal
    findings = Findings()
    known = pending = 0
    for file in _all_images(job, findings):
        known += journal.is_known(file.key)
        pending += not journal.is_known(file.key)
    return Report(
        totals=journal.totals,
        run=counts,
        pending=pending,
        gone=journal.totals.images - known,
        changed=sorted(run.changed - journal.renewed),
        not_renewed=tuple(journal.not_renewed.values()),
        findings=findings,
        relabel_command=job.command("--relabel-changed"),
        retry_command=job.command("--retry-failed"),
        resume_command=job.command(),
        settings=noted,
        error=error,
    )


def _export(job: Job, project: GrowingProject) -> str | None:
    """Previews and exports; a sentence about what kept one of them from being made."""
    try:
        if job.draw:
            problems = draw_missing_previews(project, job.out / PREVIEWS_DIR)
            say(f"Previews: {job.out / PREVIEWS_DIR}")
            for line in problems[:_SHOWN_LOST]:
                say(f"  {line}")
            if len(problems) > _SHOWN_LOST:
                say(f"  ... and {len(problems) - _SHOWN_LOST} more")
        if job.coco:
            _tell("COCO", export_coco(project, job.out / COCO_DIR))
        if job.yolo:
            _tell("YOLO", export_yolo(project, job.out / YOLO_DIR, job.val_fraction))
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        problem = (
            f"The labels are complete, but an export could not be written "
            f"({error.strerror or error}{where}); the same command makes it again."
        )
        complain(problem)
        return problem
    return None


def _tell(kind: str, export: Export) -> None:
    say(f"{kind}: {export.folder}")
    for sentence in export.sentences():
        say(f"  {sentence}")

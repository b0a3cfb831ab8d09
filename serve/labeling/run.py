"""One ``florence2 label``: from a plan and two folders to a project and a report."""

from __future__ import annotations

import re
import shlex
import shutil
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

from florence2.budget import open_pixels
from florence2.errors import FlorenceError, ImageError, RequestError
from florence2.images import LoadedImage
from florence2.prompts import clip_region
from florence2.records import Failure, Polygon, Quad, Region, Result, SizeWh
from florence2.tasks import OutputKind, find_task
from serve.cli.console import complain, say
from serve.labeling.exports import (
    COCO_DIR,
    VAL_FRACTION,
    YOLO_DIR,
    Export,
    export_coco,
    export_yolo,
)
from serve.labeling.files import OutputError, Workspace, hash_of, opened_workspace, stamp_of
from serve.labeling.images import (
    EXTENSIONS,
    MAX_PIXELS_IN_FLIGHT,
    Findings,
    ImageFile,
    Loaded,
    find_images,
    is_image,
    read_ahead,
)
from serve.labeling.journal import (
    JOURNAL_NAME,
    OUTPUT_MARKER,
    Entry,
    Journal,
    check_unused,
    is_begun,
    open_journal,
    output_around,
    read_settings,
)
from serve.labeling.plan import Plan, Prompt
from serve.labeling.previews import PREVIEWS_DIR, draw_missing_previews, draw_preview, preview_path
from serve.labeling.progress import StopSwitch, progress_bar, stop_on_signals
from serve.labeling.project import DATASET, GrowingProject
from serve.labeling.report import Report, RunCounts, kinds_in_words, report_lines, write_report
from serve.predict.annotations import Answered, LabelRules, annotation_from_answers
from serve.predict.geometry import drawable_rings, rings_of
from serve.sdk import sly


@contextmanager
def set_aside(workspace: Workspace) -> Iterator[None]:
    """Moves an earlier run's files to a folder beside this one; the journal goes last.

    They come back when the new run labels nothing and ends with an error.
    """
    root = workspace.root.resolve()
    if not (root / JOURNAL_NAME).exists():
        yield
        return
    number = 1
    while (target := root.with_name(f"{root.name}.old-{number}")).exists():
        number += 1
    target.mkdir()
    # Before the first file comes: a kill midway must not make previews look like images.
    (target / OUTPUT_MARKER).touch()
    _move_all(root, target)
    say(f"The earlier labels are now in {target}")
    try:
        yield
    except BaseException:
        if not is_begun(root):
            for name in _names(root):
                shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()
            _move_all(target, root)
            (target / OUTPUT_MARKER).unlink()
            target.rmdir()
            say(f"The earlier labels are back in {root}")
        raise


def _names(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if not path.name.startswith(".")]


def _move_all(source: Path, target: Path) -> None:
    for name in sorted(_names(source), key=lambda name: name == JOURNAL_NAME):
        (source / name).rename(target / name)


_READERS: Final = 3
_AHEAD: Final = 2
_NOTE_COUNT: Final = re.compile(r": \d+$")
_NO_AREA: Final = "outlines without area, left out"
# Failures that every image would have in the same way.
_HOPELESS: Final = ("bad_request", "bad_checkpoint", "bad_device")


class Model(Protocol):
    """The part of ``florence2.Florence2`` that labeling uses."""

    def run_many(self, requests: Sequence[Any]) -> Sequence[Result | Failure]: ...


@dataclass(frozen=True, slots=True)
class Tools:
    """What a run works with, and whom it tells."""

    model: Model
    ask: Callable[..., Any]
    project: GrowingProject
    journal: Journal
    on_images: Callable[[int], None]
    should_stop: Callable[[], bool]
    counts: RunCounts
    previews: Path | None = None


def label_images(files: Iterable[ImageFile], plan: Plan, tools: Tools, *, batch: int) -> None:
    """Labels ``files`` in order and journals each batch before the next one begins.

    Raises RequestError, with nothing journaled, when not one image could be asked as planned.
    """
    started = time.perf_counter()
    rules = LabelRules(dict(plan.classes), plan.threshold, fixed_shapes={})
    loaded = read_ahead(files, threads=_READERS, ahead=batch + _AHEAD, budget=open_pixels())
    try:
        with closing(loaded), closing(_batches(loaded, batch)) as groups:
            for group in groups:
                entries = _label_batch(group, plan, rules, tools)
                tools.project.sync()
                tools.journal.append(entries)
                tools.counts.images += len(entries)
                tools.on_images(len(entries))
                if tools.should_stop():
                    tools.counts.interrupted = True
                    break
    finally:
        tools.counts.seconds = time.perf_counter() - started


def _batches(loaded: Iterator[Loaded | None], size: int) -> Generator[list[Loaded]]:
    """At most ``size`` images, and fewer when they are large.

    Neither the list nor the pictures in it are held once the next one is asked for.
    """
    group: list[Loaded] = []
    try:
        for item in loaded:
            if item is not None:
                group.append(item)
            pixels = sum(one.pixels for one in group)
            if group and (item is None or len(group) == size or pixels >= MAX_PIXELS_IN_FLIGHT):
                yield group
                _close(group)
        if group:
            yield group
    finally:
        _close(group)


def _close(group: list[Loaded]) -> None:
    for item in group:
        item.close()
    group.clear()


def _label_batch(group: list[Loaded], plan: Plan, rules: LabelRules, tools: Tools) -> list[Entry]:
    entries: list[Entry] = []
    readable: list[tuple[Loaded, LoadedImage]] = []
    for item in group:
        if item.picture is None:
            entries.append(_unreadable(item))
        elif problem := _misses(plan.region, item.picture):
            entries.append(_failed(item.file, problem.code, str(problem)))
        else:
            readable.append((item, item.picture))
    answers = _ask(readable, plan, tools)
    _check_any_hope(answers, plan, len(readable), tools.journal)
    for number, (item, picture) in enumerate(readable):
        own = answers[number * len(plan.prompts) : (number + 1) * len(plan.prompts)]
        entries.append(_settle(item, picture, own, plan, rules, tools))
    return entries


def _ask(
    readable: list[tuple[Loaded, LoadedImage]], plan: Plan, tools: Tools
) -> Sequence[Result | Failure]:
    asks = [
        tools.ask(
            picture,
            plan.task,
            text=prompt.text,
            region=plan.region,
            num_beams=plan.num_beams,
            max_new_tokens=plan.max_new_tokens,
        )
        for _, picture in readable
        for prompt in plan.prompts
    ]
    return tools.model.run_many(asks) if asks else []


def _check_any_hope(
    answers: Sequence[Result | Failure], plan: Plan, images: int, journal: Journal
) -> None:
    """Raises RequestError when the first answers show that every image will fail alike."""
    if journal.totals.images or not answers:
        return
    failures = [answer for answer in answers if isinstance(answer, Failure)]
    if len(failures) < len(answers) or any(one.code not in _HOPELESS for one in failures):
        return
    # A later step of a cascade may fail for what this one image showed.
    if images > 1 or "+" not in plan.task or failures[0].code != RequestError.code:
        raise RequestError(failures[0].message)


def _misses(region: Region | None, picture: LoadedImage) -> RequestError | None:
    """Why the region is not on this image; on another one it may well be."""
    if region is not None:
        try:
            clip_region(region.box_xyxy, picture.size_wh)
        except RequestError as problem:
            return problem
    return None


def _unreadable(item: Loaded) -> Entry:
    problem = item.problem or FlorenceError("The image could not be read.")
    return _failed(item.file, problem.code, str(problem))


def _settle(
    item: Loaded,
    picture: LoadedImage,
    answers: Sequence[Result | Failure],
    plan: Plan,
    rules: LabelRules,
    tools: Tools,
) -> Entry:
    """One failed prompt fails the image: half its labels would pass for all of them."""
    file = item.file
    results: list[Result] = []
    for answer in answers:
        if isinstance(answer, Failure):
            return _failed(file, answer.code, answer.message)
        results.append(answer)
    answered = [
        _answered(result, prompt, plan)
        for result, prompt in zip(results, plan.prompts, strict=True)
    ]
    annotation = annotation_from_answers(answered, rules, picture.size_wh)
    try:
        stamp = item.stamp or stamp_of(file.path)
        written = tools.project.add(file, annotation, stamp, tools.journal.source_of(file.key))
    except ImageError as problem:
        return _failed(file, problem.code, str(problem))
    if tools.previews is not None:
        draw_preview(picture.image, annotation, preview_path(tools.previews, file.name))
    objects = len(annotation.labels)
    return Entry(
        image=file.key,
        name=file.name,
        state="labeled" if objects or len(annotation.img_tags) else "empty",
        objects=objects,
        truncated=sum(result.truncated for result in results),
        notes=_notes(results, picture.size_wh),
        is_first_of_many=item.is_first_of_many,
        size_bytes=stamp.size_bytes,
        mtime_ns=stamp.mtime_ns,
        hash=written.hash,
        labels_bytes=written.labels_bytes,
        labels_hash=written.labels_hash,
    )


def _notes(results: Sequence[Result], size_wh: SizeWh) -> tuple[str, ...]:
    """Each kind of note once, without its count ("dropped boxes: 3")."""
    notes = [_NOTE_COUNT.sub("", note) for result in results for note in result.notes]
    outlines = (
        shape for result in results for shape in result.objects if isinstance(shape, Polygon | Quad)
    )
    if any(len(drawable_rings(shape, size_wh)) < len(rings_of(shape)) for shape in outlines):
        notes.append(_NO_AREA)
    return tuple(dict.fromkeys(notes))


def _answered(result: Result, prompt: Prompt, plan: Plan) -> Answered:
    return Answered(result, prompt.class_name, prompt.text, plan.region)


def _failed(file: ImageFile, code: str, message: str) -> Entry:
    return Entry(file.key, file.name, "failed", code=code, message=message[:500])


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
    arguments: tuple[str, ...] = ()

    def command(self, *extra: str) -> str:
        """The command line of this job, to be typed again."""
        dropped = ("--overwrite", "--retry-failed", "--relabel-changed")
        kept = [word for word in self.arguments if word not in dropped]
        return shlex.join(["florence2", *kept, *extra])


# Gives a loaded model and the class of its requests; called only when there is work.
Loader = Callable[[], tuple[Model, Callable[..., Any]]]
# What tells two checkpoints of one name apart, or None while it is not on this machine.
Fingerprint = Callable[[], str | None]


@dataclass(frozen=True, slots=True)
class _Desk:
    """What is open while a run goes on."""

    plan: Plan
    job: Job
    project: GrowingProject
    journal: Journal
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


def label_folder(
    plan: Plan, job: Job, load: Loader, fingerprint: Fingerprint = lambda: None
) -> Report:
    """Labels what is left to label and returns the report, which is also in the folder.

    Raises FlorenceError when the run cannot begin; what was labeled before stays as it is.
    """
    _check_input(job)
    with stop_on_signals() as stop, opened_workspace(job.out) as workspace:
        is_new = job.overwrite or not is_begun(workspace.root)
        if is_new and not job.retry_failed:
            load = _loaded_now(workspace, load, is_kept_away=job.overwrite)
        settings = _settings(plan, job, fingerprint())
        if not job.overwrite:
            return _run(plan, job, load, stop, workspace, settings)
        with set_aside(workspace):
            return _run(plan, job, load, stop, workspace, settings)


def _loaded_now(workspace: Workspace, load: Loader, *, is_kept_away: bool) -> Loader:
    """The model before anything in the folder changes: what does not load, changes nothing."""
    if not (workspace.root / JOURNAL_NAME).exists():
        check_unused(workspace.root)
    elif not is_kept_away:
        read_settings(workspace.root / JOURNAL_NAME)
    loaded = load()
    return lambda: loaded


def _run(
    plan: Plan,
    job: Job,
    load: Loader,
    stop: StopSwitch,
    workspace: Workspace,
    settings: dict[str, Any],
) -> Report:
    project = GrowingProject(workspace, link=job.link)
    with closing(open_journal(workspace, settings, project.is_kept)) as journal:
        _say_lost(journal.lost)
        desk = _Desk(plan, job, project, journal)
        counts, error = _work(desk, load, stop)
        if journal.renewed:
            journal.recount()
        report = _report(desk, counts, settings, error)
    for line in report_lines(report, job.out):
        say(line)
    _write_report(report, workspace)
    if report.totals.labeled + report.totals.empty and not counts.interrupted:
        problem = _export(job, project)
        if problem is not None:
            report = replace(report, error=report.error or problem)
            with suppress(OSError):
                write_report(report, workspace)
    return report


def _say_lost(lost: list[str]) -> None:
    if lost:
        more = f" and {len(lost) - _SHOWN_LOST} more" if len(lost) > _SHOWN_LOST else ""
        say(
            f"{len(lost)} images were labeled and their files in the project are gone or damaged; "
            f"they count as not labeled: {', '.join(lost[:_SHOWN_LOST])}{more}"
        )


def _write_report(report: Report, workspace: Workspace) -> None:
    try:
        write_report(report, workspace)
    except OSError as error:
        raise OutputError(
            f"The labels are safe, and the report could not be written into "
            f"{str(workspace.root)!r} ({error.strerror or error}); make room and run it again."
        ) from error


def _settings(plan: Plan, job: Job, checkpoint: str | None) -> dict[str, Any]:
    where = {"images": str(job.images.resolve()), "recursive": job.recursive}
    return where | plan.settings() | {"checkpoint": checkpoint}


def _all_images(job: Job, findings: Findings | None = None) -> Iterator[ImageFile]:
    skip = job.out.resolve()
    return find_images(job.images, recursive=job.recursive, skip=skip, findings=findings)


def _check_input(job: Job) -> None:
    images, shown = job.images, str(job.images)
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
    if not images.exists():
        raise RequestError(f"Images are read from a folder and {shown!r} does not exist.")
    if images.is_file() and not is_image(images.name):
        raise RequestError(
            f"An image file ends in one of {', '.join(EXTENSIONS)} and {shown!r} does not."
        )
    if images.resolve() == job.out.resolve():
        raise RequestError(f"Images and labels need two folders and got {shown!r} for both.")
    _check_is_no_output(images)
    findings = Findings()
    try:
        has_image = next(_all_images(job, findings), None) is not None
    except OSError as error:
        raise RequestError(f"{shown!r} cannot be read ({error.strerror}).") from error
    if not has_image:
        hint = "; add --recursive to look into its subfolders" if findings.subfolders else ""
        others = f", but {kinds_in_words(findings.kinds)}" if findings.kinds else ""
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


def _work(desk: _Desk, load: Loader, stop: StopSwitch) -> tuple[RunCounts, str | None]:
    """Runs until done, stopped, or stuck; the second value says in a sentence what it stuck on."""
    total = desk.survey()
    if not total:
        return RunCounts(), None
    counts = RunCounts()
    try:
        model, ask = load()
        _prepare(desk)
        with progress_bar(total) as advance:
            previews = desk.job.out / PREVIEWS_DIR if desk.job.draw else None
            tools = Tools(
                model, ask, desk.project, desk.journal, advance, stop, counts, previews=previews
            )
            with stop.after_batch():
                label_images(desk.pending(), desk.plan, tools, batch=desk.job.batch)
    except KeyboardInterrupt:
        counts.interrupted = True
    except OSError as error:
        problem = OutputError(f"Writing into {str(desk.job.out)!r} failed ({error.strerror}).")
        return counts, _unless_first(desk, problem)
    except FlorenceError as error:
        return counts, _unless_first(desk, error)
    # Whatever the model or a library raises, what is labeled gets its report.
    except Exception as error:  # noqa: BLE001
        return counts, _unless_first(desk, error)
    return counts, None


def _unless_first(desk: _Desk, error: Exception) -> str:
    if not desk.journal.totals.images:
        raise error
    if isinstance(error, FlorenceError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    return f"Something unexpected happened ({type(error).__name__}: {error}; {where})."


def _prepare(desk: _Desk) -> None:
    desk.project.create()
    if desk.job.draw:
        (desk.job.out / PREVIEWS_DIR).mkdir(exist_ok=True)
    shape = _SHAPES.get(find_task(desk.plan.task.rsplit("+", 1)[-1]).output)
    if shape is not None:
        desk.project.declare(desk.plan.class_names, shape)


def _report(desk: _Desk, counts: RunCounts, settings: dict[str, Any], error: str | None) -> Report:
    job, journal = desk.job, desk.journal
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
        changed=sorted(desk.changed - journal.renewed),
        not_renewed=tuple(journal.not_renewed.values()),
        findings=findings,
        relabel_command=job.command("--relabel-changed"),
        retry_command=job.command("--retry-failed"),
        resume_command=job.command(),
        settings=settings,
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

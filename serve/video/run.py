"""One ``florence2 label`` of a video: from settings and a file to a project and a report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace

from florence2.engine.scheduler import Priority
from florence2.errors import DeviceLostError, FlorenceError, RequestError
from florence2.images import LoadedImage, open_image
from florence2.records import Failure
from serve.console import say
from serve.labeling.files import OutputError, Workspace, hash_of, opened_workspace
from serve.labeling.images import MAX_PIXELS_IN_FLIGHT
from serve.labeling.pipeline import check_any_hope
from serve.labeling.progress import StopSwitch, progress_bar, stop_on_signals
from serve.labeling.report import RunCounts
from serve.labeling.run import Job, ModelSource, asked_classes, earlier_labels_moved, error_sentence
from serve.labeling.settings import journal_settings
from serve.predict.predictor import Call, OpenImage, Predicted, Predictor
from serve.settings import Settings
from serve.video.detections import check_gives_boxes, seen_of
from serve.video.frames import (
    AskedFrame,
    Clip,
    Range,
    asked_frames,
    count_frames,
    need_libraries,
    open_clip,
)
from serve.video.journal import (
    JOURNAL_NAME,
    FrameJournal,
    Seen,
    check_usable,
    is_begun,
    open_frame_journal,
)
from serve.video.page import write_page
from serve.video.project import VideoProject
from serve.video.report import (
    SHOWN_FAILURES,
    SHOWN_NOTES,
    Summary,
    VideoReport,
    report_lines,
    write_report,
)
from serve.video.tracking import find_tracks, followed_frames


@dataclass(frozen=True, slots=True)
class _OpenRun:
    """What is open while a run goes on."""

    settings: Settings
    job: Job
    clip: Clip
    wanted: Range
    journal: FrameJournal

    @property
    def asked_rate(self) -> float:
        """Frames that are asked about in a second."""
        return self.clip.rate / self.wanted.every


def label_video(settings: Settings, job: Job, wanted: Range, model: ModelSource) -> VideoReport:
    """Labels what is left of a video and returns the report, which is also in the folder.

    ``job.images`` is the video. Raises FlorenceError when the run cannot begin; what was labeled
    before stays as it is.
    """
    _check_job(job, wanted)
    check_gives_boxes(settings, "leave out --task, or use '<OD>' or --prompt")
    need_libraries()
    clip = open_clip(job.images)
    _check_range(wanted, clip, clip.num_frames_said)
    with stop_on_signals() as stop, opened_workspace(job.out) as workspace:
        if job.overwrite or not is_begun(workspace.root):
            # What does not load changes nothing in the folder.
            if not job.overwrite:
                check_usable(workspace.root)
            predictor = model.load()
            model = replace(model, load=lambda: predictor)
        moved = earlier_labels_moved(workspace, JOURNAL_NAME, is_begun)
        with moved if job.overwrite else nullcontext():
            return _run(settings, job, clip, wanted, model, stop, workspace)


def _run(
    settings: Settings,
    job: Job,
    clip: Clip,
    wanted: Range,
    model: ModelSource,
    stop: StopSwitch,
    workspace: Workspace,
) -> VideoReport:
    noted = {
        "video": str(job.images.resolve()),
        "video_hash": hash_of(job.images),
        "every": wanted.every,
        "from": wanted.first,
        "to": wanted.last,
        **journal_settings(settings, model.name),
        "checkpoint": model.fingerprint(),
    }
    with closing(open_frame_journal(workspace, noted)) as journal:
        run = _OpenRun(settings, job, clip, wanted, journal)
        counts, error = _work(run, model, stop)
        project = VideoProject(workspace, job.images, link=job.link)
        summary = _written(run, project)
    report = VideoReport(
        summary, counts, journal.is_complete, job.command(), noted, project.folder, error
    )
    for line in report_lines(report):
        say(line)
    try:
        write_report(report, workspace)
        write_page(report, journal, clip, wanted, workspace)
    except OSError as problem:
        raise OutputError(
            f"The labels are safe, and the report could not be written into {str(job.out)!r} "
            f"({problem.strerror or problem}); make room and run it again."
        ) from problem
    return report


def _check_job(job: Job, wanted: Range) -> None:
    """RequestError for what only a folder of images has."""
    options = {
        "--recursive": job.recursive,
        "--coco": job.coco,
        "--yolo": job.yolo,
        "--draw": job.draw,
        "--retry-failed": job.retry_failed,
        "--relabel-changed": job.relabel_changed,
    }
    for option, is_given in options.items():
        if is_given:
            raise RequestError(
                f"{option} is for a folder of images, and {str(job.images)!r} is a video; leave it "
                "out."
            )
    if wanted.last is not None and wanted.last < wanted.first:
        raise RequestError(
            f"A range of frames is --from its first --to its last one, and --from {wanted.first} "
            f"--to {wanted.last} was received; write for example --from 0 --to 249."
        )


def _check_range(wanted: Range, clip: Clip, num_frames: int) -> None:
    if 0 < num_frames <= wanted.first:
        raise RequestError(
            f"--from is the number of a frame, from 0, and {clip.path.name!r} has {num_frames} "
            f"frames, not one with the number {wanted.first}; choose a smaller one."
        )


def _work(run: _OpenRun, model: ModelSource, stop: StopSwitch) -> tuple[RunCounts, str | None]:
    """Runs until done, stopped, or stuck; the second value says in a sentence what it stuck on."""
    counts = RunCounts()
    if run.journal.is_complete:
        return counts, None
    try:
        predictor = model.load()
        said = run.clip.num_frames_said or count_frames(run.clip.path)
        total = run.wanted.count(said) - run.journal.num_asked
        with progress_bar(total, unit="frames") as advance, stop.after_batch():
            _look(run, predictor, stop, counts, advance)
        if run.journal.last is None and not counts.interrupted:
            num_frames = count_frames(run.clip.path)
            raise RequestError(
                f"--from is the number of a frame, from 0, and {run.clip.path.name!r} has about "
                f"{num_frames} frames; choose a smaller one than {run.wanted.first}."
            )
    except KeyboardInterrupt:
        counts.interrupted = True
    except OSError as error:
        problem = OutputError(f"Writing into {str(run.job.out)!r} failed ({error.strerror}).")
        return counts, _unless_first(run, problem)
    # Whatever the model or a library raises, what is labeled gets its report.
    except Exception as error:  # noqa: BLE001
        return counts, _unless_first(run, error)
    return counts, None


def _unless_first(run: _OpenRun, error: Exception) -> str:
    if not run.journal.num_asked:
        raise error
    return error_sentence(error)


@dataclass(slots=True, eq=False)
class _InHand:
    """A frame between the file and its boxes: what the model looks at, or why it cannot be asked.

    ``picture`` is there for a question that is made of the frame itself.
    """

    frame: AskedFrame
    image: OpenImage | None = None
    picture: LoadedImage | None = None
    problem: FlorenceError | None = None

    def close(self) -> None:
        if self.image is not None:
            self.image.close()
        if self.picture is not None:
            self.picture.close()


def _look(
    run: _OpenRun,
    predictor: Predictor,
    stop: StopSwitch,
    counts: RunCounts,
    advance: Callable[[int], None],
) -> None:
    """Asks about the frames that are left, batch by batch, while the next batch is decoded."""
    started = time.perf_counter()
    journal = run.journal
    frames = asked_frames(run.clip, run.wanted, journal.last)
    try:
        with (
            closing(frames),
            ThreadPoolExecutor(1, thread_name_prefix="decode") as decoder,
        ):
            coming = decoder.submit(_batch, frames, predictor, run)
            while group := coming.result():
                coming = decoder.submit(_batch, frames, predictor, run)
                asked = _asked(group, predictor, run)
                journal.append(asked)
                counts.images += len(group)
                counts.outcomes["failed"] += sum(seen.failed is not None for seen in asked)
                advance(len(group))
                try:
                    run.job.max_failures.check(counts.outcomes["failed"], counts.images)
                except FlorenceError:
                    for one in coming.result():
                        one.close()
                    raise
                if stop():
                    counts.interrupted = True
                    for one in coming.result():
                        one.close()
                    return
        if journal.last is not None:
            journal.end()
    finally:
        counts.seconds = time.perf_counter() - started


def _batch(frames: Iterator[AskedFrame], predictor: Predictor, run: _OpenRun) -> list[_InHand]:
    """The next frames as the model takes them, fewer where they are large."""
    group: list[_InHand] = []
    width, height = run.clip.size_wh
    size = max(1, min(run.job.batch, MAX_PIXELS_IN_FLIGHT // (width * height)))
    while len(group) < size and (frame := next(frames, None)) is not None:
        one = _InHand(frame)
        group.append(one)
        try:
            picture = open_image(frame.pixels)
            if run.settings.reference is None:
                one.image = predictor.open(picture, run.settings)
            else:
                one.picture = picture
        except FlorenceError as problem:
            one.problem = problem
        one.frame = replace(frame, pixels=frame.pixels[:0])
    return group


def _asked(group: Sequence[_InHand], predictor: Predictor, run: _OpenRun) -> list[Seen]:
    try:
        outcomes = _outcomes(group, predictor, run)
    finally:
        for one in group:
            one.close()
    for outcome in outcomes:
        if isinstance(outcome, Failure) and outcome.code == DeviceLostError.code:
            raise DeviceLostError(outcome.message)
    return [seen_of(one.frame, outcome) for one, outcome in zip(group, outcomes, strict=True)]


def _outcomes(
    group: Sequence[_InHand], predictor: Predictor, run: _OpenRun
) -> list[Predicted | Failure]:
    """What became of each frame; one that cannot be asked does not touch the others."""
    images = [one.image for one in group if one.image is not None]
    answers = predictor.answers(images, Call(Priority.BULK)) if images else []
    found = iter(zip(images, answers, strict=True))
    outcomes: list[Predicted | Failure] = []
    for one in group:
        if one.problem is not None:
            outcomes.append(Failure(one.problem.code, str(one.problem)))
        elif one.picture is not None:
            outcomes.append(_by_reference(one.picture, predictor, run.settings))
        else:
            outcomes.append(predictor.predicted(*next(found)))
    if not run.journal.num_asked:
        check_any_hope(outcomes, len(outcomes), run.settings)
    return outcomes


def _by_reference(
    picture: LoadedImage, predictor: Predictor, settings: Settings
) -> Predicted | Failure:
    try:
        return predictor.predict([picture], settings, Call(Priority.BULK))[0]
    except FlorenceError as error:
        return Failure(error.code, str(error))


def _written(run: _OpenRun, project: VideoProject) -> Summary:
    """The project of all frames so far, written unless it is there already; what it holds."""
    journal, clip = run.journal, run.clip
    if journal.summary is not None and project.is_whole(journal.annotation_hash):
        return Summary(**journal.summary)
    if journal.last is None:
        return Summary(num_frames=clip.num_frames_said)
    tracks, boxes_alone = find_tracks(journal.seen(), run.asked_rate)
    frames = followed_frames(journal.seen(), tracks, run.asked_rate)
    num_frames = _num_frames(run)
    try:
        annotation_hash, num_figures = project.write(
            tracks,
            frames,
            clip.size_wh,
            num_frames,
            asked_classes(run.settings),
            journal.annotation_hash,
            journal.wrote,
        )
    except OSError as error:
        raise OutputError(
            f"What was found is safe, and the project could not be written into "
            f"{str(run.job.out)!r} ({error.strerror or error}); make room and run it again."
        ) from error
    is_cut = journal.is_complete and num_frames < clip.num_frames_said
    summary = replace(
        _counted(journal.seen()),
        num_frames=num_frames,
        objects=len(tracks),
        objects_by_class=dict(Counter(track.class_name for track in tracks.values())),
        figures=num_figures,
        boxes_alone=boxes_alone,
        frames_said=clip.num_frames_said if is_cut else None,
    )
    journal.written(annotation_hash, asdict(summary))
    return summary


def _num_frames(run: _OpenRun) -> int:
    """The frames of the video: those that were decoded, if all were."""
    last = run.journal.last
    known = 0 if last is None else last.index + 1
    wanted = run.wanted.last
    if run.journal.is_complete and (wanted is None or known <= wanted):
        return known
    return max(known, run.clip.num_frames_said or count_frames(run.clip.path))


def _counted(frames: Iterator[Seen]) -> Summary:
    asked = empty = failed = truncated = damaged = 0
    last_frame = None
    codes: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    failures: dict[str, str] = {}
    for seen in frames:
        asked += 1
        last_frame = seen.place.index
        damaged += seen.damaged
        truncated += seen.is_truncated
        notes.update(seen.notes)
        if seen.failed is not None:
            failed += 1
            codes[seen.failed[0]] += 1
            if len(failures) < SHOWN_FAILURES:
                failures[str(seen.place.index)] = seen.failed[1]
        else:
            empty += not seen.found
    return Summary(
        last_frame=last_frame,
        asked=asked,
        empty=empty,
        failed=failed,
        failures=failures,
        failed_by_code=dict(codes),
        truncated=truncated,
        notes=dict(notes.most_common(SHOWN_NOTES)),
        damaged=damaged,
    )

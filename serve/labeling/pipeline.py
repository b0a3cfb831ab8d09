"""Images through the model and into the project: reading, asking, drawing and writing overlap.

A few threads open images and make them ready for the model, a batch ahead of it. The calling
thread asks the model, batch by batch. Behind it a thread writes one batch after the other, while
others draw its previews; a batch is journaled once its files are on the disk.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from florence2.budget import open_pixels
from florence2.engine.scheduler import Priority
from florence2.errors import DeviceLostError, FlorenceError, ImageError, RequestError
from florence2.images import LoadedImage
from florence2.opencv import cv2
from florence2.records import Failure, Polygon, Quad, Result, SizeWh, clip_region
from serve.labeling.files import Stamp, stamp_of
from serve.labeling.images import MAX_PIXELS_IN_FLIGHT, ImageFile, Loaded, read_ahead
from serve.labeling.journal import Entry, Journal
from serve.labeling.previews import draw_preview, preview_path, preview_pixels
from serve.labeling.project import GrowingProject
from serve.labeling.report import RunCounts
from serve.limits import NO_LIMIT, FailureLimit
from serve.predict.geometry import drawable_rings, rings_of
from serve.predict.predictor import Call, OpenImage, Predicted, Predictor
from serve.run_page.drawing import scores_of
from serve.settings import Settings
from serve.settler import Settler

_READERS: Final = max(3, min(8, (os.cpu_count() or 1) // 2))
_DRAWERS: Final = 2
_AHEAD: Final = 2
_NOTE_COUNT: Final = re.compile(r": \d+$")
_NO_AREA: Final = "outlines without area, left out"
# Failures that every image would have in the same way.
_HOPELESS: Final = ("bad_request", "bad_checkpoint", "bad_device")


@dataclass(frozen=True, slots=True)
class Labeling:
    """What a run works with, and whom it tells. Previews are drawn into ``previews``, if any.

    ``run_id`` is noted beside all that is written.
    """

    predictor: Predictor
    settings: Settings
    project: GrowingProject
    journal: Journal
    on_images: Callable[[int], None]
    should_stop: Callable[[], bool]
    counts: RunCounts
    run_id: str
    previews: Path | None = None
    limit: FailureLimit = NO_LIMIT


@dataclass(slots=True, eq=False)
class _InHand:
    """An image between its file and its labels.

    ``image`` is what the model looks at, ``problem`` why it cannot be asked. ``preview`` is the
    picture to draw labels on.
    """

    file: ImageFile
    size_wh: SizeWh = (0, 0)
    problem: FlorenceError | None = None
    stamp: Stamp | None = None
    is_first_of_many: bool = False
    picture: LoadedImage | None = None
    image: OpenImage | None = None
    preview: NDArray[np.uint8] | None = None

    @property
    def held_pixels(self) -> int:
        """What is in memory of it."""
        seen = self.image.num_pixels if self.image is not None else 0
        return (seen or self.num_pixels) + self._preview_pixels

    @property
    def num_pixels(self) -> int:
        """Those of the picture; 0 for one that could not be opened."""
        return math.prod(self.size_wh)

    @property
    def _preview_pixels(self) -> int:
        return math.prod(self.preview.shape[:2]) if self.preview is not None else 0

    def was_answered(self) -> None:
        """Gives up what the model looked at."""
        self.image = None
        if self.picture is not None:
            self.picture.close(self._preview_pixels)

    def close(self) -> None:
        """Gives up everything, so that others have room."""
        self.preview = self.image = None
        if self.picture is not None:
            self.picture.close()


_Answered = list[tuple[_InHand, Predicted | Failure | FlorenceError]]


def label_images(files: Iterable[ImageFile], run: Labeling, *, batch: int) -> None:
    """Labels ``files`` in order, batch by batch; an image counts once its files are on the disk.

    Raises RequestError, with nothing journaled, when not one image could be asked as planned.
    """
    started = time.perf_counter()
    num_devices = run.predictor.num_devices
    batch *= num_devices
    # OpenCV's own would take the cores from the model's; images are drawn side by side anyway.
    cv2.setNumThreads(1)
    is_first = not run.journal.totals.images
    in_hand = read_ahead(
        files,
        lambda loaded: _made_ready(loaded, run),
        threads=_READERS,
        ahead=batch * _at_once(num_devices) + _AHEAD,
        budget=open_pixels(),
    )
    with ThreadPoolExecutor(_DRAWERS, thread_name_prefix="draw") as drawers:
        try:
            with (
                # Batches are written and drawn while the next one is with the model.
                Settler[_Answered](lambda one: _settle(one, run, drawers), 1, "write") as settler,
                closing(in_hand),
                closing(_batches(in_hand, batch)) as batches,
                closing(
                    _asked(batches, run, _at_once(num_devices), is_first=is_first)
                ) as all_asked,
            ):
                for answered in all_asked:
                    settler.put(answered)
                    if run.should_stop():
                        run.counts.interrupted = True
                        break
        finally:
            run.counts.seconds = time.perf_counter() - started


def _made_ready(loaded: Loaded, run: Labeling) -> _InHand:
    """An opened image as the model takes it, on the thread that read it."""
    if loaded.picture is None:
        problem = loaded.problem or FlorenceError("The image could not be read.")
        return _InHand(loaded.file, problem=problem)
    picture = loaded.picture
    one = _InHand(
        loaded.file, picture.size_wh, None, loaded.stamp, loaded.is_first_of_many, picture
    )
    try:
        for region in run.settings.regions:
            # On another image it may well be.
            clip_region(region, picture.size_wh)
        if run.previews is not None:
            one.preview = preview_pixels(picture.image)
        if run.settings.reference is None:
            one.image = run.predictor.open(picture, run.settings)
    except FlorenceError as problem:
        one.problem = problem
        one.close()
    return one


def _batches(in_hand: Iterator[_InHand | None], size: int) -> Generator[list[_InHand]]:
    """At most ``size`` images, and fewer when they are large. Who takes a batch closes it."""
    group: list[_InHand] = []
    try:
        for one in in_hand:
            if one is not None:
                group.append(one)
            pixels = sum(one.num_pixels for one in group)
            if group and (one is None or len(group) == size or pixels >= MAX_PIXELS_IN_FLIGHT):
                full, group = group, []
                yield full
        if group:
            full, group = group, []
            yield full
    finally:
        for one in group:
            one.close()


def _at_once(num_devices: int) -> int:
    """Batches that are asked at once: with several devices none waits for the end of one."""
    return 1 if num_devices == 1 else 2


def _asked(
    batches: Iterator[list[_InHand]], run: Labeling, at_once: int, *, is_first: bool
) -> Generator[_Answered]:
    """The batches with their answers, in order; the first alone, as it may show that none can be.

    Close it to give up what is not begun.
    """
    if at_once == 1:
        for number, group in enumerate(batches):
            yield _ask(group, run, is_first=is_first and number == 0)
        return
    asking: deque[tuple[list[_InHand], Future[_Answered]]] = deque()
    with ThreadPoolExecutor(at_once, thread_name_prefix="ask") as askers:
        try:
            for number, group in enumerate(batches):
                begun = askers.submit(_ask, group, run, is_first=is_first and number == 0)
                asking.append((group, begun))
                if number == 0 or len(asking) == at_once:
                    yield asking.popleft()[1].result()
            while asking:
                yield asking.popleft()[1].result()
        finally:
            wait(begun for _, begun in asking if not begun.cancel())
            for group, _ in asking:
                for one in group:
                    one.close()


def _ask(group: Sequence[_InHand], run: Labeling, *, is_first: bool) -> _Answered:
    """The batch with its answers, first what failed before the model saw it."""
    readable = [one for one in group if one.problem is None]
    try:
        ask = _outcomes if run.settings.reference is None else _outcomes_by_reference
        outcomes = ask(readable, run, is_first=is_first) if readable else []
        for outcome in outcomes:
            if isinstance(outcome, Failure) and outcome.code == DeviceLostError.code:
                raise DeviceLostError(outcome.message)
    except BaseException:
        for one in group:
            one.close()
        raise
    for one in readable:
        one.was_answered()
    failed = [(one, one.problem) for one in group if one.problem is not None]
    return [*failed, *zip(readable, outcomes, strict=True)]


def _outcomes(
    readable: Sequence[_InHand], run: Labeling, *, is_first: bool
) -> list[Predicted | Failure]:
    images = [one.image for one in readable if one.image is not None]
    answers = run.predictor.answers(images, Call(Priority.BULK))
    if is_first:
        check_any_hope([one for found in answers for one in found], len(images), run.settings)
    return [
        run.predictor.predicted(image, found) for image, found in zip(images, answers, strict=True)
    ]


def _outcomes_by_reference(
    readable: Sequence[_InHand], run: Labeling, *, is_first: bool
) -> list[Predicted | Failure]:
    """What an image is asked shows only when the reference on it was looked at."""
    outcomes: list[Predicted | Failure] = []
    for picture in [one.picture for one in readable if one.picture is not None]:
        try:
            outcomes += run.predictor.predict([picture], run.settings, Call(Priority.BULK))
        except FlorenceError as error:
            outcomes.append(Failure(error.code, str(error)))
    if is_first:
        check_any_hope(outcomes, len(outcomes), run.settings)
    return outcomes


def check_any_hope(
    answers: Sequence[Result | Predicted | Failure], num_images: int, settings: Settings
) -> None:
    """Raises RequestError when the first answers show that every image will fail alike."""
    failures = [answer for answer in answers if isinstance(answer, Failure)]
    if len(failures) < len(answers) or any(one.code not in _HOPELESS for one in failures):
        return
    # A later step of a cascade may fail for what this one image showed.
    is_cascade = len(settings.steps) > 1
    if num_images > 1 or not is_cascade or failures[0].code != RequestError.code:
        raise RequestError(failures[0].message)


def _settle(batch: _Answered, run: Labeling, drawers: ThreadPoolExecutor) -> None:
    """Writes what became of a batch, on the thread of its own; then it counts."""
    entries: list[Entry] = []
    drawings: list[Future[None]] = []
    try:
        for one, outcome in batch:
            entry = _entry(one, outcome, run)
            entries.append(entry)
            if entry.state == "failed" or not isinstance(outcome, Predicted):
                continue
            if run.previews is not None and one.preview is not None:
                # After its annotation: an older preview is drawn again.
                path = preview_path(run.previews, one.file.name)
                drawings.append(drawers.submit(draw_preview, one.preview, outcome.annotation, path))
        for drawing in drawings:
            drawing.result()
        run.project.sync()
        run.journal.append(entries)
    finally:
        for one, _ in batch:
            one.close()
    run.counts.images += len(entries)
    run.counts.outcomes.update(entry.state for entry in entries)
    run.counts.outcomes["labels"] += sum(entry.objects for entry in entries)
    run.on_images(len(entries))
    run.limit.check(run.counts.outcomes["failed"], run.counts.images)


def _entry(one: _InHand, outcome: Predicted | Failure | FlorenceError, run: Labeling) -> Entry:
    looked = LookedAt(one.file, one.size_wh, one.stamp, one.is_first_of_many)
    return written_entry(looked, outcome, run.project, run.journal, run.run_id)


@dataclass(frozen=True, slots=True)
class LookedAt:
    """An image file as it was when it was opened. ``stamp`` is None where nobody looked."""

    file: ImageFile
    size_wh: SizeWh
    stamp: Stamp | None
    is_first_of_many: bool


def written_entry(
    looked: LookedAt,
    outcome: Predicted | Failure | FlorenceError,
    project: GrowingProject,
    journal: Journal,
    run_id: str,
) -> Entry:
    """Writes an image's labels into the project; what is to be noted of it, also of a failure."""
    file = looked.file
    if not isinstance(outcome, Predicted):
        return _failed(file, outcome, run_id)
    annotation = outcome.annotation
    try:
        stamp = looked.stamp or stamp_of(file.path)
        before = journal.source_of(file.key)
        stored = project.add(file, annotation, stamp, before, run_id)
    except ImageError as problem:
        return _failed(file, problem, run_id)
    objects = len(annotation.labels)
    return Entry(
        image=file.key,
        name=file.name,
        state="labeled" if objects or len(annotation.img_tags) else "empty",
        objects=objects,
        truncated=sum(result.truncated for result in outcome.results),
        notes=_notes(outcome.results, looked.size_wh),
        is_first_of_many=looked.is_first_of_many,
        size_bytes=stamp.size_bytes,
        mtime_ns=stamp.mtime_ns,
        hash=stored.hash,
        labels_bytes=stored.labels_bytes,
        labels_hash=stored.labels_hash,
        run=run_id,
        labels=stored.written.labels,
        image_tags=stored.written.image_tags,
        scores=scores_of(annotation),
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


def _failed(file: ImageFile, problem: FlorenceError | Failure, run_id: str) -> Entry:
    message = problem.message if isinstance(problem, Failure) else str(problem)
    return Entry(
        file.key, file.name, "failed", code=problem.code, message=message[:500], run=run_id
    )

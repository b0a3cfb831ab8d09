"""One ``florence2 label``: from a plan and two folders to a project and a report."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from florence2.budget import open_pixels
from florence2.errors import FlorenceError, ImageError, RequestError
from florence2.images import LoadedImage
from florence2.prompts import clip_region
from florence2.records import Failure, Polygon, Quad, Region, Result, SizeWh
from serve.labeling.files import stamp_of
from serve.labeling.images import MAX_PIXELS_IN_FLIGHT, ImageFile, Loaded, read_ahead
from serve.labeling.journal import Entry, Journal
from serve.labeling.plan import Plan, Prompt
from serve.labeling.previews import draw_preview, preview_path
from serve.labeling.project import GrowingProject
from serve.predict.annotations import Answered, LabelRules, annotation_from_answers
from serve.predict.geometry import drawable_rings, rings_of

_READERS: Final = 3
_AHEAD: Final = 2
_NOTE_COUNT: Final = re.compile(r": \d+$")
_NO_AREA: Final = "outlines without area, left out"
# Failures that every image would have in the same way.
_HOPELESS: Final = ("bad_request", "bad_checkpoint", "bad_device")


class Model(Protocol):
    """The part of ``florence2.Florence2`` that labeling uses."""

    def run_many(self, requests: Sequence[Any]) -> Sequence[Result | Failure]: ...


@dataclass(slots=True)
class RunCounts:
    """What this run did, beside the totals of the folder."""

    images: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds > 0 else 0.0


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

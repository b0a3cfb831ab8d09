"""From images and settings to annotations: asks, waits for the answers, builds the labels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Protocol

from florence2.ask import AnyImage, Ask
from florence2.cache import EncodedImage
from florence2.cascade import parse_steps
from florence2.errors import FlorenceError, RequestError
from florence2.images import LoadedImage, open_image
from florence2.records import Failure, Result, Timings
from florence2.scheduler import Priority, QueueFullError, StoppedError
from florence2.tasks import TaskInput
from serve.annotations import Answered, annotation_from_answers, wanted_in
from serve.deployment import Deployment
from serve.geometry import Located
from serve.http.metrics import Outcome, Stage
from serve.label_rules import LabelRules
from serve.platform.reference import resolve_reference
from serve.platform.waiting import when_queue_has_room
from serve.questions import Question, questions_of
from serve.rules import rules_of
from serve.sdk import sly
from serve.settings.model import Settings
from serve.shifting import moved
from serve.tiles import TileResult, can_tile, merge_tiles
from serve.views import View, views_of

# Three bytes each; a batch of a few large images is answered in parts.
MAX_OPEN_PIXELS: Final = 100_000_000


@dataclass(frozen=True, slots=True)
class Call:
    """Who waits for a prediction, and for how long. ``api`` downloads a reference image."""

    priority: Priority = Priority.INTERACTIVE
    deadline_s: float | None = None
    should_stop: Callable[[], bool] | None = None
    api: sly.Api | None = None

    def has_to_stop(self) -> bool:
        """Whether nobody waits any longer."""
        return self.should_stop is not None and self.should_stop()


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """One image's annotation. ``timings_s`` are those of the batches it was part of."""

    annotation: sly.Annotation
    notes: tuple[str, ...] = ()
    timings_s: Timings = field(default_factory=Timings)


class Watcher(Protocol):
    """Who counts what happened; the app's metrics."""

    def count_image(self, outcome: Outcome, code: str | None = None) -> None: ...

    def stage(self, name: Stage, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """One image with everything that is asked about it."""

    picture: LoadedImage
    views: tuple[View, ...]
    questions: tuple[Question, ...]
    settings: Settings

    def asks(self) -> Iterator[Ask]:
        for question in self.questions:
            for view in self.views:
                yield Ask(
                    view.picture,
                    question.task,
                    question.text,
                    question.region,
                    num_beams=self.settings.num_beams,
                    max_new_tokens=self.settings.max_new_tokens,
                )

    @property
    def num_asks(self) -> int:
        return len(self.questions) * len(self.views)


class Predictor:
    """Answers requests about images with whatever model is deployed."""

    def __init__(self, deployment: Deployment, watcher: Watcher) -> None:
        self._deployment = deployment
        self._watcher = watcher

    def ask(self, asks: Sequence[Ask], call: Call = Call()) -> list[Result | Failure]:
        """The deployed model's answers, in order. Raises QueueFullError or StoppedError."""
        deployed = self._deployment.current
        self._deployment.wake()
        return deployed.scheduler.run(
            asks,
            priority=call.priority,
            deadline_s=call.deadline_s,
            should_stop=call.should_stop,
        )

    def predict(
        self, images: Sequence[AnyImage], settings: Settings, call: Call = Call()
    ) -> list[Predicted | Failure]:
        """One annotation or failure per image, in order; one image does not touch the others.

        Raises RequestError for settings that fit no image, QueueFullError, StoppedError.
        """
        if settings.reference is not None:
            if settings.reference.image_id is None and len(images) > 1:
                return [self._with_own_reference(image, settings, call) for image in images]
            settings = resolve_reference(
                settings, call.api, lambda asks: self.ask(asks, call), images[0] if images else None
            )
        predicted = [
            one
            for part, jobs in enumerate(_groups(images, settings))
            for one in self._answer_jobs(jobs, call, is_first=part == 0)
        ]
        for one in predicted:
            self._count(one)
        return predicted

    def _answer_jobs(
        self, jobs: Sequence[_Job | Failure], call: Call, *, is_first: bool
    ) -> list[Predicted | Failure]:
        asks = [ask for job in jobs if isinstance(job, _Job) for ask in job.asks()]
        ask = partial(self.ask, asks, call)
        # What was answered already is not asked again because the queue is full now.
        answers = iter(ask() if is_first else when_queue_has_room(ask, call.has_to_stop))
        return [
            job
            if isinstance(job, Failure)
            else self._settled(job, [next(answers) for _ in range(job.num_asks)])
            for job in jobs
        ]

    def _count(self, one: Predicted | Failure) -> None:
        if isinstance(one, Failure):
            self._watcher.count_image("failed", one.code)
            return
        found = one.annotation.labels or one.annotation.img_tags
        self._watcher.count_image("labeled" if found else "empty")

    def _with_own_reference(
        self, image: AnyImage, settings: Settings, call: Call
    ) -> Predicted | Failure:
        """One image whose reference is on itself; what is wrong with it is its own failure."""
        try:
            return self.predict([image], settings, call)[0]
        except (QueueFullError, StoppedError):
            raise
        except FlorenceError as error:
            self._watcher.count_image("failed", error.code)
            return Failure(error.code, str(error))

    def _settled(self, job: _Job, answers: Sequence[Result | Failure]) -> Predicted | Failure:
        """One failed answer fails the image: half its labels would pass for all of them."""
        results: list[Result] = []
        for answer in answers:
            if isinstance(answer, Failure):
                return replace(answer, image=None)
            results.append(answer)
        began = time.perf_counter()
        per_view = len(job.views)
        rules = rules_of(job.settings)
        answered = [
            _answered(job, question, rules, results[place * per_view : (place + 1) * per_view])
            for place, question in enumerate(job.questions)
        ]
        annotation = annotation_from_answers(answered, rules, job.picture.size_wh)
        timings_s = _slowest(results)
        self._watcher.stage("postprocess", time.perf_counter() - began)
        self._watcher.stage("vision", timings_s.vision)
        self._watcher.stage("prompt", timings_s.prompt)
        self._watcher.stage("decode", timings_s.decode)
        notes = tuple(dict.fromkeys(note for result in results for note in result.notes))
        return Predicted(annotation, notes, timings_s)


def _groups(images: Sequence[AnyImage], settings: Settings) -> Iterator[list[_Job | Failure]]:
    """The images opened, and no more of them at a time than memory should hold."""
    group: list[_Job | Failure] = []
    pixels = 0
    for image in images:
        job = _job(image, settings)
        group.append(job)
        pixels += math.prod(job.picture.size_wh) if isinstance(job, _Job) else 0
        if pixels >= MAX_OPEN_PIXELS:
            yield group
            group, pixels = [], 0
    if group:
        yield group


def _job(image: AnyImage, settings: Settings) -> _Job | Failure:
    try:
        if isinstance(image, Failure):
            return image
        if isinstance(image, EncodedImage):
            raise RequestError("A prediction needs the image itself, and its features were given.")
        picture = open_image(image)
        questions = questions_of(settings)
        asks_regions = parse_steps(settings.task_prompt)[0].takes is TaskInput.REGION
        views = views_of(
            picture,
            None if asks_regions else settings.rectangle,
            settings.tiling if can_tile(settings.task_prompt) else None,
        )
        return _Job(picture, views, questions, settings)
    except FlorenceError as error:
        return Failure(error.code, str(error))


def _answered(
    job: _Job, question: Question, rules: LabelRules, results: Sequence[Result]
) -> Answered:
    size_wh = job.picture.size_wh
    placed = [
        moved(result, view.offset_xy, size_wh)
        for result, view in zip(results, job.views, strict=True)
    ]
    answered = Answered(placed[0], question.class_name, question.text, question.region)
    if len(placed) == 1:
        return answered

    def is_shown(shape: Located) -> bool:
        alone = replace(placed[0], objects=(shape,), steps=())
        return bool(wanted_in(replace(answered, result=alone), rules, size_wh))

    tiles = [
        TileResult(result, view.box_xyxy) for result, view in zip(placed, job.views, strict=True)
    ]
    return replace(answered, result=merge_tiles(tiles, is_shown))


def _slowest(results: Sequence[Result]) -> Timings:
    """The longest of each stage: the results of one image mostly share their batches."""
    return Timings(
        vision=max((result.timings_s.vision for result in results), default=0.0),
        prompt=max((result.timings_s.prompt for result in results), default=0.0),
        decode=max((result.timings_s.decode for result in results), default=0.0),
    )

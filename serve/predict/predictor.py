"""From images and settings to annotations: asks, waits for the answers, builds the labels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, Literal, Protocol, TypeVar

from florence2.budget import WAIT_S, Budget, Hold, open_pixels
from florence2.engine.ask import Ask
from florence2.engine.encoding import AnyImage, EncodedImage, Preparer
from florence2.engine.engine import Encoded
from florence2.engine.scheduler import Priority
from florence2.errors import (
    DeadlineError,
    FlorenceError,
    GenerationCancelledError,
    NoRoomError,
    QueueFullError,
    RequestError,
    StoppedError,
)
from florence2.images import LoadedImage, Room, identity, open_image
from florence2.pixels import PreparedImage
from florence2.records import Failure, Region, Result, Timings
from florence2.tasks import OutputKind, TaskInput, parse_steps
from serve.model_service import GEOMETRIES, Deployed
from serve.naming import FIXED_SHAPES, class_color, class_titles, clean_class_name
from serve.platform.reference import resolve_reference
from serve.predict.annotations import (
    Answered,
    Found,
    LabelRules,
    annotation_from_answers,
    wanted_in,
)
from serve.predict.full_queue import QUEUE_LIMIT_S, when_queue_has_room
from serve.predict.geometry import Located
from serve.predict.tiling import (
    BoxXyxyInt,
    TileResult,
    View,
    can_tile,
    merge_tiles,
    moved,
    views_of,
)
from serve.sdk import sly
from serve.settings import Settings

# Three bytes each; a batch of a few large images is answered in parts.
MAX_OPEN_PIXELS: Final = 100_000_000
AHEAD_BYTES: Final = 3 * 768 * 768
"""Of an image that is scaled to the size of the network; demo's is smaller."""
_TIMEOUT: Final = "timeout_s"


class Opened(Protocol):
    """Something that holds pixels until it is closed."""

    @property
    def num_pixels(self) -> int: ...

    def close(self) -> None: ...


Source = TypeVar("Source")
Item = TypeVar("Item", bound=Opened)
Anything = TypeVar("Anything")


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment of the monotonic clock until which a client waits; None: as long as it takes."""

    at_s: float | None = None

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Deadline:
        """The deadline that ``timeout_s`` asks for, counted from now; RequestError."""
        seconds = state.get(_TIMEOUT)
        if seconds is None:
            return cls()
        if (
            isinstance(seconds, int | float)
            and not isinstance(seconds, bool)
            and 0 < seconds < math.inf
        ):
            return cls(time.monotonic() + seconds)
        raise RequestError(
            f"{_TIMEOUT} is a number of seconds above 0, and {str(seconds)[:60]!r} was received; "
            "correct it or leave it out."
        )

    @property
    def left_s(self) -> float | None:
        """Seconds until then, 0 when it has passed."""
        return None if self.at_s is None else max(0.0, self.at_s - time.monotonic())


@dataclass(frozen=True, slots=True)
class Patience:
    """Who waits for room: bulk work or not, until when, and whether still."""

    is_bulk: bool
    ends_s: float | None = None
    should_stop: Callable[[], bool] | None = None

    @property
    def left_s(self) -> float | None:
        """Seconds that are left, None for as long as it takes."""
        return None if self.ends_s is None else max(0.0, self.ends_s - time.monotonic())

    def reason(self) -> FlorenceError | None:
        """Why nobody waits any longer."""
        if self.should_stop is not None and self.should_stop():
            return GenerationCancelledError(
                "The request was cancelled; send it again if it is needed."
            )
        if self.left_s == 0.0:
            return DeadlineError(
                "An answer was wanted sooner than there was room to open the image; allow more "
                "time or ask for less at once."
            )
        return None

    def room(self, budget: Budget, wait_s: float) -> Callable[[int], Hold]:
        """Waits for so many pixels; NoRoomError after ``wait_s``, or the ``reason``."""

        def hold(pixels: int) -> Hold:
            return budget.hold(pixels, is_bulk=self.is_bulk, wait_s=wait_s, stop=self.reason)

        return hold


def in_parts(
    sources: Iterable[Source], open_one: Callable[[Source, float], Item]
) -> Generator[list[Item]]:
    """The sources opened, in order and in parts; a part is closed when the next one is asked for.

    ``open_one`` may wait for so many seconds. Raises its NoRoomError only with nothing in hand: the
    first part is refused soon, so that the caller may come back, a later one when the queue of the
    model would be given up too. Close it, or what the last part holds stays held.
    """
    part: list[Item] = []
    wait_s = WAIT_S
    try:
        for source in sources:
            try:
                item = open_one(source, 0.0 if _pixels(part) else wait_s)
            except NoRoomError:
                if not _pixels(part):
                    raise
                yield part
                _close(part)
                wait_s = QUEUE_LIMIT_S
                item = open_one(source, wait_s)
            part.append(item)
            if _pixels(part) >= MAX_OPEN_PIXELS:
                yield part
                _close(part)
                wait_s = QUEUE_LIMIT_S
        if part:
            yield part
    finally:
        _close(part)


def _pixels(part: list[Item]) -> int:
    return sum(item.num_pixels for item in part)


def _close(part: list[Item]) -> None:
    for item in part:
        item.close()
    part.clear()


@dataclass(frozen=True, slots=True)
class Question:
    """One question about an image. ``class_name`` is the class of all its answers, if mapped."""

    task: str
    text: str | None = None
    region: Region | None = None
    class_name: str | None = None


def questions_of(settings: Settings) -> tuple[Question, ...]:
    """Every question about one image: a phrase, a prompt of a class, or a region each."""
    task = settings.task_prompt
    takes = settings.steps[0].takes
    if takes is TaskInput.REGION:
        return tuple(Question(task, region=Region(box)) for box in settings.regions)
    if takes is not TaskInput.TEXT:
        return (Question(task),)
    return tuple(
        Question(task, prompt.text, class_name=prompt.class_name) for prompt in settings.prompts
    )


def rules_of(settings: Settings, fixed_shapes: Mapping[str, str] = FIXED_SHAPES) -> LabelRules:
    """The labels' rules that the settings ask for."""
    return LabelRules(
        classes=settings.classes_by_phrase,
        threshold=settings.confidence_threshold,
        class_thresholds=settings.class_thresholds,
        calibration=settings.calibration,
        whitelist=None if settings.classes is None else frozenset(settings.classes),
        class_suffix=settings.class_suffix,
        geometry=settings.geometry,
        max_box_area=settings.max_box_area,
        sentences_as_classes=settings.sentences_as_classes,
        nms_threshold=settings.nms_threshold,
        containment_threshold=settings.containment_threshold,
        across_classes=settings.nms_across_classes,
        is_one_class=settings.is_one_class,
        fixed_shapes=fixed_shapes,
    )


def asked_classes(settings: Settings) -> list[sly.ObjClass]:
    """The classes that the prompts stand for, as labels of theirs will be; none without prompts."""
    outlined = settings.steps[-1].output is OutputKind.POLYGONS
    shape = settings.geometry if outlined else "rectangle"
    names = dict.fromkeys(settings.classes_by_phrase.values())
    if settings.reference is not None:
        names[settings.reference.class_name] = None
    rules = rules_of(settings)
    wanted = [(clean_class_name(name), shape) for name in names if rules.wants(name, shape)]
    titles = class_titles(wanted, rules.class_suffix, rules.fixed_shapes).values()
    return [sly.ObjClass(title, GEOMETRIES[shape], class_color(title)) for title in titles]


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

    def patience(self, *, is_bulk: bool = False) -> Patience:
        """How long to wait for room, counted from now."""
        ends_s = None if self.deadline_s is None else time.monotonic() + self.deadline_s
        return Patience(is_bulk or self.priority is Priority.BULK, ends_s, self.should_stop)


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """One image's annotation. ``timings_s`` are those of the batches it was part of.

    ``answered`` has one for each question, in pixels of the image, merged from its tiles;
    ``located`` for each label of the annotation what it was made of, None where that is unknown.
    ``views_xyxy`` are the parts of the image that were looked at, in pixels.
    """

    annotation: sly.Annotation
    notes: tuple[str, ...] = ()
    timings_s: Timings = field(default_factory=Timings)
    answered: tuple[Answered, ...] = ()
    located: tuple[Found | None, ...] = ()
    views_xyxy: tuple[BoxXyxyInt, ...] = ()

    @property
    def results(self) -> tuple[Result, ...]:
        """The result of each question."""
        return tuple(one.result for one in self.answered)


class Models(Protocol):
    """Where the model is that answers now."""

    @property
    def current(self) -> Deployed: ...

    def wake(self) -> None: ...


class Watcher(Protocol):
    """Who counts what happened."""

    def count_image(
        self, outcome: Literal["labeled", "empty", "failed"], code: str | None = None
    ) -> None: ...

    def stage(
        self, name: Literal["queue", "vision", "prompt", "decode", "postprocess"], seconds: float
    ) -> None: ...


class Unwatched:
    """Nobody counts."""

    def count_image(self, outcome: str, code: str | None = None) -> None:
        """Not counted."""

    def stage(self, name: str, seconds: float) -> None:
        """Not measured."""


@dataclass(frozen=True, slots=True, eq=False)
class OpenImage:
    """An open image with everything that is asked about it.

    ``pictures``, one for each of ``views``, are what is looked at. Of an image that is looked at
    in one view, the view is prepared, and nothing else of it is held.
    """

    picture: LoadedImage
    views: tuple[View, ...]
    pictures: tuple[LoadedImage | PreparedImage | EncodedImage, ...]
    questions: tuple[Question, ...]
    settings: Settings
    is_ours: bool = True

    def asks(self) -> Iterator[Ask]:
        """What the model is asked: every question about every view."""
        for question in self.questions:
            for picture in self.pictures:
                yield Ask(
                    picture,
                    question.task,
                    question.text,
                    question.region,
                    num_beams=self.settings.num_beams,
                    max_new_tokens=self.settings.max_new_tokens,
                    adapter=self.settings.model,
                )

    @property
    def num_asks(self) -> int:
        """How many ``asks`` there are."""
        return len(self.questions) * len(self.views)

    @property
    def num_pixels(self) -> int:
        """The pixels that are held."""
        first = self.pictures[0]
        if isinstance(first, PreparedImage):
            return first.num_pixels
        return math.prod(self.picture.size_wh)

    def close(self) -> None:
        """Gives up what is held of an image that was opened here."""
        if self.is_ours:
            self.picture.close()


@dataclass(frozen=True, slots=True, eq=False)
class AheadImage:
    """An image file that was made ready before its turn, and holds nothing of a budget any more:
    who has it counts ``AHEAD_BYTES`` for it.

    ``preparer`` is the model's that it is ready for; others open ``content``.
    """

    content: bytes
    opened: OpenImage
    preparer: Preparer


@dataclass(frozen=True, slots=True, eq=False)
class _FailedImage:
    """An image that cannot be asked about."""

    failure: Failure
    num_pixels: int = 0

    def close(self) -> None:
        """It holds nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class _AskedImage:
    """An image of asks as the model takes it, and the places of those asks."""

    image: AnyImage
    places: Sequence[int]
    opened: LoadedImage | None = None

    @property
    def num_pixels(self) -> int:
        return self.image.num_pixels if isinstance(self.image, PreparedImage) else 0

    def close(self) -> None:
        if self.opened is not None:
            self.opened.close()


class Predictor:
    """Answers requests about images with whatever model is deployed.

    ``fixed_shapes`` are the classes whose shape the readers of the annotations know already.
    """

    def __init__(
        self,
        models: Models,
        watcher: Watcher | None = None,
        budget: Budget | None = None,
        *,
        fixed_shapes: Mapping[str, str] = FIXED_SHAPES,
    ) -> None:
        self._models = models
        self._watcher = watcher or Unwatched()
        self._budget = budget or open_pixels()
        self._fixed_shapes = fixed_shapes

    def ask(self, asks: Sequence[Ask], call: Call = Call()) -> list[Result | Failure]:
        """The deployed model's answers, in order.

        Images are opened and scaled here, on the caller's thread: the model's must not wait for
        room, which those may hold who wait for the model. Raises QueueFullError, NoRoomError or
        StoppedError.
        """
        deployed = self._models.current
        patience = call.patience()
        places: dict[object, list[int]] = {}
        for place, ask in enumerate(asks):
            places.setdefault(identity(ask.image), []).append(place)
        answers: dict[int, Result | Failure] = {}

        def opened(of_image: list[int], wait_s: float) -> _AskedImage:
            room = patience.room(self._budget, wait_s)
            return _asked(asks[of_image[0]].image, of_image, deployed.model.engine.preparer, room)

        with closing(in_parts(places.values(), opened)) as parts:
            for number, part in enumerate(parts):
                order = [place for one in part for place in one.places]
                images = [one.image for one in part for _ in one.places]
                asked = [
                    replace(asks[place], image=image)
                    for place, image in zip(order, images, strict=True)
                ]
                run = partial(self._run, deployed, asked, call, patience)
                found = run() if number == 0 else when_queue_has_room(run, call.has_to_stop)
                answers |= zip(order, found, strict=True)
        return [answers[place] for place in range(len(asks))]

    def _run(
        self, deployed: Deployed, asks: Sequence[Ask], call: Call, patience: Patience
    ) -> list[Result | Failure]:
        self._models.wake()
        return deployed.scheduler.run(
            asks,
            priority=call.priority,
            deadline_s=patience.left_s,
            should_stop=call.should_stop,
        )

    def prepare(
        self, images: Sequence[Anything], settings: Settings, call: Call
    ) -> list[Anything | AheadImage]:
        """Files made ready on the calling thread while the model is at others, where they are
        looked at in one view and there is room at once. ``predict`` opens the rest."""
        if settings.reference is not None or settings.tiling is not None:
            return [*images]
        try:
            preparer = self._models.current.model.engine.preparer
        except StoppedError:
            return [*images]
        room = call.patience(is_bulk=True).room(self._budget, 0.0)
        return [
            _ahead(one, settings, preparer, room) or one if isinstance(one, bytes) else one
            for one in images
        ]

    def predict(
        self, images: Sequence[AnyImage | AheadImage], settings: Settings, call: Call = Call()
    ) -> list[Predicted | Failure]:
        """One annotation or failure per image, in order; one image does not touch the others.

        Raises RequestError for settings that fit no image, QueueFullError, NoRoomError,
        StoppedError.
        """
        if settings.model is not None:
            self._models.current.model.engine.model_of(settings.model)
        if settings.reference is not None:
            if settings.reference.image_id is None and len(images) > 1:
                return [self._with_own_reference(image, settings, call) for image in images]
            first = next(iter(images), None)
            first = first.content if isinstance(first, AheadImage) else first
            settings = resolve_reference(
                settings, call.api, lambda asks: self.ask(asks, call), first
            )
        deployed = self._models.current
        # Tiles hold the whole image until the model has seen the last of them.
        patience = call.patience(is_bulk=settings.tiling is not None)

        def open_one(image: AnyImage | AheadImage, wait_s: float) -> OpenImage | _FailedImage:
            if isinstance(image, AheadImage):
                if image.preparer is deployed.model.engine.preparer:
                    return image.opened
                image = image.content
            room = patience.room(self._budget, wait_s)
            return _opened(image, settings, deployed.model.engine.preparer, room)

        predicted: list[Predicted | Failure] = []
        with closing(in_parts(images, open_one)) as parts:
            for number, part in enumerate(parts):
                asks = [ask for one in part if isinstance(one, OpenImage) for ask in one.asks()]
                run = partial(self._run, deployed, asks, call, patience)
                # What was answered already is not asked again because the queue is full now.
                answers = iter(run() if number == 0 else when_queue_has_room(run, call.has_to_stop))
                predicted += [
                    one.failure
                    if isinstance(one, _FailedImage)
                    else self.predicted(one, [next(answers) for _ in range(one.num_asks)])
                    for one in part
                ]
        for outcome in predicted:
            self._count(outcome)
        return predicted

    def open(self, picture: LoadedImage, settings: Settings) -> OpenImage:
        """An image made ready for ``answers``, on the calling thread, ahead of the model.

        It is closed but for what the model needs. Raises FlorenceError where the settings do not
        fit this image; it is closed then too.
        """
        try:
            return made_ready(picture, settings, self._models.current.model.engine.preparer)
        except BaseException:
            picture.close()
            raise

    @property
    def num_devices(self) -> int:
        """How many answer side by side."""
        return self._models.current.scheduler.num_devices

    def encode(self, pictures: Sequence[LoadedImage]) -> list[Encoded]:
        """What pictures look like to the model, in order, each looked at once.

        For more questions about them than one batch has; why one cannot be seen is in its place.
        """
        deployed = self._models.current
        self._models.wake()
        return deployed.scheduler.call(partial(deployed.model.engine.encode, pictures))

    def answers(self, images: Sequence[OpenImage], call: Call) -> list[list[Result | Failure]]:
        """The model's answers to all asks of each image; closing the images is the caller's."""
        asks = [ask for image in images for ask in image.asks()]
        answers = iter(self._run(self._models.current, asks, call, call.patience()))
        return [[next(answers) for _ in range(image.num_asks)] for image in images]

    def _count(self, one: Predicted | Failure) -> None:
        if isinstance(one, Failure):
            self._watcher.count_image("failed", one.code)
            return
        found = one.annotation.labels or one.annotation.img_tags
        self._watcher.count_image("labeled" if found else "empty")

    def _with_own_reference(
        self, image: AnyImage | AheadImage, settings: Settings, call: Call
    ) -> Predicted | Failure:
        """One image whose reference is on itself; what is wrong with it is its own failure."""
        try:
            return self.predict([image], settings, call)[0]
        except (NoRoomError, QueueFullError, StoppedError):
            raise
        except FlorenceError as error:
            self._watcher.count_image("failed", error.code)
            return Failure(error.code, str(error))

    def predicted(
        self, image: OpenImage, answers: Sequence[Result | Failure]
    ) -> Predicted | Failure:
        """The annotation of an image from the answers to all its asks.

        One failed answer fails the image: half its labels would pass for all of them.
        """
        results: list[Result] = []
        for answer in answers:
            if isinstance(answer, Failure):
                return replace(answer, image=None)
            results.append(answer)
        began = time.perf_counter()
        per_view = len(image.views)
        rules = rules_of(image.settings, self._fixed_shapes)
        answered = [
            joined_answer(
                image, question, rules, results[place * per_view : (place + 1) * per_view]
            )
            for place, question in enumerate(image.questions)
        ]
        annotation, located = annotation_from_answers(answered, rules, image.picture.size_wh)
        timings_s = _slowest(results)
        self._watcher.stage("postprocess", time.perf_counter() - began)
        self._watcher.stage("vision", timings_s.vision)
        self._watcher.stage("prompt", timings_s.prompt)
        self._watcher.stage("decode", timings_s.decode)
        notes = tuple(dict.fromkeys(note for result in results for note in result.notes))
        views_xyxy = tuple(view.box_xyxy for view in image.views)
        return Predicted(annotation, notes, timings_s, tuple(answered), located, views_xyxy)


def _asked(image: AnyImage, places: Sequence[int], preparer: Preparer, room: Room) -> _AskedImage:
    """An image as the model takes it; why it cannot be opened is a Failure in its place."""
    if isinstance(image, EncodedImage | PreparedImage | LoadedImage | Failure):
        return _AskedImage(image, places)
    try:
        opened = open_image(image, room=room)
    except NoRoomError:
        raise
    except FlorenceError as error:
        return _AskedImage(Failure(error.code, str(error)), places)
    try:
        prepared = preparer.prepare(opened)
    except BaseException:
        opened.close()
        raise
    opened.close(kept_pixels=prepared.num_pixels)
    return _AskedImage(prepared, places, opened)


def _opened(
    image: AnyImage, settings: Settings, preparer: Preparer, room: Room
) -> OpenImage | _FailedImage:
    try:
        if isinstance(image, Failure):
            return _FailedImage(image)
        if isinstance(image, EncodedImage | PreparedImage):
            raise RequestError("A prediction needs the image itself, and its features were given.")
        picture = open_image(image, room=room)
    except NoRoomError:
        raise
    except FlorenceError as error:
        return _FailedImage(Failure(error.code, str(error)))
    is_ours = picture is not image
    try:
        return made_ready(picture, settings, preparer, is_ours=is_ours)
    except BaseException as error:
        if is_ours:
            picture.close()
        if not isinstance(error, FlorenceError):
            raise
        return _FailedImage(Failure(error.code, str(error)))


def _ahead(content: bytes, settings: Settings, preparer: Preparer, room: Room) -> AheadImage | None:
    try:
        opened = _opened(content, settings, preparer, room)
    except Exception:  # noqa: BLE001 - it is met again, and told, when it is the image's turn
        return None
    opened.close()
    if isinstance(opened, OpenImage) and isinstance(opened.pictures[0], PreparedImage):
        return AheadImage(content, opened, preparer)
    return None


def made_ready(
    picture: LoadedImage, settings: Settings, preparer: Preparer, *, is_ours: bool = True
) -> OpenImage:
    """An open image with what is asked about it; of one in one view only the view is held."""
    asks_regions = parse_steps(settings.task_prompt)[0].takes is TaskInput.REGION
    views = views_of(
        picture,
        None if asks_regions else settings.rectangle,
        settings.tiling if can_tile(settings.task_prompt) else None,
    )
    pictures: tuple[LoadedImage | PreparedImage, ...] = tuple(view.picture for view in views)
    if is_ours and len(views) == 1:
        prepared = preparer.prepare(views[0].picture)
        picture.close(kept_pixels=prepared.num_pixels)
        pictures = (prepared,)
    return OpenImage(picture, views, pictures, questions_of(settings), settings, is_ours)


def joined_answer(
    image: OpenImage, question: Question, rules: LabelRules, results: Sequence[Result]
) -> Answered:
    """What all views of an image, of which each has a result, say to one question."""
    size_wh = image.picture.size_wh
    placed = [
        moved(result, view.offset_xy, size_wh)
        for result, view in zip(results, image.views, strict=True)
    ]
    answered = Answered(placed[0], question.class_name, question.text, question.region)
    if len(placed) == 1:
        return answered

    def is_shown(shape: Located) -> bool:
        alone = replace(placed[0], objects=(shape,), steps=())
        return bool(wanted_in(replace(answered, result=alone), rules, size_wh))

    tiles = [
        TileResult(result, view.box_xyxy) for result, view in zip(placed, image.views, strict=True)
    ]
    return replace(answered, result=merge_tiles(tiles, is_shown))


def _slowest(results: Sequence[Result]) -> Timings:
    """The longest of each stage: the results of one image mostly share their batches."""
    return Timings(
        vision=max((result.timings_s.vision for result in results), default=0.0),
        prompt=max((result.timings_s.prompt for result in results), default=0.0),
        decode=max((result.timings_s.decode for result in results), default=0.0),
    )

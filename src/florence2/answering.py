"""Answers many asks: images are encoded once, the steps of cascades run round by round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from florence2.ask import AnyImage, Ask, input_of
from florence2.cache import EncodedImage
from florence2.cascade import (
    Asked,
    join_region_answers,
    join_text_answer,
    parse_steps,
    regions_of,
)
from florence2.engine import Engine, Prompt
from florence2.errors import FlorenceError, RequestError, as_value
from florence2.images import LoadedImage, open_image
from florence2.records import Failure, GenerationSettings, Region, Result
from florence2.stopping import BetweenPasses, Stop, stop_of_all
from florence2.tasks import Task, TaskInput, passthrough_task

Outcome = Result | FlorenceError


@dataclass(slots=True)
class _Progress:
    """How far one ask has come: its steps, and what they have found so far."""

    ask: Ask
    image: EncodedImage
    steps: tuple[Task, ...]
    settings: GenerationSettings
    done: int = 0
    found: Result | None = None
    error: FlorenceError | None = None
    asked: list[Asked] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        return self.error is None and self.done < len(self.steps)

    @property
    def name(self) -> str:
        return "+".join(task.token for task in self.steps[: self.done + 1])


def answer_all(
    engine: Engine, asks: Sequence[Ask], between_passes: BetweenPasses | None = None
) -> list[Outcome]:
    """One result or error per ask, in order; one ask's error does not touch the others.

    ``between_passes`` is called before every pass of the network, and before every image that is
    opened or scaled; it may call this function.
    """
    # A list may hold anything: what is no Ask has no image to encode.
    known = [ask for ask in asks if isinstance(ask, Ask)]
    images, stops = [ask.image for ask in known], [ask.stop for ask in known]
    encoded = iter(encode_all(engine, images, stops, between_passes))
    outcomes: list[FlorenceError | _Progress] = []
    for ask in asks:
        outcomes.append(
            _begin(engine, ask, next(encoded)) if isinstance(ask, Ask) else _no_ask(ask)
        )
    running = [outcome for outcome in outcomes if isinstance(outcome, _Progress)]
    while any(progress.is_open for progress in running):
        _run_round(engine, [progress for progress in running if progress.is_open], between_passes)
    return [_finished(outcome) for outcome in outcomes]


def encode_all(
    engine: Engine,
    images: Sequence[AnyImage],
    stops: Sequence[Stop | None] | None = None,
    between_passes: BetweenPasses | None = None,
) -> list[EncodedImage | FlorenceError]:
    """The encoded images in order; the same path, object or content is encoded once.

    ``stops`` has one Stop per image; an image given up has the reason in its place.
    """
    opened: dict[object, LoadedImage | EncodedImage | FlorenceError] = {}
    waiting: dict[object, list[Stop | None]] = {}
    keys = [identity(image) for image in images]
    for key, image, stop in zip(keys, images, stops or [None] * len(keys), strict=True):
        waiting.setdefault(key, []).append(stop)
        if key not in opened:
            if between_passes is not None:
                between_passes()
            opened[key] = _opened(image)
    loaded = {key: image for key, image in opened.items() if isinstance(image, LoadedImage)}
    shared = [stop_of_all(waiting[key]) for key in loaded]
    encoded = engine.encode(list(loaded.values()), shared, between_passes)
    settled: dict[object, EncodedImage | FlorenceError] = {
        key: found for key, found in opened.items() if not isinstance(found, LoadedImage)
    }
    settled |= zip(loaded, encoded, strict=True)
    return [settled[key] for key in keys]


def identity(image: object) -> object:
    """Equal for what is certainly the same image: the same path, bytes or object."""
    return image if isinstance(image, str | bytes) else id(image)


def _opened(image: AnyImage) -> LoadedImage | EncodedImage | FlorenceError:
    if isinstance(image, EncodedImage):
        return replace(image, vision_s=0.0)
    if isinstance(image, Failure):
        reason = FlorenceError(image.message)
        reason.code = image.code
        return reason
    try:
        return open_image(image)
    except FlorenceError as error:
        return as_value(error)


def _no_ask(value: object) -> FlorenceError:
    return RequestError(
        f"A question is an Ask, and {type(value).__name__} was received; write "
        'Ask(image, "<CAPTION>").'
    )


def _begin(
    engine: Engine, ask: Ask, image: EncodedImage | FlorenceError
) -> FlorenceError | _Progress:
    # Before the image's own error: an image that several asks gave up has only one's reason.
    reason = None if ask.stop is None else ask.stop()
    if reason is not None:
        return reason
    if isinstance(image, FlorenceError):
        return image
    try:
        ask.check_task()
        steps = (passthrough_task(ask.task),) if ask.is_custom else parse_steps(ask.task)
        settings = ask.settings(engine.checkpoint.generation)
        engine.check_image(image)
        return _Progress(ask, image, steps, settings)
    except FlorenceError as error:
        return as_value(error)


def _run_round(
    engine: Engine, running: Sequence[_Progress], between_passes: BetweenPasses | None
) -> None:
    """The next step of every open ask, in shared batches."""
    prompts: list[Prompt] = []
    counts: list[int] = []
    for progress in running:
        try:
            own = _next_prompts(engine, progress)
        except FlorenceError as error:
            progress.error, own = as_value(error), []
        prompts += own
        counts.append(len(own))
    results = engine.answer(prompts, between_passes)
    for progress, count in zip(running, counts, strict=True):
        _settle(progress, results[:count])
        results = results[count:]


def _next_prompts(engine: Engine, progress: _Progress) -> list[Prompt]:
    task = progress.steps[progress.done]
    before, ask = progress.found, progress.ask

    def prompt(text: str | None, region: Region | None) -> Prompt:
        return engine.prepare(task, progress.image, text, region, progress.settings, ask.stop)

    if before is None:
        # What a cascade's first step does not take is refused, never ignored.
        return [prompt(*input_of(ask, task))]
    if task.takes is TaskInput.REGION:
        progress.asked = regions_of(before)
        return [prompt(None, one.region) for one in progress.asked if one.region is not None]
    return [prompt(before.text, None)] if before.text else []


def _settle(progress: _Progress, results: Sequence[Outcome]) -> None:
    if progress.error is not None:
        return
    answers = [result for result in results if isinstance(result, Result)]
    if len(answers) < len(results):
        progress.error = next(error for error in results if isinstance(error, FlorenceError))
        return
    before, task = progress.found, progress.steps[progress.done]
    if before is None:
        progress.found = answers[0]
    elif task.takes is TaskInput.REGION:
        progress.found = join_region_answers(task, progress.name, before, progress.asked, answers)
    elif answers:
        progress.found = join_text_answer(progress.name, before, answers[0])
    else:
        # The step before found no text, so there is nothing to look for.
        progress.found = replace(before, task=progress.name, objects=(), steps=(before,))
    progress.done += 1


def _finished(outcome: FlorenceError | _Progress) -> Outcome:
    if isinstance(outcome, FlorenceError):
        return outcome
    if outcome.error is not None or outcome.found is None:
        return outcome.error or FlorenceError("The request was not answered; send it again.")
    return outcome.found

"""From a question to prompts for the network, and from their answers to one result.

The steps of a cascade ask about what was found before: one that takes text gets the text before
it, one that takes a region is asked once for every box before it. A caption has no boxes, so before
a region step its phrases are grounded first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from florence2.checkpoint.checkpoint import Checkpoint
from florence2.engine.encoding import AnyImage as AnyImage
from florence2.engine.encoding import EncodedImage
from florence2.errors import FlorenceError, RequestError, as_value, shown
from florence2.postprocess import parse
from florence2.prompts import as_region, check_prompt_length, prompt_sentence, region_on_image
from florence2.records import (
    Answer,
    Box,
    BoxXyxy,
    Failure,
    GenerationSettings,
    Object,
    Polygon,
    Quad,
    Region,
    Result,
    Text,
    Timings,
    check_settings,
)
from florence2.stopping import Stop
from florence2.tasks import OutputKind, Task, TaskInput, parse_steps, passthrough_task

AnyRegion = Region | Sequence[float] | str
Located = Box | Quad | Polygon
Outcome = Result | FlorenceError

_SEARCH_SETTINGS: Final = (
    "num_beams",
    "max_new_tokens",
    "length_penalty",
    "early_stopping",
    "no_repeat_ngram_size",
)


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A task prompt, or a cascade of them, for one image.

    ``region`` is (x1, y1, x2, y2) in pixels of the original image, or the model's own spelling
    ``<loc_x1><loc_y1><loc_x2><loc_y2>``. A Failure of ``encode`` as the image stays that Failure.
    A setting of None is the checkpoint's own; ``max_new_tokens`` of None is the task's own budget.
    ``is_custom`` says that ``task`` is a fine-tune's own token, which is passed on as it is and
    answered with text. ``stop`` is asked before every pass of the network: once it gives an error
    nobody waits for the answer any longer, and that error is the answer.
    """

    image: AnyImage
    task: str
    text: str | None = None
    region: AnyRegion | None = None
    num_beams: int | None = None
    max_new_tokens: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    no_repeat_ngram_size: int | None = None
    is_custom: bool = False
    stop: Stop | None = field(default=None, repr=False)

    def settings(self, defaults: GenerationSettings) -> GenerationSettings:
        """The checkpoint's search settings with this ask's own put over them."""
        given = {
            name: value.item() if isinstance(value, np.generic) else value
            for name in _SEARCH_SETTINGS
            if (value := getattr(self, name)) is not None
        }
        if not given:
            return defaults
        settings = replace(defaults, **given)
        check_settings(settings)
        return settings

    def steps(self) -> tuple[Task, ...]:
        """The task, or those of the cascade; RequestError for what is none."""
        if not isinstance(self.task, str):
            raise RequestError(
                f"A task is a name such as <CAPTION>, and {shown(self.task)} was received; "
                "name one."
            )
        return (passthrough_task(self.task),) if self.is_custom else parse_steps(self.task)


def failure_of(error: FlorenceError, image: object) -> Failure:
    """An error in the place of a result; it names an ``image`` that was given by path."""
    name: str | None = None
    if isinstance(image, Failure):
        name = image.image
    elif isinstance(image, str) or hasattr(image, "__fspath__"):
        name = str(image)
    return Failure(error.code, str(error), name)


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One validated prompt about a cascade's image, ready to be decoded.

    ``place`` is its number among the prompts of its step.
    """

    cascade: Cascade
    place: int
    task: Task
    prompt_ids: tuple[int, ...]
    settings: GenerationSettings
    max_new_tokens: int

    @property
    def image(self) -> EncodedImage:
        """What it is about."""
        return self.cascade.image

    def given_up(self) -> FlorenceError | None:
        """Why nobody waits for the answer any longer."""
        stop = self.cascade.ask.stop
        return None if stop is None else stop()

    def result(self, answer: Answer, timings_s: Timings) -> Result:
        """What an answer says about the image."""
        vocabulary, size_wh = self.cascade.checkpoint.vocabulary, self.image.size_wh
        tokens = vocabulary.answer_tokens(answer.token_ids, answer.log_probs, answer.near_log_probs)
        parsed = parse(tokens, self.task, size_wh)
        notes = parsed.notes
        if answer.truncated:
            notes = (*notes, f"the answer was cut at {self.max_new_tokens} tokens")
        return Result(
            task=self.task.token,
            size_wh=size_wh,
            objects=parsed.objects,
            text=parsed.text,
            answer=vocabulary.answer_text(answer.token_ids),
            token_ids=answer.token_ids,
            truncated=answer.truncated,
            notes=notes,
            log_probs=answer.log_probs,
            near_log_probs=answer.near_log_probs,
            timings_s=timings_s,
        )


class Cascade:
    """One ask on its way, of one step or more: a step's prompts need the results before it.

    ``key`` is the asker's name for it. ``outcome`` is None as long as something is open.
    Raises RequestError at once for an ask that names no task or setting there is.
    """

    def __init__(self, key: object, ask: Ask, image: EncodedImage, checkpoint: Checkpoint) -> None:
        self.key = key
        self.ask = ask
        self.image = image
        self.checkpoint = checkpoint
        self.outcome: Outcome | None = None
        self._steps = ask.steps()
        self._settings = ask.settings(checkpoint.generation)
        self._num_done = 0
        self._regions: list[FoundRegion] = []
        self._found: Result | None = None
        # By the prompts' places; prompts that were held here would keep themselves alive.
        self._outcomes: dict[int, Outcome] = {}
        self._num_prompts = 0

    def next_prompts(self) -> list[Prompt]:
        """The prompts of the next step that has any; none once there is an outcome."""
        while self.outcome is None:
            try:
                prompts = list(self._prompts_of_step())
            except FlorenceError as error:
                self.outcome = as_value(error)
                return []
            if prompts:
                self._num_prompts = len(prompts)
                return prompts
            self._finish_step([])
        return []

    def settle(self, prompt: Prompt, outcome: Outcome) -> bool:
        """Notes a prompt's outcome; whether the step it belongs to is over with it."""
        self._outcomes[prompt.place] = outcome
        if len(self._outcomes) < self._num_prompts:
            return False
        outcomes, self._outcomes = self._outcomes, {}
        self._finish_step([outcomes[place] for place in range(self._num_prompts)])
        return True

    def _prompts_of_step(self) -> Iterator[Prompt]:
        task, before = self._steps[self._num_done], self._found
        if before is None:
            # What a cascade's first step does not take is refused, never ignored.
            yield self._prompt(0, self.ask.text, as_region(self.ask.region))
        elif task.takes is TaskInput.REGION:
            self._regions = regions_of(before)
            asked = [one.region for one in self._regions if one.region is not None]
            for place, region in enumerate(asked):
                yield self._prompt(place, None, region)
        elif before.text:
            yield self._prompt(0, before.text, None)

    def _prompt(self, place: int, text: str | None, region: Region | str | None) -> Prompt:
        task, checkpoint = self._steps[self._num_done], self.checkpoint
        ids = checkpoint.vocabulary.encode_prompt(
            prompt_sentence(task, text, region, self.image.size_wh)
        )
        # Rows of the position table: the longest input, and the longest answer.
        most = checkpoint.config.text.max_position_embeddings
        check_prompt_length(len(ids), most - self.image.features.shape[0])
        asked = self._settings.max_new_tokens
        if asked is not None and asked > most:
            raise RequestError(
                f"max_new_tokens can be at most {most} for {checkpoint.name}, "
                f"and {asked} was received; ask for fewer."
            )
        limit = asked or min(task.max_new_tokens, most)
        # Every prompt has a limit of its own, so those of different limits can share a batch.
        shared = replace(self._settings, max_new_tokens=None)
        return Prompt(self, place, task, tuple(ids), shared, limit)

    def _finish_step(self, outcomes: Sequence[Outcome]) -> None:
        error = next((one for one in outcomes if isinstance(one, FlorenceError)), None)
        if error is not None:
            self.outcome = error
            return
        answers = [one for one in outcomes if isinstance(one, Result)]
        self._found = self._joined(answers)
        self._num_done += 1
        if self._num_done == len(self._steps):
            self.outcome = self._found

    def _joined(self, answers: Sequence[Result]) -> Result:
        before, task = self._found, self._steps[self._num_done]
        if before is None:
            return answers[0]
        name = "+".join(step.token for step in self._steps[: self._num_done + 1])
        if task.takes is TaskInput.REGION:
            return join_region_answers(task, name, before, self._regions, answers)
        if answers:
            return join_text_answer(name, before, answers[0])
        # The step before found no text, so there is nothing to look for.
        return replace(before, task=name, objects=(), steps=(before,))


@dataclass(frozen=True, slots=True)
class FoundRegion:
    """A located object of the step before; ``region`` is None where it is under a pixel."""

    located: Located
    region: Region | None


def regions_of(result: Result) -> list[FoundRegion]:
    """Every located object of ``result`` with the region to ask about; polygons as their boxes."""
    return [
        FoundRegion(located, region_on_image(_box_of(located), result.size_wh))
        for located in result.objects
        if not isinstance(located, Text)
    ]


def _box_of(located: Located) -> BoxXyxy:
    """The box around an object; without an area where it has no points."""
    if isinstance(located, Box):
        return located.box_xyxy
    if isinstance(located, Quad):
        points: tuple[float, ...] = located.quad_xy
    else:
        points = tuple(value for ring in located.rings_xy for value in ring)
    if not points:
        return (0.0, 0.0, 0.0, 0.0)
    xs, ys = points[0::2], points[1::2]
    return (min(xs), min(ys), max(xs), max(ys))


def join_region_answers(
    task: Task, name: str, before: Result, regions: Sequence[FoundRegion], answers: Sequence[Result]
) -> Result:
    """One result of the region step ``task``; ``answers`` has one for every region in ``regions``.

    A text answer becomes the label of the box that was found before, which stays with its score
    even if the answer is empty. A polygon has its own score and the label that its region had.
    """
    objects: list[Object] = []
    notes: list[str] = []
    left = iter(answers)
    for place, one in enumerate(regions, start=1):
        found = one.located
        answer = None if one.region is None else next(left)
        if answer is None:
            notes.append(
                f"object {place} ({found.label!r}) is under a pixel and was not asked about"
            )
        if task.output is OutputKind.TEXT:
            label = (answer.text if answer is not None else None) or ""
            objects.append(Box(_box_of(found), label, found.score))
        elif answer is not None:
            objects += [
                replace(polygon, label=found.label)
                for polygon in answer.objects
                if isinstance(polygon, Polygon)
            ]
    return replace(
        before,
        task=name,
        objects=tuple(objects),
        answer="\n".join(answer.answer for answer in answers),
        token_ids=tuple(token for answer in answers for token in answer.token_ids),
        truncated=before.truncated or any(answer.truncated for answer in answers),
        notes=(*before.notes, *notes, *(note for answer in answers for note in answer.notes)),
        steps=(*(before.steps or (before,)), *answers),
    )


def join_text_answer(name: str, before: Result, answer: Result) -> Result:
    """One result of a text step: the objects of ``answer``, the text of ``before``."""
    return replace(
        answer,
        task=name,
        text=before.text,
        truncated=before.truncated or answer.truncated,
        notes=before.notes + answer.notes,
        timings_s=before.timings_s,
        steps=(*(before.steps or (before,)), answer),
    )

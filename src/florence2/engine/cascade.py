"""One ask on its way: a task prompt, or a cascade, whose steps ask about what was found before.

A step that takes text gets the text before it; a step that takes a region is asked once for every
box before it. A caption has no boxes, so before a region step its phrases are grounded first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from florence2.engine.ask import Ask, input_of
from florence2.engine.engine import Engine, Prompt
from florence2.engine.feature_cache import EncodedImage
from florence2.errors import FlorenceError, as_value
from florence2.prompts import region_on_image
from florence2.records import Box, BoxXyxy, Object, Polygon, Quad, Region, Result, Text
from florence2.tasks import (
    OutputKind,
    Task,
    TaskInput,
    parse_steps,
    passthrough_task,
)

Located = Box | Quad | Polygon


@dataclass(frozen=True, slots=True)
class Asked:
    """One located object of the step before; ``region`` is None where it is under a pixel."""

    located: Located
    region: Region | None


def regions_of(result: Result) -> list[Asked]:
    """Every located object of ``result`` with the region to ask about; polygons as their boxes."""
    return [
        Asked(located, region_on_image(_box_of(located), result.size_wh))
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
    task: Task, name: str, before: Result, asked: Sequence[Asked], answers: Sequence[Result]
) -> Result:
    """One result of the region step ``task``; ``answers`` has one for every region in ``asked``.

    A text answer becomes the label of the box that was found before, which stays with its score
    even if the answer is empty. A polygon has its own score and the label that its region had.
    """
    objects: list[Object] = []
    notes: list[str] = []
    left = iter(answers)
    for place, one in enumerate(asked, start=1):
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


Outcome = Result | FlorenceError


class Progress:
    """One ask on its way: every step gives prompts, whose results the next step needs.

    ``outcome`` is None as long as something is open. Raises FlorenceError at once for an ask that
    names no task or setting there is.
    """

    def __init__(self, engine: Engine, ask: Ask, image: EncodedImage) -> None:
        ask.check_task()
        engine.check_image(image)
        self._engine = engine
        self._ask = ask
        self._image = image
        self._steps = (passthrough_task(ask.task),) if ask.is_custom else parse_steps(ask.task)
        self._settings = ask.settings(engine.checkpoint.generation)
        self._done = 0
        self._asked: list[Asked] = []
        self._found: Result | None = None
        self._waiting: dict[Prompt, Outcome | None] = {}
        self.outcome: Outcome | None = None

    def next_prompts(self) -> list[Prompt]:
        """The prompts of the next step that has any; none once there is an outcome."""
        while self.outcome is None:
            try:
                prompts = self._prompts_of_step()
            except FlorenceError as error:
                self.outcome = as_value(error)
                return []
            if prompts:
                self._waiting = dict.fromkeys(prompts)
                return prompts
            self._finish_step([])
        return []

    def settle(self, prompt: Prompt, outcome: Outcome) -> bool:
        """Notes a prompt's outcome; whether the step it belongs to is over with it."""
        self._waiting[prompt] = outcome
        settled = [one for one in self._waiting.values() if one is not None]
        if len(settled) < len(self._waiting):
            return False
        self._waiting = {}
        self._finish_step(settled)
        return True

    def _prompts_of_step(self) -> list[Prompt]:
        task, before = self._steps[self._done], self._found
        if before is None:
            # What a cascade's first step does not take is refused, never ignored.
            return [self._prompt(*input_of(self._ask, task))]
        if task.takes is TaskInput.REGION:
            self._asked = regions_of(before)
            return [self._prompt(None, one.region) for one in self._asked if one.region is not None]
        return [self._prompt(before.text, None)] if before.text else []

    def _prompt(self, text: str | None, region: Region | None) -> Prompt:
        task = self._steps[self._done]
        return self._engine.prepare(task, self._image, text, region, self._settings, self._ask.stop)

    def _finish_step(self, outcomes: Sequence[Outcome]) -> None:
        error = next((one for one in outcomes if isinstance(one, FlorenceError)), None)
        if error is not None:
            self.outcome = error
            return
        answers = [one for one in outcomes if isinstance(one, Result)]
        self._found = self._joined(answers)
        self._done += 1
        if self._done == len(self._steps):
            self.outcome = self._found

    def _joined(self, answers: Sequence[Result]) -> Result:
        before, task = self._found, self._steps[self._done]
        name = "+".join(step.token for step in self._steps[: self._done + 1])
        if before is None:
            return answers[0]
        if task.takes is TaskInput.REGION:
            return join_region_answers(task, name, before, self._asked, answers)
        if answers:
            return join_text_answer(name, before, answers[0])
        # The step before found no text, so there is nothing to look for.
        return replace(before, task=name, objects=(), steps=(before,))

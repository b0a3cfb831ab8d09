"""How far one ask has come: its steps, and what they have found so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from florence2.engine.ask import Ask, input_of
from florence2.engine.cascade import (
    Asked,
    join_region_answers,
    join_text_answer,
    parse_steps,
    regions_of,
)
from florence2.engine.engine import Engine, Prompt
from florence2.engine.feature_cache import EncodedImage
from florence2.errors import FlorenceError, as_value
from florence2.records import Region, Result
from florence2.tasks import TaskInput, passthrough_task

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

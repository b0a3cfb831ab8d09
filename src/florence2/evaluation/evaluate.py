"""Asks a checkpoint about held-out drawn scenes and reports how good its answers are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from florence2.engine.ask import Ask
from florence2.errors import FlorenceError, RequestError
from florence2.evaluation.bootstrap import Measured
from florence2.evaluation.questions import Question, check_seeds, in_chunks, questions_about
from florence2.evaluation.tally import FIGURES, Tally
from florence2.records import Failure, Result
from florence2.tasks import TASKS, find_task
from florence2_demo.drawing import draw_scene

ALL_TASKS: Final = tuple(task.token for task in TASKS)
Watcher = Callable[[int, Question, Result], None]


class Model(Protocol):
    """What evaluation needs of a model; ``florence2.Florence2`` is one."""

    def run_many(self, asks: Sequence[Ask]) -> list[Result | Failure]:
        """One result or failure per ask, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What to ask. ``beams`` of None is the checkpoint's own number; ``batch`` counts scenes."""

    num_scenes: int = 500
    seed: int = 0
    tasks: tuple[str, ...] = ALL_TASKS
    beams: int | None = None
    batch: int = 8
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        check_seeds(self.seed, self.num_scenes)
        if self.batch < 1:
            raise RequestError(f"A batch is at least one scene, and {self.batch} was received.")


@dataclass(frozen=True, slots=True)
class Report:
    """The figures, how answers were spelled by task, and the speed of answering."""

    plan: Plan
    figures: dict[str, Measured]
    well_formed: dict[str, float]
    known_words: dict[str, float]
    images_per_s: float
    checkpoint: dict[str, str | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers by figure; null for a figure whose task was not asked."""
        figures: dict[str, float | None] = dict.fromkeys(FIGURES) | {
            name: _rounded(found.value) for name, found in self.figures.items()
        }
        measured = {name: m for name, m in self.figures.items() if m.value is not None}
        return {
            **self.checkpoint,
            "scenes": self.plan.num_scenes,
            "seed": self.plan.seed,
            "beams": self.plan.beams,
            "tasks": list(self.plan.tasks),
            **figures,
            "interval_95": {n: [_rounded(m.low), _rounded(m.high)] for n, m in measured.items()},
            "counts": {name: found.count for name, found in self.figures.items()},
            "well_formed": {task: _rounded(share) for task, share in self.well_formed.items()},
            "known_words": {task: _rounded(share) for task, share in self.known_words.items()},
            "images_per_s": round(self.images_per_s, 3),
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def task_tokens(names: Iterable[str]) -> tuple[str, ...]:
    """Tokens of tasks by token or name, in the order of the task table; all for no names."""
    chosen = {find_task(name).token for name in names if name.strip()}
    return tuple(token for token in ALL_TASKS if token in chosen) or ALL_TASKS


def evaluate(
    model: Model,
    plan: Plan,
    *,
    progress: Callable[[int], None] | None = None,
    watch: Watcher | None = None,
) -> Report:
    """Measures a model; the same plan always asks the same.

    ``progress`` is called with the number of scenes just done, ``watch`` with every answer.
    Raises FlorenceError at the first question that is not answered: a model that fails has no
    figures.
    """
    tally = Tally(plan.tasks, plan.num_scenes)
    seconds = 0.0
    for seeds in in_chunks(check_seeds(plan.seed, plan.num_scenes), plan.batch):
        asked = [question for seed in seeds for question in questions_about(seed, plan.tasks)]
        asks = _asks(asked, plan)
        began = time.perf_counter()
        answers = model.run_many(asks)
        seconds += time.perf_counter() - began
        for question, answer in zip(asked, answers, strict=True):
            number = question.scene.seed - plan.seed
            result = _answered(question, answer)
            tally.add(number, question, result)
            if watch is not None:
                watch(number, question, result)
        if progress is not None:
            progress(len(seeds))
    return _report(tally, plan, seconds)


def _asks(questions: Sequence[Question], plan: Plan) -> list[Ask]:
    # One picture object per scene: the engine encodes what is the same object once.
    scenes = {question.scene.seed: question.scene for question in questions}
    pictures = {seed: draw_scene(scene) for seed, scene in scenes.items()}
    return [
        Ask(
            pictures[question.scene.seed],
            question.task,
            question.text,
            question.region_px,
            num_beams=plan.beams,
            max_new_tokens=plan.max_new_tokens,
        )
        for question in questions
    ]


def _answered(question: Question, answer: Result | Failure) -> Result:
    if isinstance(answer, Failure):
        raise FlorenceError(
            f"The model could not answer {question.task} about scene {question.scene.seed}, so it "
            f"has no figures: {answer.message}"
        )
    return answer


def _report(tally: Tally, plan: Plan, seconds: float) -> Report:
    forms = {task: form for task, form in tally.forms.items() if form.asked}
    return Report(
        plan,
        tally.measured(plan.seed),
        {task: form.well_formed / form.asked for task, form in forms.items()},
        {task: form.known_words / form.asked for task, form in forms.items()},
        plan.num_scenes / seconds if seconds else 0.0,
    )

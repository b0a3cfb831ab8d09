"""What is asked about an image: the questions that a request's settings stand for."""

from __future__ import annotations

from dataclasses import dataclass

from florence2.records import Region
from florence2.tasks import TaskInput
from serve.settings.model import Settings


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

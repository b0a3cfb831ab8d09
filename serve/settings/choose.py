"""Which task a request means, and whether it has what that task takes."""

from __future__ import annotations

from typing import Final

from florence2.errors import RequestError
from florence2.tasks import Task, TaskInput, parse_steps
from serve.settings.values import shown

DETECTION: Final = "<OD>"
GROUNDING: Final = "<CAPTION_TO_PHRASE_GROUNDING>"
CATEGORY: Final = "<REGION_TO_CATEGORY>"


def task_name(name: str, value: object) -> str:
    """The canonical ``<OD>`` or ``<CAPTION>+<OCR>`` of a task's token or friendly name."""
    if not isinstance(value, str):
        raise RequestError(
            f"{name} is the name of a task, and {shown(value)} was received; "
            f'write for example "{DETECTION}".'
        )
    return "+".join(step.token for step in parse_steps(value[:1000]))


def choose_task(
    named: str | None, *, has_words: bool, has_regions: bool, has_reference: bool
) -> str:
    """The task that was named, or the one that fits what was given.

    A reference is found by words. People who pick one in the annotation tool have a task in their
    settings already, so one that takes no text gives way instead of failing.
    """
    if has_reference and (named is None or _first(named).takes is not TaskInput.TEXT):
        return GROUNDING
    if named is not None:
        return named
    if has_words:
        return GROUNDING
    return CATEGORY if has_regions else DETECTION


def check_inputs(
    task: str, *, text: str | None, has_words: bool, has_regions: bool, has_reference: bool
) -> None:
    """RequestError when something is missing for the first step of ``task``, or too much."""
    first = _first(task)
    if first.takes is TaskInput.TEXT and not (has_words or has_reference):
        raise RequestError(
            f"{first.token} needs to be told what to look for and got no text; "
            'add for example text: "red car. dog".'
        )
    if first.takes is not TaskInput.TEXT and text is not None:
        raise RequestError(
            f"{first.token} takes no text and got {shown(text)}; leave out the text, or leave out "
            f"task_prompt to look for it with {GROUNDING}."
        )
    if first.takes is TaskInput.REGION and not has_regions:
        raise RequestError(
            f"{first.token} asks about regions of the image and got none; "
            "add for example regions: [[10, 20, 200, 180]]."
        )
    if first.takes is not TaskInput.REGION and has_regions:
        raise RequestError(
            f"{first.token} takes no region and got some; leave out the regions, or use "
            "rectangle to look at a part of the image."
        )


def asks_regions(task: str) -> bool:
    """Whether the first step of ``task`` is about regions that the caller names."""
    return _first(task).takes is TaskInput.REGION


def _first(task: str) -> Task:
    return parse_steps(task)[0]

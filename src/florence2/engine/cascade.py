"""Task prompts joined by ``+``: each step asks about what the step before it found.

A step that takes text gets the text before it; a step that takes a region is asked once for every
box before it. A caption has no boxes, so before a region step its phrases are grounded first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from florence2.errors import RequestError
from florence2.records import Box, BoxXyxy, Object, Polygon, Quad, Region, Result, Text
from florence2.regions import region_on_image
from florence2.tasks import OutputKind, Task, TaskInput, find_task

Located = Box | Quad | Polygon


_GROUNDING: Final = "<CAPTION_TO_PHRASE_GROUNDING>"


_FIRST_OUTPUTS: Final = {
    TaskInput.TEXT: (OutputKind.TEXT,),
    TaskInput.REGION: (
        OutputKind.LABELED_BOXES,
        OutputKind.BOXES,
        OutputKind.GROUNDING,
        OutputKind.BOXES_OR_POLYGONS,
        OutputKind.OCR,
    ),
}


def parse_steps(name: str) -> tuple[Task, ...]:
    """The tasks of ``"<OD>"`` or ``"<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>"``, in order.

    Raises RequestError when a step cannot take what the one before it gives.
    """
    named = [find_task(part) for part in name.split("+")]
    steps: list[Task] = []
    for task in named:
        if steps and task.takes is TaskInput.REGION and _is_caption(steps[-1]):
            steps.append(find_task(_GROUNDING))
        if steps:
            _check_follows(steps[-1], task)
        steps.append(task)
    return tuple(steps)


def _is_caption(task: Task) -> bool:
    return task.takes is TaskInput.NONE and task.output is OutputKind.TEXT


def _check_follows(before: Task, task: Task) -> None:
    if task.takes is TaskInput.NONE:
        raise RequestError(
            f"A later step of a cascade takes text or a region, and {task.token} takes neither; "
            "ask for it on its own."
        )
    if before.takes is TaskInput.REGION or before.output not in _FIRST_OUTPUTS[task.takes]:
        raise RequestError(
            f"{task.token} takes {task.takes.value}, which {before.token} does not give; "
            "begin the cascade with a caption, a detection or a proposal task."
        )


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

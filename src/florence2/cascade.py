"""Task prompts joined by ``+``: each step asks about what the step before it found.

A step that takes text gets the text before it; a step that takes a region is asked once for every
box before it. A caption has no boxes, so before a region step its phrases are grounded first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from florence2.errors import RequestError
from florence2.records import Box, Object, Polygon, Quad, Region, Result
from florence2.tasks import OutputKind, Task, TaskInput, find_task

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


def regions_of(result: Result) -> list[tuple[Region, str]]:
    """Every located object of ``result`` as a region with its label; polygons as their boxes."""
    return [
        (Region(box), located.label)
        for located in result.objects
        if (box := _box_of(located)) is not None
    ]


def _box_of(located: Object) -> tuple[float, float, float, float] | None:
    if isinstance(located, Box):
        return located.box_xyxy
    if isinstance(located, Quad):
        points: tuple[float, ...] = located.quad_xy
    elif isinstance(located, Polygon):
        points = tuple(value for ring in located.rings_xy for value in ring)
    else:
        return None
    xs, ys = points[0::2], points[1::2]
    return (min(xs), min(ys), max(xs), max(ys))


def join_region_answers(
    name: str, before: Result, regions: Sequence[tuple[Region, str]], answers: Sequence[Result]
) -> Result:
    """One result of a region step asked about every region of ``before``.

    A text answer labels the region's box; a polygon takes the label its region had.
    """
    objects: list[Object] = []
    for (region, label), answer in zip(regions, answers, strict=True):
        if any(isinstance(found, Polygon) for found in answer.objects):
            objects += [
                replace(found, label=label)
                for found in answer.objects
                if isinstance(found, Polygon)
            ]
        elif answer.text:
            scores = [found.score for found in answer.objects]
            objects.append(Box(region.box_xyxy, answer.text, scores[0] if scores else None))
    return replace(
        before,
        task=name,
        objects=tuple(objects),
        answer="\n".join(answer.answer for answer in answers),
        token_ids=tuple(token for answer in answers for token in answer.token_ids),
        truncated=before.truncated or any(answer.truncated for answer in answers),
        notes=before.notes + tuple(note for answer in answers for note in answer.notes),
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
        steps=(*(before.steps or (before,)), answer),
    )

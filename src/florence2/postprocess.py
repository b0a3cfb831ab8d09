"""Generated pieces to objects, for every output kind of the task table.

Well-formed answers give what the reference's processor gives, with float coordinates and labels
in any script. Anything else is left out or put right, and a note says so; nothing raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from florence2.errors import RequestError
from florence2.outlines import boxes_of, polygons_of, quads_of
from florence2.phrases import BANNED_PHRASES
from florence2.pieces import Piece, PieceKind, joined_text, pieces_from_text, strip_dropped
from florence2.records import Object, Result, SizeWh, Text
from florence2.runs import (
    LEFTOVER_LOCATIONS,
    TOO_GENERAL,
    UNLABELED,
    UNPLACED_TEXT,
    Notes,
    Run,
    split_runs,
)
from florence2.scoring import object_score
from florence2.tasks import OutputKind, Task, TaskInput, find_task
from florence2.to_dict import result_to_dict

__all__ = ["Parsed", "parse", "parse_answer_text", "result_to_dict"]


RunReader = Callable[[Run, SizeWh, Notes], Sequence[Object]]


@dataclass(frozen=True, slots=True)
class Parsed:
    """What an answer says. ``text`` is None unless the task's output is text."""

    objects: tuple[Object, ...]
    text: str | None
    notes: tuple[str, ...]


def parse(pieces: Iterable[Piece], task: Task, size_wh: SizeWh) -> Parsed:
    """The objects or the text that an answer spells, for any sequence of pieces.

    ``size_wh`` is the original image's size; coordinates are floats in its pixels.
    """
    notes = Notes()
    if task.output is OutputKind.TEXT:
        return _parse_text(list(pieces), task, notes)
    read = _READERS[task.output]
    objects: list[Object] = []
    for run in split_runs(pieces, notes):
        if run.body:
            objects.extend(read(run, size_wh, notes))
        else:
            notes.add(UNPLACED_TEXT)
    return Parsed(tuple(objects), None, notes.sentences())


def parse_answer_text(task: Task | str, text: str, size_wh: SizeWh) -> Result:
    """A result from a raw generated string, such as another program's; its scores are None.

    Raises RequestError for an unknown task or a size that is not two positive numbers.
    """
    known = find_task(task) if isinstance(task, str) else task
    if min(size_wh) < 1:
        raise RequestError(
            f"The size of an image is its width and height in pixels, and {size_wh} was received; "
            "give for example 640x480."
        )
    parsed = parse(pieces_from_text(text), known, size_wh)
    return Result(
        task=known.token,
        size_wh=size_wh,
        objects=parsed.objects,
        text=parsed.text,
        answer=strip_dropped(text),
        token_ids=(),
        truncated=False,
        notes=parsed.notes,
    )


def _parse_text(pieces: list[Piece], task: Task, notes: Notes) -> Parsed:
    words = [piece for piece in pieces if piece.kind is PieceKind.TEXT]
    if task.takes is TaskInput.OPTIONAL_TEXT:
        # What a fine-tune's own tokens mean is known to its author only.
        words, text = pieces, joined_text(pieces).strip()
    else:
        runs = split_runs(pieces, notes)
        text = " ".join(run.label for run in runs if run.label)
        _note_locations(runs, task, notes)
    objects = (Text(text, object_score((), words)),) if text else ()
    return Parsed(objects, text, notes.sentences())


def _note_locations(runs: Sequence[Run], task: Task, notes: Notes) -> None:
    """A region task repeats its region behind the words; locations elsewhere deserve a note."""
    for run in runs:
        count = len(run.locations)
        notes.add(LEFTOVER_LOCATIONS, count % 4 if task.takes is TaskInput.REGION else count)


def _read_labeled_boxes(run: Run, size_wh: SizeWh, notes: Notes) -> Sequence[Object]:
    if not run.label:
        notes.add(UNLABELED, max(len(run.locations) // 4, 1))
        return ()
    return boxes_of(run, run.label, size_wh, notes)


def _read_grounding(run: Run, size_wh: SizeWh, notes: Notes) -> Sequence[Object]:
    if run.label in BANNED_PHRASES:
        notes.add(TOO_GENERAL)
        return ()
    return _read_labeled_boxes(run, size_wh, notes)


def _read_quads(run: Run, size_wh: SizeWh, notes: Notes) -> Sequence[Object]:
    if not run.label:
        notes.add(UNLABELED, max(len(run.locations) // 8, 1))
        return ()
    return quads_of(run, run.label, size_wh, notes)


def _read_boxes(run: Run, size_wh: SizeWh, notes: Notes) -> Sequence[Object]:
    notes.add(UNPLACED_TEXT, int(bool(run.label)))
    return boxes_of(run, "", size_wh, notes)


def _read_polygons(run: Run, size_wh: SizeWh, notes: Notes) -> Sequence[Object]:
    notes.add(UNPLACED_TEXT, int(bool(run.label)))
    return polygons_of(run, "", size_wh, notes)


def _read_boxes_or_polygons(run: Run, size_wh: SizeWh, notes: Notes) -> Sequence[Object]:
    if not run.has_outline:
        return _read_labeled_boxes(run, size_wh, notes)
    if not run.label:
        notes.add(UNLABELED)
        return ()
    return polygons_of(run, run.label, size_wh, notes)


_READERS: Final[dict[OutputKind, RunReader]] = {
    OutputKind.LABELED_BOXES: _read_labeled_boxes,
    OutputKind.GROUNDING: _read_grounding,
    OutputKind.OCR: _read_quads,
    OutputKind.BOXES: _read_boxes,
    OutputKind.POLYGONS: _read_polygons,
    OutputKind.BOXES_OR_POLYGONS: _read_boxes_or_polygons,
}

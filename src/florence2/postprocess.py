"""Generated pieces to objects with scores, for every output kind of the task table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from florence2.errors import RequestError
from florence2.records import Box, Object, Polygon, Quad, Result, SizeWh, Text, result_to_dict
from florence2.tasks import BANNED_PHRASES, OutputKind, Task, TaskInput, find_task
from florence2.tokenizer import Piece, PieceKind, joined_text, pieces_from_text, strip_dropped
from florence2.tokens import NUM_LOCATION_BINS, POLYGON_END, POLYGON_START, SEPARATOR

__all__ = ["Parsed", "parse", "parse_answer_text", "result_to_dict"]


NEAR_BINS: Final = 20
"""A location within so many bins of the chosen one, 2 % of the image, is the same place."""


def object_score(place: Sequence[Piece], label: Sequence[Piece]) -> float | None:
    """The score of a prediction, in [0, 1].

    ``score = g(place) * g(label)``, where ``g`` is the geometric mean of the probabilities of
    the tokens given, and 1 when there are none. The probability of a location token is that of
    any bin within NEAR_BINS of it: a bin is a thousandth of the image, and a network that is sure
    of an edge still spreads its probability over neighbouring bins.

    - ``place``: the object's own location tokens: 4 for a box, 8 for a quad, those of all its
      rings for a polygon, none for a text.
    - ``label``: the tokens of its label. Objects that share one label share this factor.

    All probabilities are of one distribution: the float32 softmax over the whole vocabulary of the
    logits from which the token was chosen, given the tokens before it in the same answer. Nothing
    is taken out of it: what a ban forbids (repeated n-grams, ``<s>``) keeps its share, in the
    normaliser and among the neighbours of a place. So a token that was chosen only because a
    better one was banned has the small probability it had, and a place whose best bin was banned
    has that bin's share too. In reduced precision the best logits of every row are computed in
    float32 (``Florence2Network.next_logits``), the others are rounded. Scores compare within a
    task and checkpoint. The result is None if any of the probabilities is unknown.

    The search itself ranks by other numbers, the reference's: the same log-softmax with -inf
    where a token is banned, not renormalised, and 0 for a forced token; see ``BeamSearch`` and
    ``Answer.beam_score``.
    """
    factors = [
        _geometric_mean(piece.near_log_prob for piece in place),
        _geometric_mean(piece.log_prob for piece in label),
    ]
    return (
        None if None in factors else math.prod(factor for factor in factors if factor is not None)
    )


def _geometric_mean(values: Iterable[float | None]) -> float | None:
    log_probs = list(values)
    known = [log_prob for log_prob in log_probs if log_prob is not None]
    if len(known) < len(log_probs):
        return None
    if not known:
        return 1.0
    mean = sum(min(log_prob, 0.0) for log_prob in known) / len(known)
    # A probability of 0 has the logarithm -inf; a NaN says no more about the object than that.
    return 0.0 if math.isnan(mean) else math.exp(mean)


LEFTOVER_LOCATIONS: Final = "location tokens that complete no object, left out"
UNLABELED: Final = "objects without a label, left out"
TOO_GENERAL: Final = "phrases too general to be grounded, left out"
UNPLACED_TEXT: Final = "texts without a place, left out"
NO_AREA: Final = "boxes without area, left out"
SWAPPED: Final = "boxes with corners in the wrong order, put right"
TOO_FEW_POINTS: Final = "outlines with fewer than 3 points, left out"
CUT_OUTLINE: Final = "outlines cut off before their end, kept"
STRAY_MARKERS: Final = "tokens without a meaning here, left out"

OPEN_MARK: Final = POLYGON_START.encode()
CLOSE_MARK: Final = POLYGON_END.encode()
RING_MARK: Final = SEPARATOR.encode()
_OUTLINE_MARKS: Final = frozenset((OPEN_MARK, CLOSE_MARK, RING_MARK))


@dataclass(slots=True)
class Notes:
    """What was left out or put right, counted, so that junk of any length gives a short list."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, what: str, count: int = 1) -> None:
        """Count one of the constants of this module; a count of 0 leaves no note."""
        if count:
            self.counts[what] += count

    def sentences(self) -> tuple[str, ...]:
        """One line per kind of note, in the order of first appearance."""
        return tuple(f"{what}: {count}" for what, count in self.counts.items())


@dataclass(slots=True)
class Run:
    """Text pieces, then the locations and outline marks up to the next text."""

    text: list[Piece] = field(default_factory=list)
    body: list[Piece] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The run's text without the white space around it."""
        return joined_text(self.text).strip()

    @property
    def locations(self) -> list[Piece]:
        """The body without outline marks."""
        return [piece for piece in self.body if piece.kind is PieceKind.LOCATION]

    @property
    def has_outline(self) -> bool:
        """Whether the body spells polygons rather than boxes."""
        return any(piece.data == OPEN_MARK for piece in self.body)


def split_runs(pieces: Iterable[Piece], notes: Notes) -> list[Run]:
    """The runs of an answer in order; a token that means nothing here ends a run."""
    runs: list[Run] = []
    current = Run()
    for piece in pieces:
        if piece.kind is PieceKind.LOCATION or piece.data in _OUTLINE_MARKS:
            current.body.append(piece)
            continue
        if current.body or piece.kind is PieceKind.MARKER:
            runs.append(current)
            current = Run()
        if piece.kind is PieceKind.TEXT:
            current.text.append(piece)
        else:
            notes.add(STRAY_MARKERS)
    runs.append(current)
    return [run for run in runs if run.body or run.label]


def groups_of(body: Sequence[Piece], group_size: int, notes: Notes) -> list[list[Piece]]:
    """Locations in groups of ``group_size``; outline marks end a group, and are counted."""
    groups: list[list[Piece]] = []
    group: list[Piece] = []
    for piece in body:
        if piece.kind is not PieceKind.LOCATION:
            notes.add(STRAY_MARKERS)
            notes.add(LEFTOVER_LOCATIONS, len(group))
            group = []
            continue
        group.append(piece)
        if len(group) == group_size:
            groups.append(group)
            group = []
    notes.add(LEFTOVER_LOCATIONS, len(group))
    return groups


def coordinates(locations: Sequence[Piece], size_wh: SizeWh) -> list[float]:
    """x, y, x, y, ... in pixels: the middle of each bin, so always inside the image."""
    return [
        ((piece.location_bin or 0) + 0.5) * size_wh[position % 2] / NUM_LOCATION_BINS
        for position, piece in enumerate(locations)
    ]


def boxes_of(run: Run, label: str, size_wh: SizeWh, notes: Notes) -> list[Box]:
    """One box per group of four locations, with x1 < x2 and y1 < y2."""
    text = run.text if label else ()
    boxes = []
    for group in groups_of(run.body, 4, notes):
        x1, y1, x2, y2 = coordinates(group, size_wh)
        if x1 == x2 or y1 == y2:
            notes.add(NO_AREA)
            continue
        notes.add(SWAPPED, int(x1 > x2 or y1 > y2))
        box_xyxy = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        boxes.append(Box(box_xyxy, label, object_score(group, text)))
    return boxes


def quads_of(run: Run, label: str, size_wh: SizeWh, notes: Notes) -> list[Quad]:
    """One quad per group of eight locations; its corners stay in the order they were given."""
    quads = []
    for group in groups_of(run.body, 8, notes):
        x1, y1, x2, y2, x3, y3, x4, y4 = coordinates(group, size_wh)
        if len({x1, x2, x3, x4}) == 1 or len({y1, y2, y3, y4}) == 1:
            notes.add(NO_AREA)
            continue
        corners = (x1, y1, x2, y2, x3, y3, x4, y4)
        quads.append(Quad(corners, label, object_score(group, run.text)))
    return quads


@dataclass(slots=True)
class _Outline:
    """One object's rings of location pieces while they are being read."""

    rings: list[list[Piece]] = field(default_factory=lambda: [[]])

    def add(self, piece: Piece) -> None:
        if piece.kind is PieceKind.LOCATION:
            self.rings[-1].append(piece)
        else:
            self.rings.append([])


def polygons_of(run: Run, label: str, size_wh: SizeWh, notes: Notes) -> list[Polygon]:
    """One polygon per ``<poly>...</poly>``, or one for the whole run; ``<sep>`` parts its rings."""
    outlines = _marked_outlines(run, notes) if run.has_outline else [_bare_outline(run, notes)]
    polygons = []
    for outline in outlines:
        rings = [ring for ring in outline.rings if _is_ring(ring, notes)]
        if rings:
            used = [piece for ring in rings for piece in ring[: len(ring) // 2 * 2]]
            score = object_score(used, run.text if label else ())
            shapes = tuple(tuple(coordinates(r[: len(r) // 2 * 2], size_wh)) for r in rings)
            polygons.append(Polygon(shapes, label, score))
    return polygons


def _bare_outline(run: Run, notes: Notes) -> _Outline:
    outline = _Outline()
    for piece in run.body:
        outline.add(piece)
        notes.add(STRAY_MARKERS, int(piece.data == CLOSE_MARK))
    return outline


def _marked_outlines(run: Run, notes: Notes) -> list[_Outline]:
    outlines: list[_Outline] = []
    inside = False
    for piece in run.body:
        if piece.data == OPEN_MARK:
            notes.add(CUT_OUTLINE, int(inside))
            outlines.append(_Outline())
            inside = True
        elif inside and piece.data == CLOSE_MARK:
            inside = False
        elif inside:
            outlines[-1].add(piece)
        else:
            is_location = piece.kind is PieceKind.LOCATION
            notes.add(LEFTOVER_LOCATIONS if is_location else STRAY_MARKERS)
    notes.add(CUT_OUTLINE, int(inside))
    return outlines


def _is_ring(ring: Sequence[Piece], notes: Notes) -> bool:
    if not ring:
        return False
    bins = [piece.location_bin for piece in ring]
    points = set(zip(bins[0::2], bins[1::2], strict=False))
    if len(points) < 3:
        notes.add(TOO_FEW_POINTS)
        return False
    notes.add(LEFTOVER_LOCATIONS, len(ring) % 2)
    return True


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

"""An answer cut into runs: some text, and the places that follow it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from florence2.pieces import Piece, PieceKind, joined_text
from florence2.tokens import POLYGON_END, POLYGON_START, SEPARATOR

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

"""Location tokens to coordinates: boxes, quads and polygons in pixels of the original image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from florence2.pieces import Piece, PieceKind
from florence2.records import Box, Polygon, Quad, SizeWh
from florence2.runs import (
    CLOSE_MARK,
    CUT_OUTLINE,
    LEFTOVER_LOCATIONS,
    NO_AREA,
    OPEN_MARK,
    STRAY_MARKERS,
    SWAPPED,
    TOO_FEW_POINTS,
    Notes,
    Run,
    groups_of,
)
from florence2.scoring import object_score
from florence2.tokens import NUM_LOCATION_BINS


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

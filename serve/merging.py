"""One result of the answers of neighbouring tiles: nothing twice, nothing cut in two.

A tile's edge cuts objects. A piece is known by touching an inner edge of its tile. Two pieces on
both sides of one edge are joined; a piece that lies in something whole of its class goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from florence2.records import Box, BoxXyxy, Object, Polygon, Quad, Result, Text, Timings
from serve.dedupe import is_same_box, known_score
from serve.geometry import Located, outer_box

# Seen from two tiles, at two scales, the boxes of one object differ more than within one answer.
SAME_IN_TILES_IOU: Final = 0.5
PIECE_INSIDE: Final = 0.8
# How much of the longer of two pieces' extents along the edge both share.
ALONG_EDGE: Final = 0.5
# A place is a thousandth of its tile; a cut object may end some of them before the edge.
_TOUCHES_SHARE: Final = 0.01
_TOUCHES_MIN_PX: Final = 3.0
_RIGHT, _BOTTOM = 2, 3

_T = TypeVar("_T", int, float)


@dataclass(frozen=True, slots=True)
class TileResult:
    """The result of one tile, moved into the image, and the tile (x1, y1, x2, y2) in pixels."""

    result: Result
    tile_xyxy: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Seen:
    """One object in one tile, or joined from several. ``cut_by`` has the inner edges it touches."""

    shape: Located
    box_xyxy: BoxXyxy
    tiles: tuple[int, ...]
    cut_by: frozenset[int] = frozenset()

    @property
    def rank(self) -> tuple[int, float]:
        """What is best comes first: whole before joined before a piece, then by score."""
        is_piece, is_joined = bool(self.cut_by), len(self.tiles) > 1
        return 2 if is_piece else int(is_joined), -known_score(self.shape.score)


def merge_tiles(found: Sequence[TileResult]) -> Result:
    """One result of at least one tile's. A pass over the whole image is one more tile.

    Objects of different tiles and one label are the same when their boxes overlap by half, or when
    one is a piece that lies in the other. What one tile saw twice stays: that is not for tiles to
    judge. Pieces of boxes and polygons are joined, with the higher score: either piece proves the
    object, and a part is harder to recognise than the whole. Lines of text are not joined.
    The text is that of the whole image, if one of the tiles is the whole; timings are the longest.
    """
    area = _outer([tile.tile_xyxy for tile in found])
    seen = [one for number, tile in enumerate(found) for one in _seen_in(tile, number, area)]
    kept = _once(_joined(seen, found))
    whole = next((tile.result for tile in found if tile.tile_xyxy == area), None)
    results = [tile.result for tile in found]
    texts = tuple(shape for shape in whole.objects if isinstance(shape, Text)) if whole else ()
    objects: tuple[Object, ...] = (*texts, *(one.shape for one in kept))
    return replace(
        results[0],
        objects=objects,
        text=whole.text if whole else None,
        answer="\n".join(result.answer for result in results),
        token_ids=tuple(token for result in results for token in result.token_ids),
        truncated=any(result.truncated for result in results),
        notes=tuple(dict.fromkeys(note for result in results for note in result.notes)),
        steps=(),
        log_probs=(),
        near_log_probs=(),
        timings_s=_longest([result.timings_s for result in results]),
    )


def _seen_in(tile: TileResult, number: int, area: tuple[int, int, int, int]) -> list[_Seen]:
    seen = []
    for shape in tile.result.objects:
        box = None if isinstance(shape, Text) else outer_box(shape)
        if box is not None and not isinstance(shape, Text):
            seen.append(_Seen(shape, box, (number,), _cuts(box, tile.tile_xyxy, area)))
    return seen


def _cuts(
    box: BoxXyxy, tile: tuple[int, int, int, int], area: tuple[int, int, int, int]
) -> frozenset[int]:
    """Which edges of its tile a box touches, without those where the image ends."""
    cuts = set()
    for side in range(4):
        length = tile[side % 2 + 2] - tile[side % 2]
        near = max(_TOUCHES_MIN_PX, _TOUCHES_SHARE * length)
        if tile[side] != area[side] and abs(box[side] - tile[side]) <= near:
            cuts.add(side)
    return frozenset(cuts)


def _joined(seen: Sequence[_Seen], found: Sequence[TileResult]) -> list[_Seen]:
    """Pieces put together, where the first of them was; the rest as it is."""
    group = list(range(len(seen)))
    for first in range(len(seen)):
        for second in range(first + 1, len(seen)):
            if _continues(seen[first], seen[second], found):
                old, new = sorted((group[first], group[second]), reverse=True)
                group = [new if one == old else one for one in group]
    return [
        _join([seen[n] for n in range(len(seen)) if group[n] == number])
        for number in dict.fromkeys(group)
    ]


def _continues(one: _Seen, other: _Seen, found: Sequence[TileResult]) -> bool:
    """Whether two pieces meet at an edge between their tiles."""
    if isinstance(one.shape, Quad) or not _comparable(one, other):
        return False
    return any(
        _meets(first, second, far, found)
        for first, second in ((one, other), (other, one))
        for far in (_RIGHT, _BOTTOM)
    )


def _meets(before: _Seen, after: _Seen, far: int, found: Sequence[TileResult]) -> bool:
    """Whether ``before`` ends at its tile's ``far`` edge, and ``after`` goes on from its near one.

    Both tiles lie beside each other: they share or touch the edge, and the rows or columns in
    which both pieces are.
    """
    near, along = far - 2, (far + 1) % 2
    if far not in before.cut_by or near not in after.cut_by:
        return False
    first, second = found[before.tiles[0]].tile_xyxy, found[after.tiles[0]].tile_xyxy
    if not first[near] < second[near] <= first[far] < second[far]:
        return False
    start, end = along, along + 2
    shared = min(before.box_xyxy[end], after.box_xyxy[end]) - max(
        before.box_xyxy[start], after.box_xyxy[start]
    )
    longer = max(one.box_xyxy[end] - one.box_xyxy[start] for one in (before, after))
    return longer > 0 and shared >= ALONG_EDGE * longer


def _join(pieces: Sequence[_Seen]) -> _Seen:
    if len(pieces) == 1:
        return pieces[0]
    best = min(pieces, key=lambda one: -known_score(one.shape.score)).shape
    box = _outer([one.box_xyxy for one in pieces])
    tiles = tuple(dict.fromkeys(tile for one in pieces for tile in one.tiles))
    if isinstance(best, Box):
        return _Seen(replace(best, box_xyxy=box), box, tiles)
    rings = tuple(r for one in pieces if isinstance(one.shape, Polygon) for r in one.shape.rings_xy)
    return _Seen(Polygon(rings, best.label, best.score), box, tiles)


def _once(seen: Sequence[_Seen]) -> list[_Seen]:
    """Without what was seen in another tile too; the best of them stays, in order."""
    kept: list[int] = []
    for number in sorted(range(len(seen)), key=lambda n: (*seen[n].rank, n)):
        if not any(_is_same(seen[number], seen[other]) for other in kept):
            kept.append(number)
    return [seen[number] for number in sorted(kept)]


def _is_same(worse: _Seen, better: _Seen) -> bool:
    if not _comparable(worse, better):
        return False
    inside = PIECE_INSIDE if worse.cut_by else None
    return is_same_box(worse.box_xyxy, better.box_xyxy, SAME_IN_TILES_IOU, inside)


def _comparable(one: _Seen, other: _Seen) -> bool:
    """One kind of shape with one label, not seen by one and the same tile.

    Two readings of a line of text may differ, so lines are compared whatever they say.
    """
    if one.tiles == other.tiles or type(one.shape) is not type(other.shape):
        return False
    return isinstance(one.shape, Quad) or one.shape.label == other.shape.label


def _outer(boxes: Sequence[tuple[_T, _T, _T, _T]]) -> tuple[_T, _T, _T, _T]:
    return (
        min(box[0] for box in boxes),
        min(box[1] for box in boxes),
        max(box[2] for box in boxes),
        max(box[3] for box in boxes),
    )


def _longest(timings: Sequence[Timings]) -> Timings:
    """Tiles run in one batch, whose time each of them has."""
    return Timings(*(max(one[stage] for one in timings) for stage in Timings()))

"""Large images in overlapping tiles: where they lie, and one result of all their answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from florence2.errors import RequestError
from florence2.images import ImagePart, LoadedImage
from florence2.records import (
    Box,
    BoxXyxy,
    Object,
    Polygon,
    Quad,
    Result,
    SizeWh,
    Text,
    Timings,
    clip_region,
)
from florence2.tasks import OutputKind, TaskInput, parse_steps
from serve.predict.geometry import (
    Located,
    areas_of,
    known_score,
    numbered,
    outer_box,
    same_boxes,
    shared_areas,
)
from serve.settings import Tiling

__all__ = ["MAX_TILES", "BoxXyxyInt", "TileResult", "can_tile", "merge_tiles", "plan_tiles"]


OffsetXy = tuple[float, float]


def moved(result: Result, offset_xy: OffsetXy, size_wh: SizeWh) -> Result:
    """``result`` of a crop whose top left pixel is ``offset_xy`` of an image of ``size_wh``.

    The objects of all steps move too. ``answer`` stays what the model said: its location tokens
    are places in the crop.
    """
    return replace(
        result,
        size_wh=size_wh,
        objects=tuple(_moved_object(found, offset_xy) for found in result.objects),
        steps=tuple(moved(step, offset_xy, size_wh) for step in result.steps),
    )


def _moved_object(found: Object, offset_xy: OffsetXy) -> Object:
    dx, dy = offset_xy
    if isinstance(found, Box):
        x1, y1, x2, y2 = found.box_xyxy
        return replace(found, box_xyxy=(x1 + dx, y1 + dy, x2 + dx, y2 + dy))
    if isinstance(found, Quad):
        x1, y1, x2, y2, x3, y3, x4, y4 = found.quad_xy
        corners = (x1 + dx, y1 + dy, x2 + dx, y2 + dy, x3 + dx, y3 + dy, x4 + dx, y4 + dy)
        return replace(found, quad_xy=corners)
    if isinstance(found, Polygon):
        return replace(
            found, rings_xy=tuple(_moved_ring(ring, offset_xy) for ring in found.rings_xy)
        )
    return found


def _moved_ring(ring_xy: Sequence[float], offset_xy: OffsetXy) -> tuple[float, ...]:
    return tuple(value + offset_xy[place % 2] for place, value in enumerate(ring_xy))


# Seen from two tiles, at two scales, the boxes of one object differ more than within one answer.
SAME_IN_TILES_IOU: Final = 0.5
PIECE_INSIDE: Final = 0.8
# How much of the longer of two pieces' extents along the edge both share.
ALONG_EDGE: Final = 0.5
# A place is a thousandth of its tile; a cut object may end some of them before the edge.
_TOUCHES_SHARE: Final = 0.01
_TOUCHES_MIN_PX: Final = 3.0
_RIGHT, _BOTTOM = 2, 3

TileXyxy = tuple[int, int, int, int]
_T = TypeVar("_T", int, float)


@dataclass(frozen=True, slots=True)
class TileResult:
    """The result of one tile, moved into the image, and the tile (x1, y1, x2, y2) in pixels."""

    result: Result
    tile_xyxy: TileXyxy


@dataclass(frozen=True, slots=True)
class _Seen:
    """One object in one tile, or joined from several. ``cut_by`` has the inner edges it touches."""

    shape: Located
    box_xyxy: BoxXyxy
    tiles: tuple[int, ...]
    cut_by: frozenset[int] = frozenset()

    @property
    def rank(self) -> tuple[int, float]:
        """What is best comes first: whole, joined, joined but still cut, a piece.

        Then the surer; but of two views that are cut, the one that shows more.
        """
        is_joined = len(self.tiles) > 1
        if not self.cut_by:
            return int(is_joined), -known_score(self.shape.score)
        x1, y1, x2, y2 = self.box_xyxy
        return 2 if is_joined else 3, -(x2 - x1) * (y2 - y1)

    @property
    def likeness(self) -> tuple[type, str]:
        """What two views of one object share. Two readings of a line of text may differ."""
        return type(self.shape), "" if isinstance(self.shape, Quad) else self.shape.label


def _anything(shape: Located) -> bool:
    return True


def merge_tiles(
    found: Sequence[TileResult], is_shown: Callable[[Located], bool] = _anything
) -> Result:
    """One result of at least one tile's. A pass over the whole image is one more tile.

    Objects of different tiles and one label are the same when their boxes overlap by half, or when
    one is a piece that lies in the other. What one tile saw twice stays: that is not for tiles to
    judge. Pieces of boxes and polygons are joined; lines of text are not. What stays has the
    highest score of all its views and pieces: any of them proves the object, a part is harder to
    recognise than the whole, and merging must not put an object below a threshold it had passed.
    A piece of another label goes too where it lies in a whole object of which ``is_shown`` says
    that the user will see it; that one's score stays its own.
    The text is that of the whole image, if one of the tiles is the whole; timings are the longest.
    """
    area = _outer([tile.tile_xyxy for tile in found])
    seen = [one for number, tile in enumerate(found) for one in _seen_in(tile, number, area)]
    whole = next((tile.result for tile in found if tile.tile_xyxy == area), None)
    results = [tile.result for tile in found]
    texts = tuple(shape for shape in whole.objects if isinstance(shape, Text)) if whole else ()
    objects: tuple[Object, ...] = (
        *texts,
        *(one.shape for one in _without_foreign_pieces(_once(_joined(seen, found)), is_shown)),
    )
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


def _seen_in(tile: TileResult, number: int, area: TileXyxy) -> list[_Seen]:
    seen = []
    for shape in tile.result.objects:
        box = None if isinstance(shape, Text) else outer_box(shape)
        if box is not None and not isinstance(shape, Text):
            seen.append(_Seen(shape, box, (number,), _cuts(box, tile.tile_xyxy, area)))
    return seen


def _cuts(box: BoxXyxy, tile: TileXyxy, area: TileXyxy) -> frozenset[int]:
    """Which edges of its tile a box touches, without those where the image ends."""
    cuts = set()
    for side in range(4):
        if tile[side] != area[side] and abs(box[side] - tile[side]) <= _near_px(tile, side % 2):
            cuts.add(side)
    return frozenset(cuts)


def _near_px(tile: TileXyxy, axis: int) -> float:
    """How far from a tile's edge along ``axis`` still touches it."""
    return max(_TOUCHES_MIN_PX, _TOUCHES_SHARE * (tile[axis + 2] - tile[axis]))


def _joined(seen: Sequence[_Seen], found: Sequence[TileResult]) -> list[_Seen]:
    """Pieces put together, where the first of them was; the rest as it is."""
    parents = list(range(len(seen)))
    open_edges = [set(one.cut_by) for one in seen]
    for first, second, far in _meetings(seen, found):
        open_edges[first].discard(far)
        open_edges[second].discard(far - 2)
        new, old = sorted((_root(parents, first), _root(parents, second)))
        parents[old] = new
    members: dict[int, list[int]] = {}
    for place in range(len(seen)):
        members.setdefault(_root(parents, place), []).append(place)
    return [
        _join([seen[n] for n in places], frozenset().union(*(open_edges[n] for n in places)))
        for places in members.values()
    ]


def _root(parents: list[int], place: int) -> int:
    """The first piece of the object that the piece at ``place`` belongs to."""
    while parents[place] != place:
        parents[place] = parents[parents[place]]
        place = parents[place]
    return place


def _meetings(seen: Sequence[_Seen], found: Sequence[TileResult]) -> Iterator[tuple[int, int, int]]:
    """Pairs of pieces that go on from one tile to the next, and over which edge of the first."""
    cut: list[dict[int, list[int]]] = [{} for _ in range(4)]
    for number, one in enumerate(seen):
        if not isinstance(one.shape, Quad):
            for edge in one.cut_by:
                cut[edge].setdefault(one.tiles[0], []).append(number)
    for far in (_RIGHT, _BOTTOM):
        for (tile, before), (next_tile, after) in product(cut[far].items(), cut[far - 2].items()):
            edges = (found[tile].tile_xyxy, found[next_tile].tile_xyxy)
            if not _goes_on(*edges, far):
                continue
            for first, second in product(before, after):
                if _continues(seen[first], seen[second], far, *edges):
                    yield first, second, far


def _goes_on(tile: TileXyxy, next_tile: TileXyxy, far: int) -> bool:
    """Whether the next tile lies over or at the ``far`` edge of a tile."""
    near, along = far - 2, (far + 1) % 2
    return (
        tile[near] < next_tile[near] <= tile[far] < next_tile[far]
        and tile[along] < next_tile[along + 2]
        and next_tile[along] < tile[along + 2]
    )


def _continues(before: _Seen, after: _Seen, far: int, tile: TileXyxy, next_tile: TileXyxy) -> bool:
    """Whether ``before``, cut by its tile's ``far`` edge, goes on in ``after``, cut by the other.

    An object over both edges fills the strip that the tiles share; something that ends within the
    strip is another object. Along the edge both must have half of the longer extent in common.
    """
    near, along = far - 2, (far + 1) % 2
    if before.likeness != after.likeness:
        return False
    first, second = before.box_xyxy, after.box_xyxy
    if first[near] > next_tile[near] + _near_px(next_tile, near):
        return False
    if second[far] < tile[far] - _near_px(tile, near):
        return False
    shared = min(first[along + 2], second[along + 2]) - max(first[along], second[along])
    longer = max(first[along + 2] - first[along], second[along + 2] - second[along])
    return longer > 0 and shared >= ALONG_EDGE * longer


def _join(pieces: Sequence[_Seen], cut_by: frozenset[int]) -> _Seen:
    """One object of all pieces, with the label and the score of the surest."""
    if len(pieces) == 1:
        return pieces[0]
    best = min(pieces, key=lambda one: -known_score(one.shape.score)).shape
    box = _outer([one.box_xyxy for one in pieces])
    tiles = tuple(dict.fromkeys(tile for one in pieces for tile in one.tiles))
    if isinstance(best, Box):
        return _Seen(replace(best, box_xyxy=box), box, tiles, cut_by)
    rings = tuple(r for one in pieces if isinstance(one.shape, Polygon) for r in one.shape.rings_xy)
    return _Seen(Polygon(rings, best.label, best.score, best.tokens), box, tiles, cut_by)


def _once(seen: Sequence[_Seen]) -> list[_Seen]:
    """Without what was seen in another tile too. The best view stays, with the highest score."""
    alike: dict[tuple[type, str], list[int]] = {}
    for place, one in enumerate(seen):
        alike.setdefault(one.likeness, []).append(place)
    kept: dict[int, _Seen] = {}
    for places in alike.values():
        kept |= {places[n]: view for n, view in _once_of_kind([seen[p] for p in places]).items()}
    return [kept[place] for place in sorted(kept)]


def _once_of_kind(seen: Sequence[_Seen]) -> dict[int, _Seen]:
    """What stays of views that are alike, by its place among them."""
    boxes = np.array([one.box_xyxy for one in seen], np.float64)
    areas = areas_of(boxes)
    tiles = numbered([one.tiles for one in seen])
    is_piece = np.array([bool(one.cut_by) for one in seen])
    left = np.ones(len(seen), bool)
    kept: dict[int, _Seen] = {}
    for place in sorted(range(len(seen)), key=lambda n: (*seen[n].rank, n)):
        if not left[place]:
            continue
        same = (is_piece & _lie_in(boxes[place], boxes, areas)) | same_boxes(
            boxes[place], boxes, SAME_IN_TILES_IOU
        )
        same &= left & (tiles != tiles[place])
        left &= ~same
        left[place] = False
        views = [seen[place].shape, *(seen[int(number)].shape for number in np.flatnonzero(same))]
        score = _highest([view.score for view in views])
        kept[place] = replace(seen[place], shape=replace(views[0], score=score))
    return kept


def _without_foreign_pieces(
    seen: Sequence[_Seen], is_shown: Callable[[Located], bool]
) -> list[_Seen]:
    """Without pieces that lie in a whole object, and what was joined where one tile saw it whole.

    Of what was joined only the same object goes: it is whole itself, and may stand before a larger.
    """
    if not seen:
        return []
    boxes = np.array([one.box_xyxy for one in seen], np.float64)
    areas = areas_of(boxes)
    tiles = numbered([one.tiles for one in seen])
    is_piece = np.array([bool(one.cut_by) for one in seen])
    is_joined = np.array([len(one.tiles) > 1 for one in seen])
    gone = np.zeros(len(seen), bool)
    for place in np.flatnonzero(~is_piece).tolist():
        if gone[place] or not is_shown(seen[place].shape):
            continue
        lost = is_piece & _lie_in(boxes[place], boxes, areas)
        if not is_joined[place]:
            same = same_boxes(boxes[place], boxes, SAME_IN_TILES_IOU)
            lost |= is_joined & same
        gone |= lost & (tiles != tiles[place])
    return [one for one, is_gone in zip(seen, gone, strict=True) if not is_gone]


def _lie_in(
    box_xyxy: NDArray[np.float64], boxes_xyxy: NDArray[np.float64], areas: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Which of ``boxes_xyxy`` [N, 4], of these ``areas``, lie mostly in the box: [N]."""
    shared = shared_areas(box_xyxy, boxes_xyxy)
    return (shared > 0) & (shared >= PIECE_INSIDE * areas)


def _highest(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None and not math.isnan(score)]
    return max(known, default=scores[0])


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


BoxXyxyInt = tuple[int, int, int, int]
MAX_TILES: Final = 1024


def can_tile(task: str) -> bool:
    """Whether a task prompt or cascade asks where things are, so that tiles have an answer each.

    Words about the whole image have no parts, and a region is asked about where it is: text tasks
    and cascades that end in a region step look at the whole image.
    """
    last = parse_steps(task)[-1]
    return last.output is not OutputKind.TEXT and last.takes is not TaskInput.REGION


def plan_tiles(
    size_wh: SizeWh, tile_wh: SizeWh, overlap_wh: tuple[int, int]
) -> tuple[BoxXyxyInt, ...]:
    """Tiles (x1, y1, x2, y2) that cover every pixel, row by row.

    Neighbours share ``overlap_wh`` pixels or more: the last tile of a row or column is pulled
    back inside the image, so all have the full size. A side shorter than a tile is one tile.
    Raises RequestError for tiles that do not advance, or for more than 1024 of them.
    """
    columns = _spans(size_wh[0], tile_wh[0], overlap_wh[0])
    rows = _spans(size_wh[1], tile_wh[1], overlap_wh[1])
    if len(columns) * len(rows) > MAX_TILES:
        raise RequestError(
            f"An image is cut into at most {MAX_TILES} tiles, and tiles of {tile_wh[0]} by "
            f"{tile_wh[1]} pixels are {len(columns) * len(rows)}; make them larger."
        )
    return tuple((x1, y1, x2, y2) for y1, y2 in rows for x1, x2 in columns)


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    if tile < 1 or not 0 <= overlap < tile:
        raise RequestError(
            "Tiles overlap by less than their size, and a size of "
            f"{tile} with an overlap of {overlap} pixels was received; make the overlap smaller."
        )
    if length <= tile:
        return [(0, length)]
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    return [(start, start + tile) for start in starts]


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Pixels ``box_xyxy`` of an image as a picture of its own."""

    picture: LoadedImage
    box_xyxy: tuple[int, int, int, int]

    @property
    def offset_xy(self) -> tuple[int, int]:
        """Where its top left corner lies in the image."""
        return self.box_xyxy[0], self.box_xyxy[1]


def views_of(
    picture: LoadedImage, rectangle: BoxXyxy | None, tiling: Tiling | None
) -> tuple[View, ...]:
    """The views of a picture, those of the whole first.

    Raises RequestError for a ``rectangle`` that lies outside the image.
    """
    whole = (0, 0, *picture.size_wh)
    area = whole if rectangle is None else _inside(rectangle, picture)
    if tiling is None:
        return (_cut(picture, area),)
    left, top, right, bottom = area
    tiles = [
        (x1 + left, y1 + top, x2 + left, y2 + top)
        for x1, y1, x2, y2 in plan_tiles(
            (right - left, bottom - top), tiling.size_wh, tiling.overlap_wh
        )
    ]
    boxes = tiles if len(tiles) == 1 or not tiling.full_image else [area, *tiles]
    return tuple(_cut(picture, box) for box in boxes)


def _inside(rectangle: BoxXyxy, picture: LoadedImage) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = clip_region(rectangle, picture.size_wh, "A rectangle")
    left, top = round(x1), round(y1)
    return left, top, max(round(x2), left + 1), max(round(y2), top + 1)


def _cut(picture: LoadedImage, box: tuple[int, int, int, int]) -> View:
    if box == (0, 0, *picture.size_wh):
        return View(picture, box)
    return View(ImagePart(picture, box), box)

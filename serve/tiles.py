"""Large images in overlapping tiles: where the tiles lie, and one result of all their answers."""

from __future__ import annotations

from typing import Final

from florence2.errors import RequestError
from florence2.records import SizeWh
from florence2.tasks import OutputKind, TaskInput, parse_steps
from serve.predict.tiling import TileResult, merge_tiles

BoxXyxyInt = tuple[int, int, int, int]
MAX_TILES: Final = 1024

__all__ = ["MAX_TILES", "BoxXyxyInt", "TileResult", "can_tile", "merge_tiles", "plan_tiles"]


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

"""Dense targets on a grid of visual tokens, for an auxiliary loss while training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from florence2.opencv import cv2
from florence2_demo.lexicon import COLOURS, KINDS, SIGN_WORDS
from florence2_demo.placing import SUBPIXEL_BITS, to_subpixels
from florence2_demo.scene import Scene

_SAMPLES_PER_CELL = 9


@dataclass(frozen=True, slots=True)
class GridTargets:
    """One row per grid row, one column per grid column.

    ``objectness`` [g, g] float32 is 1 where an object covers the cell's centre; ``kind`` and
    ``colour`` [g, g] int64 index words.KINDS and words.COLOURS, -1 for none; ``boxes_xyxy``
    [g, g, 4] float32 is that object's box in fractions (zeros for none); ``words`` [g, g] int64
    indexes words.SIGN_WORDS where a text line's quad covers the cell's centre, -1 elsewhere.
    """

    objectness: NDArray[np.float32]
    kind: NDArray[np.int64]
    colour: NDArray[np.int64]
    boxes_xyxy: NDArray[np.float32]
    words: NDArray[np.int64]


def grid_targets(scene: Scene, grid: int) -> GridTargets:
    """The top-most object of every cell of a ``grid`` x ``grid`` raster of the image.

    An object that covers no cell's centre claims the cell that holds its box's centre.
    """
    owner = _cell_owners(scene, grid)
    kinds = np.array([KINDS.index(o.kind) for o in scene.objects] + [-1], np.int64)
    colours = np.array([COLOURS.index(o.colour) for o in scene.objects] + [-1], np.int64)
    boxes = np.array([o.box_xyxy for o in scene.objects] + [(0.0,) * 4], np.float32)
    return GridTargets(
        objectness=(owner >= 0).astype(np.float32),
        kind=kinds[owner],
        colour=colours[owner],
        boxes_xyxy=boxes[owner],
        words=_word_cells(scene, grid),
    )


def _cell_centres(raster: NDArray[np.uint8]) -> NDArray[np.uint8]:
    half = _SAMPLES_PER_CELL // 2
    return raster[half::_SAMPLES_PER_CELL, half::_SAMPLES_PER_CELL]


def _cell_owners(scene: Scene, grid: int) -> NDArray[np.int64]:
    """The index of each cell's object, -1 for none."""
    side = grid * _SAMPLES_PER_CELL
    raster = np.zeros((side, side), np.uint8)
    for index, thing in enumerate(scene.objects, start=1):
        points = to_subpixels(np.array(thing.outline_xy), (side, side))
        cv2.fillPoly(raster, [points], index, shift=SUBPIXEL_BITS)
    owner = _cell_centres(raster).astype(np.int64) - 1
    for index, thing in enumerate(scene.objects):
        if not (owner == index).any():
            x, y = thing.centre_xy
            owner[min(int(y * grid), grid - 1), min(int(x * grid), grid - 1)] = index
    return owner


def _word_cells(scene: Scene, grid: int) -> NDArray[np.int64]:
    side = grid * _SAMPLES_PER_CELL
    raster = np.zeros((side, side), np.uint8)
    for line in scene.texts:
        word = SIGN_WORDS.index(line.text) + 1
        points = to_subpixels(np.array(line.quad_xy), (side, side))
        cv2.fillPoly(raster, [points], word, shift=SUBPIXEL_BITS)
    return _cell_centres(raster).astype(np.int64) - 1

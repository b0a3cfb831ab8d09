"""Batches that the demo checkpoint is trained on: pixels, prompts, answers, and dense targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from florence2.pixels import ImageProcessor
from florence2.tokenizer import Vocabulary
from florence2.tokens import BOS_ID, EOS_ID, PAD_ID
from florence2_demo.drawing import draw_scene
from florence2_demo.examples import prompt_sentence, sample_examples
from florence2_demo.geometry import PointsXy, fill_polygon
from florence2_demo.lexicon import COLOURS, KINDS, SIGN_WORDS
from florence2_demo.scene import MAX_OBJECTS, Scene, make_scene

FIRST_TRAINING_SEED = 1_000_000
IGNORED = -100
"""A target where nothing is to be learned."""
_SAMPLES_PER_CELL = 9


class GridTargets(NamedTuple):
    """What lies under each visual token of an image, as ``G`` cells row by row.

    ``objectness`` [G] float32 is 1 where an object covers the cell's centre; ``kind`` and
    ``colour`` [G] int64 index KINDS and COLOURS, -1 for none; ``boxes_xyxy`` [G, 4] float32 is
    that object's box in fractions (zeros for none); ``words`` [G] int64 indexes SIGN_WORDS where
    a text line's quad covers the cell's centre, -1 elsewhere. In a batch [B, G].
    """

    objectness: Tensor
    kind: Tensor
    colour: Tensor
    boxes_xyxy: Tensor
    words: Tensor


def grid_targets(scene: Scene, side: int) -> GridTargets:
    """The top-most object of every cell of a ``side`` x ``side`` raster of the image.

    An object that covers no cell's centre claims the cell that holds its box's centre.
    """
    owner = _covered_cells([thing.outline_xy for thing in scene.objects], side)
    for index, thing in enumerate(scene.objects):
        if not (owner == index).any():
            x, y = thing.centre_xy
            owner[min(int(y * side), side - 1), min(int(x * side), side - 1)] = index
    # The last element is that of a cell without an object, whose index is -1.
    kinds = np.array([KINDS.index(thing.kind) for thing in scene.objects] + [-1])
    colours = np.array([COLOURS.index(thing.colour) for thing in scene.objects] + [-1])
    boxes = np.array([thing.box_xyxy for thing in scene.objects] + [(0.0,) * 4], np.float32)
    words = np.array([SIGN_WORDS.index(line.text) for line in scene.texts] + [-1])
    line = _covered_cells([line.quad_xy for line in scene.texts], side)
    grids = (
        (owner >= 0).astype(np.float32),
        kinds[owner],
        colours[owner],
        boxes[owner],
        words[line],
    )
    return GridTargets(*(torch.from_numpy(grid).flatten(0, 1) for grid in grids))


def _covered_cells(polygons: list[PointsXy], side: int) -> NDArray[np.int64]:
    """The index of the last polygon over each cell's centre [side, side], -1 for none."""
    raster = np.zeros((side * _SAMPLES_PER_CELL,) * 2, np.uint8)
    for number, polygon in enumerate(polygons, start=1):
        fill_polygon(raster, np.array(polygon) * raster.shape, number)
    half = _SAMPLES_PER_CELL // 2
    return raster[half::_SAMPLES_PER_CELL, half::_SAMPLES_PER_CELL].astype(np.int64) - 1


@dataclass(frozen=True, slots=True)
class Batch:
    """``B`` images with ``K`` prompts each; prompt ``i`` belongs to image ``i // K``.

    ``pixels`` [B, 3, S, S]; ``prompt_ids`` [B*K, T]; ``decoder_ids`` and ``targets`` [B*K, L],
    with targets of IGNORED where nothing is to be learned.
    """

    pixels: Tensor
    prompt_ids: Tensor
    decoder_ids: Tensor
    targets: Tensor
    grid: GridTargets

    def to(self, device: torch.device) -> Batch:
        """The batch with every tensor on ``device``."""
        tensors = (self.pixels, self.prompt_ids, self.decoder_ids, self.targets)
        pixels, prompts, decoder, targets = (tensor.to(device) for tensor in tensors)
        return Batch(
            pixels, prompts, decoder, targets, GridTargets(*(t.to(device) for t in self.grid))
        )


class SceneBatches(IterableDataset[Batch]):
    """An endless, reproducible stream: batch ``n`` is the same whenever it is made.

    ``images`` per batch with ``prompts`` each; the stream begins at batch ``first``. Scenes have
    one object at first, six from batch ``ramp`` on.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        processor: ImageProcessor,
        *,
        images: int,
        prompts: int,
        grid_side: int,
        ramp: int,
        first: int = 0,
    ) -> None:
        self.vocabulary = vocabulary
        self.processor = processor
        self.images = images
        self.prompts = prompts
        self.grid_side = grid_side
        self.ramp = ramp
        self.first = first

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        offset, stride = (info.id, info.num_workers) if info else (0, 1)
        number = self.first + offset
        while True:
            yield self.batch(number)
            number += stride

    def batch(self, number: int) -> Batch:
        """Batch ``number`` of the stream."""
        first = FIRST_TRAINING_SEED + number * self.images
        most = min(MAX_OBJECTS, 1 + (MAX_OBJECTS - 1) * number // max(self.ramp, 1))
        scenes = [make_scene(first + place, max_objects=most) for place in range(self.images)]
        prompts, answers = [], []
        for scene in scenes:
            rng = np.random.default_rng(scene.seed)
            for example in sample_examples(scene, rng, self.prompts):
                sentence = prompt_sentence(example)
                prompts.append([BOS_ID, *self.vocabulary.encode(sentence), EOS_ID])
                answers.append([BOS_ID, *self.vocabulary.encode(example.answer), EOS_ID])
        pixels = np.stack([self.processor.pixels(draw_scene(scene)) for scene in scenes])
        grids = [grid_targets(scene, self.grid_side) for scene in scenes]
        return Batch(
            pixels=torch.from_numpy(pixels),
            prompt_ids=_padded(prompts, PAD_ID),
            decoder_ids=_padded([[EOS_ID, *answer[:-1]] for answer in answers], PAD_ID),
            targets=_padded(answers, IGNORED),
            grid=GridTargets(*map(torch.stack, zip(*grids, strict=True))),
        )

    def stream(self, workers: int) -> Iterator[Batch]:
        """Batches in order, drawn in ``workers`` processes ahead of the trainer."""
        prefetch = 4 if workers else None
        return iter(
            DataLoader(self, batch_size=None, num_workers=workers, prefetch_factor=prefetch)
        )


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

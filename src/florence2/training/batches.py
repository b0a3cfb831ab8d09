"""Batches of drawn scenes for the trainer: pixels, prompts, answers and grid targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from florence2.pixels import ImageProcessor
from florence2.tokenizer import Vocabulary
from florence2.tokens import BOS_ID, EOS_ID, PAD_ID
from florence2.training.losses import IGNORED, GridTargets
from florence2_demo.drawing import draw_scene
from florence2_demo.examples import prompt_sentence, sample_examples
from florence2_demo.grid_targets import grid_targets
from florence2_demo.scene import Scene, make_scene

FIRST_TRAINING_SEED = 1_000_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What one batch is made of. ``max_objects`` grows as training goes on."""

    images_per_batch: int
    prompts_per_image: int
    grid_side: int


@dataclass(frozen=True, slots=True)
class Batch:
    """``B`` images with ``K`` prompts each; prompt ``i`` belongs to image ``i // K``.

    ``pixels`` [B, 3, S, S]; ``prompt_ids`` [B*K, T]; ``decoder_ids`` and ``targets`` [B*K, L],
    with targets of -100 where nothing is to be learned.
    """

    pixels: Tensor
    prompt_ids: Tensor
    decoder_ids: Tensor
    targets: Tensor
    grid: GridTargets


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def _grid(scenes: list[Scene], side: int) -> GridTargets:
    grids = [grid_targets(scene, side) for scene in scenes]
    names = [field.name for field in fields(GridTargets)]
    columns = {
        name: torch.from_numpy(np.stack([np.asarray(getattr(grid, name)) for grid in grids]))
        for name in names
    }
    flat = {name: column.flatten(1, 2) for name, column in columns.items()}
    return GridTargets(**flat)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on ``device``."""
    grid = {name: getattr(batch.grid, name).to(device) for name in GridTargets.__slots__}
    return Batch(
        pixels=batch.pixels.to(device),
        prompt_ids=batch.prompt_ids.to(device),
        decoder_ids=batch.decoder_ids.to(device),
        targets=batch.targets.to(device),
        grid=GridTargets(**grid),
    )


class SceneBatches(IterableDataset[Batch]):
    """An endless, reproducible stream: batch ``n`` is the same whenever it is made."""

    def __init__(
        self, vocabulary: Vocabulary, processor: ImageProcessor, plan: Plan, first: int, ramp: int
    ) -> None:
        self.vocabulary = vocabulary
        self.processor = processor
        self.plan = plan
        self.first = first
        self.ramp = ramp

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        offset, stride = (info.id, info.num_workers) if info else (0, 1)
        number = self.first + offset
        while True:
            yield self.batch(number)
            number += stride

    def max_objects(self, number: int) -> int:
        """One object at first, six from batch ``ramp`` on."""
        return min(6, 1 + 5 * number // max(self.ramp, 1))

    def batch(self, number: int) -> Batch:
        """Batch ``number`` of the stream."""
        count = self.plan.images_per_batch
        seeds = [FIRST_TRAINING_SEED + number * count + i for i in range(count)]
        scenes = [make_scene(seed, max_objects=self.max_objects(number)) for seed in seeds]
        prompts, answers = [], []
        for seed, scene in zip(seeds, scenes, strict=True):
            rng = np.random.default_rng(seed)
            for example in sample_examples(scene, rng, self.plan.prompts_per_image):
                sentence = prompt_sentence(example)
                prompts.append([BOS_ID, *self.vocabulary.encode(sentence), EOS_ID])
                answers.append([BOS_ID, *self.vocabulary.encode(example.answer), EOS_ID])
        pixels = np.stack([self.processor.pixels(draw_scene(scene)) for scene in scenes])
        return Batch(
            pixels=torch.from_numpy(pixels),
            prompt_ids=_padded(prompts, PAD_ID),
            decoder_ids=_padded([[EOS_ID, *answer[:-1]] for answer in answers], PAD_ID),
            targets=_padded(answers, IGNORED),
            grid=_grid(scenes, self.plan.grid_side),
        )


def stream(dataset: SceneBatches, workers: int) -> Iterator[Batch]:
    """Batches in order, drawn in ``workers`` processes ahead of the trainer."""
    loader = DataLoader(
        dataset, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    )
    return iter(loader)

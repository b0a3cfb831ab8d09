"""The images of a training in the order they are learned from, and their batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from florence2.checkpoint.checkpoint import Checkpoint
from florence2.finetune.augmentation import Augmentation
from florence2.finetune.plan import FineTuningPlan
from florence2.finetune.targets import (
    IMAGE_TEXTS,
    READING,
    Question,
    Vocabulary,
    questions_about,
    sampled_questions,
)
from florence2.images import open_image
from florence2.labeled.records import LabeledImage, LeftOut
from florence2.pixels import Scaled
from florence2.tasks import Task
from florence2.tokens import BOS_ID, EOS_ID, PAD_ID

IGNORED = -100
"""A label where nothing is to be learned."""


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """Rows of the position tables: the most tokens of a prompt, and of an answer."""

    prompt: int
    answer: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, num_visual_tokens: int) -> TokenLimits:
        """A prompt stands behind the visual tokens, and an answer by itself."""
        most = checkpoint.config.text.max_position_embeddings
        return cls(most - num_visual_tokens, most)


@dataclass(frozen=True, slots=True)
class Spelled:
    """A question in token ids: the prompt, and the answer with ``<s>`` and ``</s>``."""

    prompt_ids: list[int]
    answer_ids: list[int]

    @classmethod
    def of(cls, question: Question, checkpoint: Checkpoint) -> Spelled:
        """The ids; RequestError where the sentence spells a control token."""
        vocabulary = checkpoint.vocabulary
        answer = [BOS_ID, *vocabulary.encode(question.answer), EOS_ID]
        return cls(vocabulary.encode_prompt(question.sentence), answer)

    def fits(self, limits: TokenLimits) -> bool:
        """Whether the network has positions for it."""
        return len(self.prompt_ids) <= limits.prompt and len(self.answer_ids) <= limits.answer


def usable_images(
    images: Sequence[LabeledImage],
    tasks: Sequence[Task],
    vocabulary: Vocabulary,
    checkpoint: Checkpoint,
    limits: TokenLimits,
) -> tuple[list[LabeledImage], list[LeftOut]]:
    """The images with something to learn, and what is left out because it is too long."""
    usable, left_out = [], []
    for image in images:
        fitting = 0
        for question in questions_about(image, tasks, vocabulary):
            spelled = Spelled.of(question, checkpoint)
            if spelled.fits(limits):
                fitting += 1
                continue
            left_out.append(
                LeftOut(
                    image.name,
                    f"Its answer to {question.task or 'its prefix'} has {len(spelled.answer_ids)} "
                    f"tokens (the prompt {len(spelled.prompt_ids)}), and this checkpoint has "
                    f"positions for {limits.answer} ({limits.prompt}); it is not learned.",
                )
            )
        if fitting:
            usable.append(image)
    return usable, left_out


@dataclass(frozen=True, slots=True)
class Example:
    """An image at the network's size with questions about it; ``place`` is its number."""

    place: int
    scaled: Scaled | None
    questions: tuple[Spelled, ...]


class Examples(Dataset[Example]):
    """Every example of a training, in order: number ``n`` is the same whenever it is made.

    So a training that was interrupted sees what an uninterrupted one would have seen. Each image
    comes once before any comes again. ``reads_pixels`` is False for images whose features are kept.
    """

    def __init__(
        self,
        images: Sequence[LabeledImage],
        vocabulary: Vocabulary,
        checkpoint: Checkpoint,
        limits: TokenLimits,
        plan: FineTuningPlan,
    ) -> None:
        self.images = images
        self.vocabulary = vocabulary
        self.checkpoint = checkpoint
        self.limits = limits
        self.plan = plan
        self.tasks = plan.published_tasks()
        has_text = any(task.token in READING for task in self.tasks)
        caption_tags = [name for task in self.tasks for name in IMAGE_TEXTS.get(task.token, ())]
        self.augmentation = Augmentation(plan.augmentations, has_text, frozenset(caption_tags))
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return self.plan.steps * self.plan.batch

    def __getstate__(self) -> dict[str, Any]:
        # A worker's copy keeps an order of its own.
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> list[int]:
        rng = np.random.default_rng([self.plan.seed, 0x5EED, epoch])
        return [int(place) for place in rng.permutation(len(self.images))]

    def __getitem__(self, number: int) -> Example:
        epoch, at = divmod(number, len(self.images))
        place = self._order(epoch)[at]
        rng = np.random.default_rng([self.plan.seed, 0xDA7A, number])
        image = self.images[place]
        picture = open_image(image.path).image
        changed, labels = self.augmentation.apply(picture, image, rng)
        questions = self._questions(labels, rng)
        if not questions:
            # A crop has cut away all that was asked about.
            changed, questions = picture, self._questions(image, rng)
        scaled = self.checkpoint.image_processor.resize(changed)
        return Example(place, scaled, questions)

    def _questions(self, image: LabeledImage, rng: np.random.Generator) -> tuple[Spelled, ...]:
        asked = sampled_questions(image, self.tasks, self.vocabulary, rng, self.plan.prompts)
        spelled = (Spelled.of(question, self.checkpoint) for question in asked)
        return tuple(one for one in spelled if one.fits(self.limits))


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """One batch: B images with Q questions in all, those with the shortest answers first.

    ``scaled`` [B, H, W, 3] uint8 and ``places`` [B] of the images; ``image_of`` [Q] says which of
    the B each question is about; ``prompt_ids`` [Q, T]; ``labels`` [Q, L], IGNORED where padded.
    """
    ordered = sorted(examples, key=lambda one: max(len(q.answer_ids) for q in one.questions))
    asked = [(at, one) for at, example in enumerate(ordered) for one in example.questions]
    pictures = [example.scaled for example in ordered if example.scaled is not None]
    return {
        "scaled": torch.from_numpy(np.stack(pictures)),
        "places": torch.tensor([example.place for example in ordered]),
        "image_of": torch.tensor([at for at, _ in asked]),
        "prompt_ids": padded([one.prompt_ids for _, one in asked], PAD_ID),
        "labels": padded([one.answer_ids for _, one in asked], IGNORED),
    }


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """[N, longest] with ``fill`` behind the shorter rows."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def part_of(batch: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """Images ``first`` to before ``last`` of a batch with their questions, padded no further."""
    rows = (batch["image_of"] >= first) & (batch["image_of"] < last)
    prompts, labels = batch["prompt_ids"][rows], batch["labels"][rows]
    return {
        "scaled": batch["scaled"][first:last],
        "places": batch["places"][first:last],
        "image_of": batch["image_of"][rows] - first,
        "prompt_ids": prompts[:, : int((prompts != PAD_ID).sum(1).max())],
        "labels": labels[:, : int((labels != IGNORED).sum(1).max())],
    }

"""Encode once, ask many: images to features through a cache, prompts to answers in batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from florence2.beams import NotFiniteError
from florence2.cache import EncodedImage, FeatureCache
from florence2.checkpoint import Checkpoint
from florence2.errors import CheckpointError, FlorenceError, RequestError
from florence2.generate import generate
from florence2.images import LoadedImage, open_image
from florence2.memory import run_halving
from florence2.nearby import Nearby
from florence2.parsing import parse
from florence2.processing import check_prompt_length, prompt_sentence
from florence2.records import Answer, GenerationSettings, Region, Result, Timings
from florence2.runtimes.base import Runtime
from florence2.scoring import NEAR_BINS
from florence2.tasks import Task, find_task


@dataclass(frozen=True, slots=True)
class Prompt:
    """One validated prompt for one encoded image, ready to be decoded."""

    task: Task
    image: EncodedImage
    prompt_ids: tuple[int, ...]
    settings: GenerationSettings
    max_new_tokens: int


class Engine:
    """One checkpoint on one runtime. Calls from several threads wait for each other."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        runtime: Runtime,
        *,
        image_batch: int,
        prompt_batch: int,
        cache_bytes: int,
    ) -> None:
        self.checkpoint = checkpoint
        self.runtime = runtime
        self.cache = FeatureCache(cache_bytes)
        self.image_batch = image_batch
        self.prompt_batch = prompt_batch
        self._lock = threading.Lock()
        self._nearby = Nearby(checkpoint.vocabulary.first_location_id, NEAR_BINS)
        revision = checkpoint.revision or "local"
        self._key_prefix = f"{checkpoint.name}@{revision} {runtime.name} {runtime.precision}"

    @property
    def max_positions(self) -> int:
        """Rows of the text network's position table: the longest input and the longest answer."""
        return self.checkpoint.config.text.max_position_embeddings

    def encode(self, images: Sequence[LoadedImage]) -> list[EncodedImage | FlorenceError]:
        """The images' visual tokens, in order; each content is run through the tower once."""
        keys = [f"{self._key_prefix}:{image.content_hash}" for image in images]
        found: dict[str, EncodedImage | FlorenceError] = {}
        missing: dict[str, LoadedImage] = {}
        for key, image in zip(keys, images, strict=True):
            cached = self.cache.get(key)
            if cached is not None:
                found[key] = cached
            else:
                missing[key] = image
        names = list(missing)
        for start in range(0, len(names), self.image_batch):
            chunk = names[start : start + self.image_batch]
            encoded = run_halving(
                chunk, lambda part: self._encode_chunk(part, missing), self.runtime
            )
            found |= dict(zip(chunk, encoded, strict=True))
        return [found[key] for key in keys]

    def _encode_chunk(
        self, keys: Sequence[str], images: dict[str, LoadedImage]
    ) -> list[EncodedImage]:
        processor = self.checkpoint.image_processor
        pixels = np.stack([processor.pixels(images[key].image) for key in keys])
        with self._lock:
            began = time.perf_counter()
            features = self.runtime.encode_images(pixels)
            spent = time.perf_counter() - began
        encoded = []
        for key, row in zip(keys, features, strict=True):
            # A row of a batch keeps the whole batch alive; the cache counts one image's bytes.
            own = row.clone() if len(keys) > 1 else row
            kept = EncodedImage(own, images[key].size_wh, key)
            self.cache.put(kept)
            encoded.append(replace(kept, vision_s=spent))
        return encoded

    def check_image(self, image: EncodedImage) -> None:
        """RequestError for features of another checkpoint, which mean nothing here."""
        if not image.key.startswith(f"{self._key_prefix}:"):
            raise RequestError(
                f"An encoded image belongs to the checkpoint that encoded it, and this one is not "
                f"of {self.checkpoint.name}; encode the image again."
            )

    def prepare(
        self,
        task: Task,
        image: EncodedImage,
        text: str | None,
        region: Region | None,
        settings: GenerationSettings,
    ) -> Prompt:
        """Validates one request against the task table; RequestError says what is wrong."""
        sentence = prompt_sentence(task, text, region, image.size_wh)
        ids = tuple(self.checkpoint.vocabulary.encode_prompt(sentence))
        check_prompt_length(len(ids), self.max_positions - image.features.shape[0])
        asked = settings.max_new_tokens
        if asked is not None and asked > self.max_positions:
            raise RequestError(
                f"max_new_tokens can be at most {self.max_positions} for {self.checkpoint.name}, "
                f"and {asked} was received; ask for fewer."
            )
        limit = asked or min(task.max_new_tokens, self.max_positions)
        return Prompt(task, image, ids, settings, limit)

    def answer(self, prompts: Sequence[Prompt]) -> list[Result | FlorenceError]:
        """One result per prompt, in order. Prompts with the same search settings share batches."""
        results: list[Result | FlorenceError | None] = [None] * len(prompts)
        groups: dict[GenerationSettings, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(prompt.settings, []).append(place)
        for places in groups.values():
            # Neighbours of one task finish at about the same length, which wastes fewest steps.
            places.sort(
                key=lambda place: (prompts[place].max_new_tokens, prompts[place].task.token)
            )
            for start in range(0, len(places), self.prompt_batch):
                chunk = places[start : start + self.prompt_batch]
                answers = run_halving(
                    chunk,
                    lambda part: self._answer_chunk([prompts[place] for place in part]),
                    self.runtime,
                )
                for place, answer in zip(chunk, answers, strict=True):
                    results[place] = answer
        return [result for result in results if result is not None]

    def _answer_chunk(self, prompts: Sequence[Prompt]) -> list[Result | FlorenceError]:
        settings = prompts[0].settings
        limits = [prompt.max_new_tokens for prompt in prompts]
        with self._lock, torch.inference_mode():
            began = time.perf_counter()
            session = self.runtime.start(
                [prompt.image.features for prompt in prompts],
                [prompt.prompt_ids for prompt in prompts],
                settings.num_beams,
                max(limits),
            )
            started = time.perf_counter()
            answers = generate(session, len(prompts), settings, limits, nearby=self._nearby)
        timings = Timings(prompt=started - began, decode=time.perf_counter() - started)
        return [
            self._result(prompt, answer, timings) if isinstance(answer, Answer) else answer
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _result(self, prompt: Prompt, answer: Answer, timings: Timings) -> Result:
        vocabulary = self.checkpoint.vocabulary
        pieces = vocabulary.pieces(answer.token_ids, answer.log_probs, answer.near_log_probs)
        parsed = parse(pieces, prompt.task, prompt.image.size_wh)
        notes = parsed.notes
        if answer.truncated:
            notes = (*notes, f"the answer was cut at {prompt.max_new_tokens} tokens")
        return Result(
            task=prompt.task.token,
            size_wh=prompt.image.size_wh,
            objects=parsed.objects,
            text=parsed.text,
            answer=vocabulary.answer_text(answer.token_ids),
            token_ids=answer.token_ids,
            truncated=answer.truncated,
            notes=notes,
            log_probs=answer.log_probs,
            near_log_probs=answer.near_log_probs,
            timings_s=replace(timings, vision=prompt.image.vision_s),
        )

    def self_test(self) -> None:
        """One short generation; CheckpointError when the checkpoint cannot really answer.

        Catches weights that load and yet are useless: NaN, nothing at all, or ``<s>`` for ever.
        """
        gradient = np.linspace(0, 255, 64, dtype=np.uint8)
        picture = np.stack(np.broadcast_arrays(gradient[:, None], gradient[None], np.uint8(96)), 2)
        encoded = self.encode([open_image(picture)])[0]
        if isinstance(encoded, FlorenceError):
            raise encoded
        if not bool(torch.isfinite(encoded.features).all()):
            raise self._useless("its visual features are not finite numbers")
        settings = replace(self.checkpoint.generation, num_beams=1, max_new_tokens=8)
        prompt = self.prepare(find_task("<CAPTION>"), encoded, None, None, settings)
        result = self.answer([prompt])[0]
        if isinstance(result, NotFiniteError):
            raise self._useless("its answer to <CAPTION> is not made of finite numbers")
        if isinstance(result, FlorenceError):
            raise result
        if not result.token_ids:
            raise self._useless("its answer to <CAPTION> is empty")

    def _useless(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"Checkpoint {self.checkpoint.name} loads but does not answer: {why}; "
            "download it again or use another precision."
        )

"""Encode once, ask many: images to features through a cache, prompts to answers in batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from florence2.cache import EncodedImage, FeatureCache
from florence2.checkpoint import Checkpoint
from florence2.chunks import run_in_chunks
from florence2.errors import CheckpointError, FlorenceError, RequestError
from florence2.generate import generate
from florence2.images import LoadedImage
from florence2.nearby import Nearby
from florence2.parsing import parse
from florence2.processing import check_prompt_length, prompt_sentence
from florence2.records import Answer, GenerationSettings, Region, Result, Timings
from florence2.runtimes.base import Runtime
from florence2.scoring import NEAR_BINS
from florence2.stopping import BetweenPasses, Stop, stop_of_all, watch_over
from florence2.tasks import Task


@dataclass(frozen=True, slots=True)
class Prompt:
    """One validated prompt for one encoded image, ready to be decoded."""

    task: Task
    image: EncodedImage
    prompt_ids: tuple[int, ...]
    settings: GenerationSettings
    max_new_tokens: int
    stop: Stop | None = None


class Engine:
    """One checkpoint on one runtime. Calls from several threads wait for each other.

    ``between_passes`` of ``encode`` and ``answer`` is called before every pass of the network and
    every image to scale, on the calling thread, and may call the same methods: an answer in
    between has a session of its own. Whatever it raises comes through.
    """

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
        self._lock = threading.RLock()
        self._is_parked = False
        self._is_closed = False
        self._nearby = Nearby(checkpoint.vocabulary.first_location_id, NEAR_BINS)
        # Two folders may have one name, and features of one device mean nothing on another.
        where = f"{runtime.name} {runtime.device} {runtime.precision}"
        self._key_prefix = f"{checkpoint.folder}@{checkpoint.revision} {where}"

    @property
    def max_positions(self) -> int:
        """Rows of the text network's position table: the longest input and the longest answer."""
        return self.checkpoint.config.text.max_position_embeddings

    def encode(
        self,
        images: Sequence[LoadedImage],
        stops: Sequence[Stop | None] | None = None,
        between_passes: BetweenPasses | None = None,
    ) -> list[EncodedImage | FlorenceError]:
        """The images' visual tokens, in order; each content is run through the tower once.

        ``stops`` has one Stop per image; an image given up has the reason in its place.
        """
        keys = [f"{self._key_prefix}:{image.content_hash}" for image in images]
        found: dict[str, EncodedImage | FlorenceError] = {}
        missing: dict[str, LoadedImage] = {}
        waiting: dict[str, list[Stop | None]] = {}
        for key, image, stop in zip(keys, images, stops or [None] * len(keys), strict=True):
            cached = self.cache.get(key)
            if cached is not None:
                found[key] = cached
            else:
                missing[key] = image
                waiting.setdefault(key, []).append(stop)
        found |= run_in_chunks(
            {key: stop_of_all(waiting[key]) for key in missing},
            self.image_batch,
            lambda chunk: self._encode_chunk(chunk, missing, between_passes),
            self.runtime,
            between_passes,
        )
        return [found[key] for key in keys]

    def _encode_chunk(
        self,
        keys: Sequence[str],
        images: dict[str, LoadedImage],
        between_passes: BetweenPasses | None,
    ) -> list[EncodedImage]:
        scaled = []
        for key in keys:
            scaled.append(self.checkpoint.image_processor.pixels(images[key].image))
            if between_passes is not None:
                between_passes()
        pixels = np.stack(scaled)
        with self._lock:
            self._wake()
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
        """RequestError for features of another checkpoint or device, which mean nothing here."""
        if not image.key.startswith(f"{self._key_prefix}:"):
            raise RequestError(
                f"An encoded image belongs to the checkpoint and device that encoded it, and this "
                f"one is not of {self.checkpoint.name} on {self.runtime.device}; encode the image "
                "again."
            )

    def prepare(
        self,
        task: Task,
        image: EncodedImage,
        text: str | None,
        region: Region | None,
        settings: GenerationSettings,
        stop: Stop | None = None,
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
        return Prompt(task, image, ids, settings, limit, stop)

    def answer(
        self, prompts: Sequence[Prompt], between_passes: BetweenPasses | None = None
    ) -> list[Result | FlorenceError]:
        """One result per prompt, in order. Prompts with the same search settings share batches.

        A prompt given up by its own ``stop`` leaves its batch and has the reason in its place.
        """
        results: dict[int, Result | FlorenceError] = {}
        groups: dict[GenerationSettings, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(prompt.settings, []).append(place)
        for places in groups.values():
            # Neighbours of one task finish at about the same length, which wastes fewest steps.
            places.sort(
                key=lambda place: (prompts[place].max_new_tokens, prompts[place].task.token)
            )
            results |= run_in_chunks(
                {place: prompts[place].stop for place in places},
                self.prompt_batch,
                lambda part: self._answer_chunk([prompts[place] for place in part], between_passes),
                self.runtime,
                between_passes,
            )
        return [results[place] for place in range(len(prompts))]

    def _answer_chunk(
        self, prompts: Sequence[Prompt], between_passes: BetweenPasses | None
    ) -> list[Result | FlorenceError]:
        settings = prompts[0].settings
        limits = [prompt.max_new_tokens for prompt in prompts]
        watch = watch_over([prompt.stop for prompt in prompts], between_passes)
        with self._lock, torch.inference_mode():
            self._wake()
            began = time.perf_counter()
            session = self.runtime.start(
                [prompt.image.features for prompt in prompts],
                [prompt.prompt_ids for prompt in prompts],
                settings.num_beams,
                max(limits),
            )
            started = time.perf_counter()
            answers = generate(
                session, len(prompts), settings, limits, before_pass=watch, nearby=self._nearby
            )
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

    @property
    def memory_bytes(self) -> int:
        """Memory the weights and the cached features take on the device now."""
        return self.runtime.weight_bytes + self.cache.num_bytes

    @property
    def is_parked(self) -> bool:
        """Whether the weights wait in the computer's memory, see ``park``."""
        return self._is_parked

    def park(self) -> None:
        """Frees the device's memory; the weights wait in the computer's. Parking twice is once.

        The next image or prompt brings them back by itself, ``resume`` ahead of it.
        """
        with self._lock:
            if not (self._is_parked or self._is_closed):
                self.cache.clear()
                # First: weights that were moved only in part are all brought back.
                self._is_parked = True
                self.runtime.park()

    def resume(self) -> None:
        """Brings parked weights back to the device; CheckpointError once closed."""
        with self._lock:
            self._wake()

    def close(self) -> None:
        """Gives the weights up for good, once the batch in hand is answered."""
        with self._lock:
            self._is_closed = True
            self.cache.clear()
            self.runtime.close()

    def _wake(self) -> None:
        if self._is_closed:
            raise CheckpointError(
                f"A checkpoint that was closed answers nothing more, and {self.checkpoint.name} "
                "was; load it again."
            )
        if self._is_parked:
            self.runtime.resume()
            self._is_parked = False

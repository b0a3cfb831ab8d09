"""Encode once, ask many: images to features through a cache, prompts to answers in batches."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from florence2.checkpoint.checkpoint import Checkpoint
from florence2.encoding import Coming, encode_images
from florence2.engine.feature_cache import EncodedImage, FeatureCache
from florence2.engine.prefetch import AnySource, Preparer
from florence2.errors import CheckpointError, DeviceLostError, FlorenceError, RequestError
from florence2.memory import BatchLimit
from florence2.nearby import Nearby
from florence2.postprocess import parse
from florence2.prompt_search import Prompt, PromptFeed, PromptList, PromptSearch
from florence2.prompts import check_prompt_length, prompt_sentence
from florence2.records import Answer, GenerationSettings, Region, Result
from florence2.runtimes.base import Runtime
from florence2.scoring import NEAR_BINS
from florence2.stopping import BetweenPasses, Stop
from florence2.tasks import Task

logger = logging.getLogger(__name__)


__all__ = ["Engine", "Prompt"]


class Engine:
    """One checkpoint on one runtime. Calls from several threads wait for each other.

    ``between_passes`` of ``encode`` and ``answer`` is called before every pass of the network and
    every image to scale, on the calling thread, and may call the same methods: an answer in
    between has a session of its own. Whatever it raises comes through.

    An error after which the device answers nothing more is a DeviceLostError, then and for every
    later call.
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
        self.preparer = Preparer(checkpoint.image_processor)
        self.image_limit: Final = BatchLimit(image_batch)
        self.prompt_limit: Final = BatchLimit(prompt_batch)
        # How long the image of the self-test took, from its pixels to a short caption.
        self.self_test_s = 0.0
        self._lock = threading.RLock()
        self._is_parked = False
        self._is_closed = False
        self._loss: str | None = None
        self.nearby: Final = Nearby(checkpoint.vocabulary.first_location_id, NEAR_BINS)
        # Two folders may have one name, and features of one device mean nothing on another.
        where = f"{runtime.name} {runtime.device} {runtime.precision}"
        self._key_prefix = f"{checkpoint.folder}@{checkpoint.revision} {where}"

    @property
    def image_batch(self) -> int:
        """The most images of one pass through the vision tower."""
        return self.image_limit.most

    @image_batch.setter
    def image_batch(self, most: int) -> None:
        self.image_limit.most = most

    @property
    def prompt_batch(self) -> int:
        """The most prompts that are decoded together."""
        return self.prompt_limit.most

    @prompt_batch.setter
    def prompt_batch(self, most: int) -> None:
        self.prompt_limit.most = most

    @property
    def is_lost(self) -> bool:
        """Whether the device failed for good, so that nothing is answered any more."""
        return self._loss is not None

    @property
    def max_positions(self) -> int:
        """Rows of the text network's position table: the longest input and the longest answer."""
        return self.checkpoint.config.text.max_position_embeddings

    def encode(
        self,
        images: Sequence[AnySource],
        stops: Sequence[Stop | None] | None = None,
        between_passes: BetweenPasses | None = None,
        coming: Coming | None = None,
    ) -> list[EncodedImage | FlorenceError]:
        """The images' visual tokens, in order; each content is run through the tower once.

        The next images, and then those that are ``coming``, are opened and scaled while the tower
        runs. ``stops`` has one Stop per image; an image given up, or that cannot be opened, has
        the reason in its place.
        """
        listed = [None] * len(images) if stops is None else stops
        return encode_images(self, images, listed, between_passes, coming)

    def image_key(self, content_hash: str) -> str:
        """The name under which an image's features are cached."""
        return f"{self._key_prefix}:{content_hash}"

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
        # Every prompt has a limit of its own, so those of different limits can share a batch.
        return Prompt(task, image, ids, replace(settings, max_new_tokens=None), limit, stop)

    def answer(
        self, prompts: Sequence[Prompt], between_passes: BetweenPasses | None = None
    ) -> list[Result | FlorenceError]:
        """One result per prompt, in order. Prompts with the same search settings share batches.

        A prompt given up by its own ``stop`` leaves its batch and has the reason in its place.
        """
        listed = PromptList(prompts)
        self.answer_feed(listed, between_passes)
        return listed.outcomes()

    def answer_feed(self, feed: PromptFeed, between_passes: BetweenPasses | None = None) -> None:
        """Answers the prompts of ``feed`` until it has no more; each is settled once known.

        A row of the batch whose answer is complete is given to the feed's next prompt.
        """
        while (settings := feed.next_settings()) is not None:
            with self.in_use():
                PromptSearch(self, feed, settings, between_passes).run()

    def result(self, prompt: Prompt, answer: Answer) -> Result:
        """What an answer says about the prompt's image."""
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
        )

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Holds the engine for one caller, its weights on the device.

        DeviceLostError if the device failed for good, before or meanwhile.
        """
        with self._held():
            self._wake()
            with self.runtime.computing():
                yield

    @contextmanager
    def _held(self) -> Iterator[None]:
        with self._lock:
            if self._loss is not None:
                raise DeviceLostError(self._loss)
            try:
                yield
            except RuntimeError as error:
                if not self.runtime.is_lost(error):
                    raise
                self._loss = _loss(self.runtime.device, error)
                logger.exception("%s", self._loss)
                raise DeviceLostError(self._loss) from error

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
        with self._held():
            if not (self._is_parked or self._is_closed):
                self.cache.clear()
                # First: weights that were moved only in part are all brought back.
                self._is_parked = True
                self.runtime.park()

    def resume(self) -> None:
        """Brings parked weights back to the device; CheckpointError once closed."""
        with self._held():
            self._wake()

    def close(self) -> None:
        """Gives the weights up for good, once the batch in hand is answered."""
        with self._lock:
            self._is_closed = True
            self.cache.clear()
            self.preparer.close()
            try:
                self.runtime.close()
            except RuntimeError as error:
                if not self.runtime.is_lost(error):
                    raise
                logger.warning(
                    "The memory of %s could not be freed: %s", self.runtime.device, error
                )

    def _wake(self) -> None:
        if self._is_closed:
            raise CheckpointError(
                f"A checkpoint that was closed answers nothing more, and {self.checkpoint.name} "
                "was; load it again."
            )
        if self._is_parked:
            self.runtime.resume()
            self._is_parked = False


def _loss(device: str, error: RuntimeError) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return (
        f"The device {device} failed and answers nothing more to this program ({reason[:200]}); "
        "send the request again once the model is loaded again, or restart the program."
    )

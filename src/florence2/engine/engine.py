"""Encode once, ask many: images to features through a cache, prompts to answers in batches."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeVar

import numpy as np

from florence2.checkpoint.checkpoint import Checkpoint
from florence2.engine.ask import AnyImage
from florence2.engine.feature_cache import EncodedImage, FeatureCache
from florence2.engine.prefetch import AnySource, Preparer
from florence2.errors import (
    CheckpointError,
    DeviceLostError,
    FlorenceError,
    OutOfMemoryError,
    RequestError,
)
from florence2.generation.beam_search import Nearby
from florence2.generation.decode import DecodeLoop, Session, Started
from florence2.generation.settings import check_settings
from florence2.images import identity
from florence2.pixels import PreparedImage
from florence2.postprocess import NEAR_BINS, parse
from florence2.prompts import check_prompt_length, prompt_sentence
from florence2.records import Answer, GenerationSettings, Region, Result, Timings
from florence2.runtimes.base import Runtime
from florence2.runtimes.memory import BatchLimit, out_of_memory, run_halving
from florence2.stopping import BetweenPasses, Stop, stop_of_all, watch_over
from florence2.tasks import Task

__all__ = ["Engine", "Prompt"]

logger = logging.getLogger(__name__)


Item = TypeVar("Item", bound=Hashable)
Done = TypeVar("Done")


def run_in_chunks(
    stops: Mapping[Item, Stop | None],
    size: Callable[[], int],
    run: Callable[[Sequence[Item]], Sequence[Done]],
    between_passes: BetweenPasses | None,
) -> dict[Item, Done | FlorenceError]:
    """What ``run`` gives for each item, or why the item was given up.

    ``stops`` has every item in order, with its Stop; both it and ``between_passes`` are called
    before every chunk, and ``size`` says how large that is.
    """
    done: dict[Item, Done | FlorenceError] = {}
    left = list(stops)
    while left:
        given_up = watch_over([stops[item] for item in left], between_passes)()
        done |= {left[place]: reason for place, reason in given_up.items()}
        left = [item for item in left if item not in done]
        most = size()
        chunk, left = left[:most], left[most:]
        if chunk:
            done |= zip(chunk, run(chunk), strict=True)
    return done


Encoded = EncodedImage | FlorenceError

Coming = Callable[[], Sequence[AnyImage]]
"""Says which images the calls after this one will bring, as far as is known."""


def encode_images(
    engine: Engine,
    images: Sequence[AnySource],
    stops: Sequence[Stop | None],
    between_passes: BetweenPasses | None,
    coming: Coming | None,
) -> list[Encoded]:
    """See ``Engine.encode``."""
    keys = [identity(image) for image in images]
    waiting: dict[object, list[Stop | None]] = {}
    for key, stop in zip(keys, stops, strict=True):
        waiting.setdefault(key, []).append(stop)
    chunks = _Chunks(engine, dict(zip(keys, images, strict=True)), between_passes, coming)
    try:
        found = run_in_chunks(
            {key: stop_of_all(listed) for key, listed in waiting.items()},
            lambda: engine.image_limit.pass_size(is_awaited=between_passes is not None),
            chunks.encode,
            between_passes,
        )
    finally:
        engine.preparer.ahead((), chunks)
    return [found[key] for key in keys]


class _Chunks:
    """One call's images; what it found stays found, also if the cache has no room for it."""

    def __init__(
        self,
        engine: Engine,
        sources: dict[object, AnySource],
        between_passes: BetweenPasses | None,
        coming: Coming | None,
    ) -> None:
        self._engine = engine
        self._sources = sources
        self._coming = coming
        self._between_passes = between_passes
        self._found: dict[str, EncodedImage] = {}
        self._left = dict(sources)

    def encode(self, keys: Sequence[object]) -> list[Encoded]:
        """The images of these keys: those not known yet in one pass of the tower."""
        outcomes: dict[object, str | FlorenceError] = {}
        missing: dict[str, PreparedImage] = {}
        # A list of this call's own: a click in between says what else comes, without these.
        self._engine.preparer.ahead(self._left.values(), self)
        for key in keys:
            outcomes[key] = self._look_up(self._sources[key], missing)
            self._left.pop(key, None)
            if self._between_passes is not None:
                self._between_passes()
        # What comes next is opened and scaled by other threads while the tower runs.
        coming = () if self._coming is None else self._coming()
        self._engine.preparer.ahead(self._left.values(), self)
        self._engine.preparer.ahead(coming)
        known = self._found | (self._run_tower(missing) if missing else {})
        return [
            outcome if isinstance(outcome, FlorenceError) else known[outcome]
            for outcome in outcomes.values()
        ]

    def _look_up(self, source: AnySource, missing: dict[str, PreparedImage]) -> str | FlorenceError:
        """The image's key, whose features are found or will be; or why it cannot be opened."""
        preparer = self._engine.preparer
        known = preparer.known_hash(source)
        if known is not None and self._is_found(key := self._engine.image_key(known)):
            return key
        try:
            prepared = preparer.take(source)
        except MemoryError:
            return OutOfMemoryError(
                "An image is opened in this computer's memory, and this one does not fit beside "
                "what is there; make it smaller, or send fewer at a time."
            )
        if isinstance(prepared, FlorenceError):
            return prepared
        key = self._engine.image_key(prepared.content_hash)
        if not self._is_found(key):
            missing[key] = prepared
        return key

    def _is_found(self, key: str) -> bool:
        if key not in self._found:
            cached = self._engine.cache.get(key)
            if cached is None:
                return False
            self._found[key] = cached
        return True

    def _run_tower(self, missing: dict[str, PreparedImage]) -> dict[str, Encoded]:
        """What comes of these images; one that does not fit into memory alone has an error."""
        engine, limit = self._engine, self._engine.image_limit
        encoded: list[Encoded] = []
        left = list(missing.items())
        while left:
            with engine.in_use():
                if self._is_awaited:
                    # Here, as until now the images of this pass were made ready beside it.
                    limit.catch_up()
                size = limit.pass_size(is_awaited=self._is_awaited)
                part, left = left[:size], left[size:]
                encoded += run_halving(part, self._pass, engine.runtime, limit)
            if left and self._between_passes is not None:
                self._between_passes()
        return dict(zip(missing, encoded, strict=True))

    @property
    def _is_awaited(self) -> bool:
        """Whether someone may wait for the end of a pass: who is then answered between two."""
        return self._between_passes is not None

    def _pass(self, part: Sequence[tuple[str, PreparedImage]]) -> list[EncodedImage]:
        """One pass of the tower. Nothing that a caller gave is called in it."""
        runtime, table = self._engine.runtime, self._engine.checkpoint.image_processor.lookup_table
        images = np.stack([image.scaled for _, image in part])
        began, start = time.perf_counter(), runtime.mark()
        features = runtime.encode_bytes(images, table)
        spent = time.perf_counter() - began
        self._engine.image_limit.begun(len(part), start, runtime.mark())
        encoded: list[EncodedImage] = []
        for (key, image), row in zip(part, features, strict=True):
            # A row of a batch keeps the whole batch alive; the cache counts one image's bytes.
            own = row.clone() if len(part) > 1 else row
            kept = EncodedImage(own, image.size_wh, key)
            self._engine.cache.put(kept)
            self._found[key] = replace(kept, vision_s=spent)
            encoded.append(self._found[key])
        return encoded


_COMPANY: Final = 4
"""On a GPU prompts join a running batch once a fourth of its rows is free, so several at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One validated prompt for one encoded image, ready to be decoded."""

    task: Task
    image: EncodedImage
    prompt_ids: tuple[int, ...]
    settings: GenerationSettings
    max_new_tokens: int
    stop: Stop | None = None


class PromptFeed(Protocol):
    """Where the engine takes prompts from, and where their results go."""

    def next_settings(self) -> GenerationSettings | None:
        """The search settings of the prompts whose turn it is; None when there are no more."""

    def take(self, room: int, settings: GenerationSettings) -> Sequence[Prompt]:
        """Up to ``room`` prompts with these settings; none when others' turn has come."""

    def settle(self, prompt: Prompt, outcome: Result | FlorenceError) -> None:
        """Takes a prompt's result, or why it has none. Called once for every prompt taken."""


class PromptSearch:
    """Answers a feed's prompts of one kind of settings until it gives no more of them.

    Running out of memory starts over, with half as many prompts at a time, what was under way;
    one that does not fit alone fails alone. The engine's limit is lowered to what fitted then,
    unless there was one that did not fit alone: the others may have been short of its memory only.
    A search between two passes of another one lowers nothing: it was short of that one's memory.
    What the feed, a ``Stop`` or ``between_passes`` raises comes through, lack of memory included.
    """

    def __init__(
        self,
        engine: Engine,
        feed: PromptFeed,
        settings: GenerationSettings,
        between_passes: BetweenPasses | None,
    ) -> None:
        check_settings(settings)
        self._engine = engine
        self._feed = feed
        self._settings = settings
        self._between_passes = between_passes
        self._limit = engine.prompt_limit
        self._is_within = self._limit.num_searches > 0
        self._room = self._limit.now
        self._is_retry = False
        self._has_misfit = False
        self._num_settled = 0
        self._is_full = False
        self._held: int | None = None
        self._callers_error: Exception | None = None
        self._in_hand: dict[Prompt, tuple[float, float]] = {}
        self._again: list[Prompt] = []
        self._is_crowded = False

    def run(self) -> None:
        """Returns once every prompt taken is settled."""
        self._limit.num_searches += 1
        try:
            while not self._runs_to_its_end():
                # Outside any handler: a traceback would keep the failed batch's tensors alive.
                self._engine.runtime.free_memory()
                self._start_over()
        finally:
            self._limit.num_searches -= 1
        if self._is_retry and not self._has_misfit:
            self._lower(self._room)

    def _runs_to_its_end(self) -> bool:
        runtime = self._engine.runtime
        loop = DecodeLoop(
            self,
            self._settings,
            runtime.space(self._settings, self._engine.nearby),
            max_rows=self._room,
            least_room=self._least_room(),
            nearby=self._engine.nearby,
        )
        try:
            loop.run()
        except (RuntimeError, MemoryError) as error:
            is_ours = error is not self._callers_error and bool(self._in_hand)
            if not is_ours or not runtime.is_out_of_memory(error):
                raise
            logger.warning(
                "%d prompt(s) did not fit into the memory of %s", len(self._in_hand), runtime.device
            )
            return False
        return True

    def _lower(self, size: int) -> None:
        if not self._is_within:
            self._limit.lower(size)

    @contextmanager
    def _callers(self) -> Iterator[None]:
        """Within it the callers' code runs, whose errors are not the device's."""
        try:
            yield
        except Exception as error:
            self._callers_error = error
            raise

    def _least_room(self) -> int:
        """Free rows that are worth a pass of the tower and the encoder beside a running batch."""
        company = max(1, self._room // _COMPANY)
        # A CPU gains from company only as far as a batch of images is faster than one by one.
        is_gpu = not self._engine.runtime.device.startswith("cpu")
        return company if is_gpu else max(1, min(company, self._engine.image_batch // 2))

    def _start_over(self) -> None:
        self._held = None
        if len(self._in_hand) == 1:
            [alone] = self._in_hand
            self._has_misfit = True
            self.settle(alone, out_of_memory(self._engine.runtime.device))
            return
        self._again = [*self._in_hand, *self._again]
        self._room = self._limit.smaller(len(self._in_hand))
        self._is_retry = True
        self._in_hand.clear()

    def given_up(self) -> Mapping[Prompt, FlorenceError]:
        """The prompts in hand that nobody waits for any longer."""
        with self._callers():
            if self._between_passes is not None:
                self._between_passes()
            reasons = {prompt: _reason(prompt) for prompt in self._in_hand}
        return {prompt: reason for prompt, reason in reasons.items() if reason is not None}

    def start(self, room: int) -> Started[Prompt] | None:
        """A session with the next prompts of the feed."""
        self._is_crowded = self._is_crowded and bool(self._in_hand)
        prompts = [] if self._is_crowded else self._next(min(room, self._pass_size()))
        if not prompts:
            return None
        began = time.perf_counter()
        limits = [prompt.max_new_tokens for prompt in prompts]
        session = self._session_of(prompts, max(limits))
        if session is None:
            # Beside those in hand there is no room: once they are done there may be.
            self._engine.runtime.free_memory()
            self._again = prompts + self._again
            self._is_crowded = True
            together = len(self._in_hand) + len(prompts)
            self._held = max(len(self._in_hand), self._limit.smaller(together))
            return None
        if self._held is not None:
            # By themselves they fit, so it was their number.
            self._lower(self._held)
            self._held = None
        now = time.perf_counter()
        self._in_hand |= dict.fromkeys(prompts, (now - began, now))
        self._is_full = self._is_full or len(self._in_hand) >= self._room
        return Started(prompts, session, limits)

    def _pass_size(self) -> int:
        """Prompts that may be encoded at a time, however many rows are free."""
        is_awaited = self._between_passes is not None
        if is_awaited:
            self._limit.catch_up()
        return self._limit.pass_size(is_awaited=is_awaited)

    def _session_of(self, prompts: list[Prompt], max_new_tokens: int) -> Session | None:
        runtime, is_alone = self._engine.runtime, not self._in_hand
        if is_alone:
            self._in_hand |= dict.fromkeys(prompts, (0.0, 0.0))
        try:
            start = runtime.mark()
            session = runtime.start(
                [prompt.image.features for prompt in prompts],
                [prompt.prompt_ids for prompt in prompts],
                self._settings.num_beams,
                max_new_tokens,
            )
            self._limit.begun(len(prompts), start, runtime.mark())
            return session
        except (RuntimeError, MemoryError) as error:
            if is_alone or not runtime.is_out_of_memory(error):
                raise
        return None

    def settle(self, item: Prompt, answer: Answer | FlorenceError) -> None:
        """Hands on the result of a prompt in hand."""
        prompt_s, began = self._in_hand.pop(item)
        if isinstance(answer, FlorenceError):
            with self._callers():
                self._feed.settle(item, answer)
            return
        self._note_fit()
        timings = Timings(
            vision=item.image.vision_s, prompt=prompt_s, decode=time.perf_counter() - began
        )
        with self._callers():
            self._feed.settle(item, replace(self._engine.result(item, answer), timings_s=timings))

    def _note_fit(self) -> None:
        """As many answers as there are rows, once all of these were in use, are a batch."""
        if self._is_full and not self._is_retry:
            self._num_settled += 1
            if self._num_settled >= self._room:
                self._limit.fitted(self._room)
                self._num_settled, self._is_full = 0, False

    def _next(self, room: int) -> list[Prompt]:
        prompts: list[Prompt] = []
        while len(prompts) < room:
            missing = room - len(prompts)
            if self._again:
                taken, self._again = self._again[:missing], self._again[missing:]
            elif self._is_retry or self._room != self._limit.now:
                # The next search begins with the limit as it is then.
                break
            else:
                with self._callers():
                    taken = list(self._feed.take(missing, self._settings))
            if not taken:
                break
            prompts += self._wanted(taken)
        return prompts

    def _wanted(self, taken: list[Prompt]) -> list[Prompt]:
        """Those of ``taken`` that somebody waits for; the others are settled."""
        wanted: list[Prompt] = []
        with self._callers():
            for prompt in taken:
                reason = _reason(prompt)
                if reason is None:
                    wanted.append(prompt)
                else:
                    self._feed.settle(prompt, reason)
        return wanted


def _reason(prompt: Prompt) -> FlorenceError | None:
    return None if prompt.stop is None else prompt.stop()


class PromptList:
    """A feed of prompts that are all there from the start, those of like settings together."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts
        self._waiting: dict[GenerationSettings, list[Prompt]] = {}
        self._outcomes: dict[Prompt, Result | FlorenceError] = {}
        for prompt in prompts:
            self._waiting.setdefault(prompt.settings, []).append(prompt)

    def next_settings(self) -> GenerationSettings | None:
        """In the order of their first prompts."""
        return next(iter(self._waiting), None)

    def take(self, room: int, settings: GenerationSettings) -> list[Prompt]:
        """The next prompts of these settings, in order."""
        waiting = self._waiting.pop(settings, [])
        if waiting[room:]:
            self._waiting = {settings: waiting[room:], **self._waiting}
        return waiting[:room]

    def settle(self, prompt: Prompt, outcome: Result | FlorenceError) -> None:
        """Notes a result."""
        self._outcomes[prompt] = outcome

    def outcomes(self) -> list[Result | FlorenceError]:
        """One per prompt, in order."""
        return [self._outcomes[prompt] for prompt in self._prompts]


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

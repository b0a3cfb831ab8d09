"""One checkpoint on one device: who uses it when, how much at a time, and images to features."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final, Generic, TypeVar

import numpy as np

from florence2.checkpoint.checkpoint import Checkpoint
from florence2.engine.ask import Ask, Outcome
from florence2.engine.encoding import AnyImage, AnySource, EncodedImage, FeatureCache, Preparer
from florence2.errors import (
    CheckpointError,
    DeviceLostError,
    FlorenceError,
    OutOfMemoryError,
    RequestError,
    shown,
    unknown_name,
)
from florence2.generation.beam_search import LocationProbability
from florence2.images import identity
from florence2.pixels import PreparedImage
from florence2.postprocess import NEAR_BINS
from florence2.records import Failure
from florence2.runtimes.base import Mark, Runtime
from florence2.stopping import Stop

logger = logging.getLogger(__name__)

MOST_PASS_S: Final = 0.25
"""How long one pass over many items should take where someone may wait for its end."""

PATIENCE: Final = 8
"""Full batches that must fit before a lowered limit is raised by a step."""

MOST_PATIENCE: Final = 128
STEPS: Final = 8
"""A step is this part of the configured batch."""

Encoded = EncodedImage | FlorenceError
Key = TypeVar("Key")


class Asker(Generic[Key]):
    """Who asks the engine, as its passes see it: this one has no asks and waits for nothing else.

    Called on the thread that uses the engine; what is raised comes through.
    """

    is_awaited = False
    """Whether others wait for the end of a pass; each is kept short then, see ``BatchLimit``."""

    def before_pass(self) -> None:
        """Called before every pass of the network, and for every image to open and scale.

        It may have the engine answer something else, which has a session of its own.
        """

    def coming_images(self) -> Sequence[AnyImage]:
        """The images that later calls will bring, as far as is known."""
        return ()

    def next_asks(self, room: int) -> Sequence[tuple[Key, Ask]]:
        """About ``room`` further asks, each with a name for it; none if there are none now."""
        return ()

    def settle(self, key: Key, outcome: Outcome) -> None:
        """Takes the outcome of an ask, once for every one."""


class BatchLimit:
    """How many items of a kind are tried together; kept from one run to the next.

    ``most`` is the configured batch, which is never exceeded. What did not fit lowers the limit to
    what did. Other programs come and go on a GPU, so after ``PATIENCE`` full batches it is raised
    by a step; a step that turns out too large is taken back, and the next one is tried after twice
    as many batches. Where someone may wait for the end of a pass it is also cut so that, at the
    speed of the pass before, it takes ``MOST_PASS_S``; one item is the least. Not for several
    threads at a time: it is used by who holds the engine.
    """

    def __init__(self, most: int) -> None:
        self._most = self._now = most
        self._proven: int | None = None
        self._num_fitted = 0
        self._patience = PATIENCE
        self._item_s: float | None = None
        self._under_way: tuple[int, Mark, Mark] | None = None
        self.num_searches = 0
        """Searches under way, of which each but the first one runs within another."""

    @property
    def most(self) -> int:
        """The configured batch; setting it forgets what memory was short for."""
        return self._most

    @most.setter
    def most(self, most: int) -> None:
        self._most = self._now = most
        self._proven, self._num_fitted, self._patience = None, 0, PATIENCE

    @property
    def now(self) -> int:
        """What memory is taken to hold."""
        return self._now

    def pass_size(self, *, is_awaited: bool) -> int:
        """Items of the next pass; ``is_awaited`` says that someone may wait for its end."""
        if not is_awaited or self._item_s is None or self._item_s <= 0:
            return self._now
        return max(1, min(self._now, int(MOST_PASS_S / self._item_s)))

    def smaller(self, size: int) -> int:
        """What to try after ``size`` items, more than one, did not fit."""
        held = self._proven
        return held if held is not None and size // 2 < held < size else max(1, size // 2)

    def lower(self, size: int) -> None:
        """Not more than ``size`` items fit."""
        is_step_back = size == self._proven
        self._patience = min(2 * self._patience, MOST_PATIENCE) if is_step_back else PATIENCE
        self._now = max(1, min(self._now, size))
        self._proven, self._num_fitted = None, 0

    def fitted(self, size: int) -> None:
        """A batch of ``size`` items fitted; one below the limit says nothing about it."""
        if size < self._now:
            return
        if self._proven is not None:
            self._proven, self._patience = None, PATIENCE
        self._num_fitted += 1
        if self._num_fitted >= self._patience and self._now < self._most:
            self._proven, self._num_fitted = self._now, 0
            self._now = min(self._most, self._now + max(1, self._most // STEPS))

    def begun(self, size: int, start: Mark, end: Mark) -> None:
        """A pass over ``size`` items was handed to the device between two marks."""
        self._under_way = size, start, end

    def catch_up(self) -> None:
        """Waits for the end of the pass under way, if there is one, and learns its speed.

        Without it a GPU would be given pass after pass, and a click would wait for all of them.
        """
        if self._under_way is not None:
            (size, start, end), self._under_way = self._under_way, None
            self._item_s = end.seconds_since(start) / size


def out_of_memory(device: str) -> OutOfMemoryError:
    """What to say of a request that does not fit alone."""
    return OutOfMemoryError(
        f"One request alone does not fit into the memory of {device}; close other "
        "programs, or use a smaller checkpoint or fewer beams."
    )


@dataclass(frozen=True, slots=True, eq=False)
class NamedModel:
    """What an ask's ``adapter`` stands for: the engine's checkpoint, or that with an adapter.

    ``key_prefix`` begins the keys of what its own vision tower encodes. ``base``: the model whose
    tower encodes its images, where the adapter leaves the tower as it is.
    """

    checkpoint: Checkpoint
    runtime: Runtime
    key_prefix: str
    base: NamedModel | None = None

    @property
    def encoder(self) -> NamedModel:
        """Whose vision tower encodes its images."""
        return self.base or self


class Engine:
    """One checkpoint on one runtime, and its adapters on others of the same device and precision.

    Calls from several threads wait for each other. An error after which the device answers nothing
    more is a DeviceLostError, then and for every later call.
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
        self.location_probability: Final = LocationProbability(
            checkpoint.vocabulary.first_location_id, NEAR_BINS
        )
        self._own: Final = NamedModel(checkpoint, runtime, _key_prefix(checkpoint, runtime))
        self._adapters: dict[str, NamedModel] = {}

    @property
    def adapters(self) -> Mapping[str, NamedModel]:
        """By the names that asks call them by."""
        return self._adapters

    def add_adapter(
        self, name: str, checkpoint: Checkpoint, runtime: Runtime, *, has_own_tower: bool
    ) -> None:
        """An adapter of the checkpoint; ``has_own_tower`` if it changes what encodes images."""
        prefix = _key_prefix(checkpoint, runtime)
        base = None if has_own_tower else self._own
        self._adapters[name] = NamedModel(checkpoint, runtime, prefix, base)

    def model_of(self, adapter: str | None) -> NamedModel:
        """What an ask's ``adapter`` stands for; RequestError for a name that there is not."""
        if adapter is None or adapter == self.checkpoint.name:
            return self._own
        if not isinstance(adapter, str) or adapter not in self._adapters:
            received = adapter if isinstance(adapter, str) else shown(adapter)
            known = [self.checkpoint.name, *self._adapters]
            raise RequestError(unknown_name("adapter", received, known))
        return self._adapters[adapter]

    def _runtimes(self) -> list[Runtime]:
        """The checkpoint's own first, whose weights the others may share."""
        return [self.runtime, *(model.runtime for model in self._adapters.values())]

    @property
    def notes(self) -> tuple[str, ...]:
        """Of the checkpoint and of its adapters, see ``Checkpoint``."""
        own = self.checkpoint.notes
        of_adapters = (
            f"Adapter {name}: {note}"
            for name, model in self._adapters.items()
            for note in model.checkpoint.notes
            if note not in own
        )
        return (*own, *of_adapters)

    def free_memory(self) -> None:
        """Gives cached device memory back before a smaller batch is tried."""
        for runtime in self._runtimes():
            runtime.free_memory()

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

    def encode(
        self,
        images: Sequence[AnyImage],
        stops: Sequence[Stop | None] | None = None,
        asker: Asker[Any] | None = None,
        model: NamedModel | None = None,
    ) -> list[Encoded]:
        """The images' visual tokens, in order; each content is run through the tower once.

        The tower is that of ``model``, without one the checkpoint's own. The next images, and then
        those that come later, are opened and scaled while the tower runs. ``stops`` has one Stop
        per image; an image given up, or that cannot be opened, has the reason in its place.
        """
        encoded: dict[int, Encoded] = {}
        places: dict[object, list[int]] = {}
        sources: dict[object, AnySource] = {}
        for place, image in enumerate(images):
            if isinstance(image, EncodedImage):
                encoded[place] = replace(image, vision_s=0.0)
            elif isinstance(image, Failure):
                encoded[place] = _as_error(image)
            else:
                places.setdefault(identity(image), []).append(place)
                sources.setdefault(identity(image), image)
        waiting = [None] * len(images) if stops is None else stops
        shared = {key: [waiting[place] for place in listed] for key, listed in places.items()}
        if sources:
            encoder = (model or self._own).encoder
            done = self._encode_sources(sources, shared, asker or Asker(), encoder)
            for key, found in done.items():
                encoded |= dict.fromkeys(places[key], found)
        return [encoded[place] for place in range(len(images))]

    def _encode_sources(
        self,
        left: dict[object, AnySource],
        stops: Mapping[object, Sequence[Stop | None]],
        asker: Asker[Any],
        encoder: NamedModel,
    ) -> dict[object, Encoded]:
        """What comes of each source, in passes of the tower."""
        done: dict[object, Encoded] = {}
        # By content: what this call found stays found, also if the cache has no room for it.
        found: dict[str, EncodedImage] = {}
        # The list of those to prepare is this call's own: a click in between says what else comes.
        owner = object()
        try:
            while left:
                asker.before_pass()
                for key in list(left):
                    if (reason := _reason(stops[key])) is not None:
                        done[key] = reason
                        del left[key]
                size = self.image_limit.pass_size(is_awaited=asker.is_awaited)
                part = list(islice(left, size))
                if not part:
                    break
                self.preparer.ahead(left.values(), owner)
                looked_up: dict[object, PreparedImage | Encoded] = {}
                for key in part:
                    looked_up[key] = self._look_up(left[key], found, encoder)
                    del left[key]
                    asker.before_pass()
                coming = asker.coming_images()
                self.preparer.ahead(left.values(), owner)
                self.preparer.ahead(coming)
                missing = {
                    one.content_hash: one
                    for one in looked_up.values()
                    if isinstance(one, PreparedImage)
                }
                encoded = self._encode_prepared(list(missing.values()), asker, encoder)
                by_content = dict(zip(missing, encoded, strict=True))
                found |= {
                    content: one
                    for content, one in by_content.items()
                    if isinstance(one, EncodedImage)
                }
                done |= {
                    key: by_content[one.content_hash] if isinstance(one, PreparedImage) else one
                    for key, one in looked_up.items()
                }
        finally:
            self.preparer.ahead((), owner)
        return done

    def _look_up(
        self, source: AnySource, found: dict[str, EncodedImage], encoder: NamedModel
    ) -> PreparedImage | Encoded:
        """The features of an image if they are known, else the image ready for the tower."""
        content = self.preparer.known_hash(source)
        if content is not None and (known := self._known(content, found, encoder)) is not None:
            return known
        try:
            prepared = self.preparer.take(source)
        except MemoryError:
            return OutOfMemoryError(
                "An image is opened in this computer's memory, and this one does not fit beside "
                "what is there; make it smaller, or send fewer at a time."
            )
        if isinstance(prepared, FlorenceError):
            return prepared
        return self._known(prepared.content_hash, found, encoder) or prepared

    def _known(
        self, content: str, found: dict[str, EncodedImage], encoder: NamedModel
    ) -> EncodedImage | None:
        known = found.get(content) or self.cache.get(f"{encoder.key_prefix}:{content}")
        if known is not None:
            found[content] = known
        return known

    def _encode_prepared(
        self, left: Sequence[PreparedImage], asker: Asker[Any], encoder: NamedModel
    ) -> list[Encoded]:
        """What comes of these images; one that does not fit into memory alone has an error."""
        encoded: list[Encoded] = []
        limit = self.image_limit
        while left:
            with self.in_use():
                if asker.is_awaited:
                    # Here, as until now the images of this pass were made ready beside the last.
                    limit.catch_up()
                size = limit.pass_size(is_awaited=asker.is_awaited)
                part, left = left[:size], left[size:]
                encoded += self._encode_in_parts(part, encoder)
            if left:
                asker.before_pass()
        return encoded

    def _encode_in_parts(
        self, images: Sequence[PreparedImage], encoder: NamedModel
    ) -> Sequence[Encoded]:
        """One pass of the tower, or several where memory ends; the limit learns from it."""
        limit = self.image_limit
        try:
            encoded = self._run_tower(images, encoder)
        except (RuntimeError, MemoryError) as error:
            if not self.runtime.is_out_of_memory(error):
                raise
            logger.warning(
                "%d image(s) did not fit into the memory of %s", len(images), self.runtime.device
            )
        else:
            limit.fitted(len(images))
            return encoded
        # Outside the handler: its traceback would keep the failed batch's tensors alive.
        self.free_memory()
        if len(images) == 1:
            return [out_of_memory(self.runtime.device)]
        size = limit.smaller(len(images))
        limit.lower(size)
        parts = [images[first : first + size] for first in range(0, len(images), size)]
        return [one for part in parts for one in self._encode_in_parts(part, encoder)]

    def _run_tower(self, part: Sequence[PreparedImage], encoder: NamedModel) -> list[EncodedImage]:
        """One pass of the tower. Nothing that an asker gave is called in it."""
        table = self.checkpoint.image_processor.lookup_table
        began, start = time.perf_counter(), self.runtime.mark()
        features = encoder.runtime.encode_bytes(np.stack([image.scaled for image in part]), table)
        spent = time.perf_counter() - began
        self.image_limit.begun(len(part), start, self.runtime.mark())
        encoded: list[EncodedImage] = []
        for image, row in zip(part, features, strict=True):
            # A row of a batch keeps the whole batch alive; the cache counts one image's bytes.
            own = row.clone() if len(part) > 1 else row
            kept = EncodedImage(own, image.size_wh, f"{encoder.key_prefix}:{image.content_hash}")
            self.cache.put(kept)
            encoded.append(replace(kept, vision_s=spent))
        return encoded

    def check_image(self, image: EncodedImage, model: NamedModel | None = None) -> None:
        """RequestError for features of another checkpoint or device, which mean nothing here."""
        used = model or self._own
        if not image.key.startswith(f"{used.encoder.key_prefix}:"):
            raise RequestError(
                f"An encoded image belongs to the checkpoint and device that encoded it, and this "
                f"one is not of {used.checkpoint.name} on {self.runtime.device}; encode the image "
                "again."
            )

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Holds the engine for one asker, its weights on the device.

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
        return sum(one.weight_bytes for one in self._runtimes()) + self.cache.num_bytes

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
                for runtime in self._runtimes():
                    runtime.park()

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
            for runtime in self._runtimes():
                try:
                    runtime.close()
                except RuntimeError as error:
                    if not runtime.is_lost(error):
                        raise
                    logger.warning("The memory of %s could not be freed: %s", runtime.device, error)

    def _wake(self) -> None:
        if self._is_closed:
            raise CheckpointError(
                f"A checkpoint that was closed answers nothing more, and {self.checkpoint.name} "
                "was; load it again."
            )
        if self._is_parked:
            for runtime in self._runtimes():
                runtime.resume()
            self._is_parked = False


def _key_prefix(checkpoint: Checkpoint, runtime: Runtime) -> str:
    # Two folders may have one name, and features of one device mean nothing on another.
    return f"{checkpoint.identity} {runtime.name} {runtime.device} {runtime.precision}"


def _loss(device: str, error: RuntimeError) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return (
        f"The device {device} failed and answers nothing more to this program ({reason[:200]}); "
        "send the request again once the model is loaded again, or restart the program."
    )


def _as_error(failure: Failure) -> FlorenceError:
    reason = FlorenceError(failure.message)
    reason.code = failure.code
    return reason


def _reason(stops: Sequence[Stop | None]) -> FlorenceError | None:
    """Why something that several share is given up: once each of them has given it up."""
    if None in stops:
        return None
    reason: FlorenceError | None = None
    for stop in stops:
        reason = None if stop is None else stop()
        if reason is None:
            return None
    return reason

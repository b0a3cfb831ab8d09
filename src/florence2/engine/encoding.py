"""Around the vision tower: images made ready ahead of it, and features kept for later prompts.

A few threads open, scale and hash images. Pillow and hashlib let other Python threads run
meanwhile, and none of it enters PyTorch.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from florence2.budget import open_pixels
from florence2.errors import FlorenceError, RequestError, as_value
from florence2.images import ImageSource, LoadedImage, identity, open_image
from florence2.pixels import ImageProcessor, PreparedImage, Scaled
from florence2.records import Failure, SizeWh

THREADS: Final = 2
MAX_AHEAD: Final = 16


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImage:
    """An image as the checkpoint sees it: give it to any method in the image's place.

    ``features`` [num_visual_tokens, d_model] on the engine's device; ``size_wh`` of the original
    image in pixels; ``key`` names the content and the checkpoint that encoded it. ``vision_s`` is
    the time its batch took in the tower just now, and 0 for an image that was encoded before.
    """

    features: Tensor
    size_wh: SizeWh
    key: str
    vision_s: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Memory the features take."""
        return self.features.numel() * self.features.element_size()


Unprepared = ImageSource | LoadedImage
AnySource = Unprepared | PreparedImage
AnyImage = AnySource | EncodedImage | Failure
Prepared = PreparedImage | FlorenceError


class FeatureCache:
    """Maps content keys to encoded images; safe to share between threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._held: OrderedDict[str, EncodedImage] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Memory the cached features take now; never above ``max_bytes``."""
        return self._num_bytes

    def get(self, key: str) -> EncodedImage | None:
        """The encoded image of ``key``, which becomes the most recently used."""
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
            return found

    def put(self, encoded: EncodedImage) -> None:
        """Keeps ``encoded``, dropping the least recently used; one too large is not kept."""
        if encoded.num_bytes > self.max_bytes:
            return
        with self._lock:
            replaced = self._held.pop(encoded.key, None)
            if replaced is not None:
                self._num_bytes -= replaced.num_bytes
            self._held[encoded.key] = encoded
            self._num_bytes += encoded.num_bytes
            while self._num_bytes > self.max_bytes:
                _, dropped = self._held.popitem(last=False)
                self._num_bytes -= dropped.num_bytes

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._held.clear()
            self._num_bytes = 0


class _Prefetch:
    """An image that is prepared by ``work``, which is called once, by the first thread that begins.

    So nobody waits behind other images: one that no helper has begun is prepared by the thread
    that takes it. ``source`` is held as long as this can be found by its identity, which another
    object could have once that one is gone; ``num_takers`` will still take the result.
    """

    __slots__ = ("_claim", "_error", "_is_over", "_result", "_work", "num_takers", "source")

    def __init__(self, source: Unprepared, work: Callable[[], Prepared]) -> None:
        self.source: Unprepared | None = source
        self.num_takers = 0
        self._work: Callable[[], Prepared] | None = work
        self._claim = threading.Lock()
        self._is_over = threading.Event()
        self._result: Prepared | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Does the work here and now, unless somebody has begun it; raises nothing."""
        if not self._claim.acquire(blocking=False):
            return
        work, self._work = self._work, None
        try:
            if work is not None:
                self._result = work()
        except BaseException as error:  # noqa: BLE001 - it is raised where the image is taken
            self._error = as_value(error)
        finally:
            self._is_over.set()

    def result(self) -> Prepared:
        """What ``work`` gave or raised; done on this thread if nobody has begun."""
        self.run()
        self._is_over.wait()
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise RuntimeError("A prefetch that was dropped has no result.")
        return self._result

    def drop(self) -> None:
        """Nobody needs the result: what was not begun never is, and what is held is released."""
        if self._claim.acquire(blocking=False):
            self._work = None
            self._is_over.set()
        # An error that was raised has a traceback, whose frames hold this prefetch.
        self.source, self._result, self._error = None, None, None


class Preparer:
    """Prepares images for one checkpoint ahead of the model; safe to use from many threads.

    At most ``max_ahead`` images are in hand or prepared and not taken: whatever is beyond is
    prepared by the thread that takes it. So is an image that no helper has begun, which is why
    nobody waits behind other images. The same path, bytes or object is prepared once for all who
    wait for it. It must not be changed meanwhile.
    """

    def __init__(
        self, processor: ImageProcessor, *, threads: int = THREADS, max_ahead: int = MAX_AHEAD
    ) -> None:
        self._processor = processor
        self._max_ahead = max_ahead
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="florence2-images")
        self._lock = threading.RLock()
        self._prefetches: dict[object, _Prefetch] = {}
        self._listed: dict[object, _Prefetch] = {}
        # By whose list it is: what each of them waits for still.
        self._wanted: dict[object, set[object]] = {}
        self._hashes: WeakKeyDictionary[LoadedImage, str] = WeakKeyDictionary()
        self._is_closed = False

    def ahead(self, images: Iterable[AnyImage], owner: object = None) -> None:
        """The images that ``take`` will be asked for next, in order, in place of those said before.

        Every ``owner`` has a list of its own. What was said before and is neither on a list nor
        taken is forgotten. As many as there is room for are begun; images that were prepared
        before and are still open are not, because their features are mostly known. What needs no
        preparing is passed over.
        """
        wanted = _to_prepare(images)
        with self._lock:
            self._wanted[owner] = set(wanted)
            if not wanted:
                del self._wanted[owner]
            kept = set().union(*self._wanted.values())
            for key in [key for key in self._listed if key not in kept]:
                self._leave(self._listed.pop(key))
            self._list(wanted)

    def also_ahead(self, images: Iterable[AnyImage]) -> None:
        """As ``ahead`` without an owner, beside what was said before."""
        wanted = _to_prepare(images)
        with self._lock:
            self._wanted.setdefault(None, set()).update(wanted)
            self._list(wanted)

    def take(self, image: AnySource) -> Prepared:
        """The prepared image or why there is none; made here and now if nobody has begun."""
        if isinstance(image, PreparedImage):
            return self._checked(image)
        key = identity(image)
        with self._lock:
            prefetch = self._listed.pop(key, None)
            if prefetch is None:
                prefetch = self._prefetches.get(key) or self._new(image)
                prefetch.num_takers += 1
        try:
            return prefetch.result()
        finally:
            with self._lock:
                self._leave(prefetch)

    def prepare(self, image: LoadedImage) -> PreparedImage:
        """An open image made ready here and now; its pixels are needed no longer.

        ImageError for one that was closed.
        """
        scaled = self._processor.resize(image.image, self._pool)
        return PreparedImage(image.size_wh, _hash_of(image.size_wh, scaled), scaled)

    def known_hash(self, image: object) -> str | None:
        """The ``content_hash`` of an open image that was prepared before.

        Who has its features need not take it again.
        """
        with self._lock:
            return self._hashes.get(image) if isinstance(image, LoadedImage) else None

    def close(self) -> None:
        """Prepares nothing ahead any more; what is begun is finished, and may still be taken."""
        with self._lock:
            self._is_closed = True
            for prefetch in self._listed.values():
                self._leave(prefetch)
            self._listed.clear()
            self._wanted.clear()
        self._pool.shutdown(cancel_futures=True)

    def _list(self, wanted: Mapping[object, Unprepared]) -> None:
        for key, image in wanted.items():
            if key in self._listed or self.known_hash(image) is not None:
                continue
            prefetch = self._prefetches.get(key)
            if prefetch is None:
                if self._is_closed or len(self._prefetches) >= self._max_ahead:
                    break
                prefetch = self._prefetches[key] = self._new(image)
                self._pool.submit(prefetch.run)
            prefetch.num_takers += 1
            self._listed[key] = prefetch

    def _new(self, image: Unprepared) -> _Prefetch:
        return _Prefetch(image, partial(self._prepare, image))

    def _leave(self, prefetch: _Prefetch) -> None:
        prefetch.num_takers -= 1
        if prefetch.num_takers < 1:
            key = identity(prefetch.source)
            if self._prefetches.get(key) is prefetch:
                del self._prefetches[key]
            prefetch.drop()

    def _prepare(self, image: Unprepared) -> Prepared:
        try:
            if isinstance(image, LoadedImage):
                prepared = self.prepare(image)
                with self._lock:
                    self._hashes[image] = prepared.content_hash
                return prepared
            with open_image(image, room=open_pixels().hold) as opened:
                return self.prepare(opened)
        except FlorenceError as error:
            return as_value(error)

    def _checked(self, image: PreparedImage) -> Prepared:
        width, height = self._processor.size_wh
        if image.scaled.shape == (height, width, 3):
            return image
        return RequestError(
            f"A prepared image has the size that its checkpoint works with, and one of "
            f"{image.scaled.shape[1]}x{image.scaled.shape[0]} was received for {width}x{height}; "
            "prepare it again."
        )


def _to_prepare(images: Iterable[AnyImage]) -> dict[object, Unprepared]:
    ready = EncodedImage | PreparedImage | Failure
    return {identity(image): image for image in images if not isinstance(image, ready)}


def _hash_of(size_wh: SizeWh, scaled: Scaled) -> str:
    digest = hashlib.blake2b(f"{size_wh} {scaled.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(scaled).data)
    return digest.hexdigest()

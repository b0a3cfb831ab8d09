"""Images to visual tokens: prepared ahead of the tower, each content encoded once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from florence2.chunks import run_in_chunks
from florence2.engine.ask import AnyImage
from florence2.engine.feature_cache import EncodedImage
from florence2.engine.prefetch import AnySource
from florence2.errors import FlorenceError
from florence2.images import identity
from florence2.memory import OutOfMemoryError, run_halving
from florence2.pixels import PreparedImage
from florence2.stopping import BetweenPasses, Stop, stop_of_all

if TYPE_CHECKING:
    from florence2.engine.engine import Engine

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

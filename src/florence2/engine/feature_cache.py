"""Encoded images kept for the next prompt: least recently used first out, bounded in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from florence2.records import SizeWh


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

"""What the engine needs of a runtime; each way to run the network implements it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from florence2.generation.beam_search import LocationProbability
from florence2.generation.decode import DecodeBatch, Session
from florence2.records import GenerationSettings

Pixels = npt.NDArray[np.float32]

ImageBytes = npt.NDArray[np.uint8]


class Mark(Protocol):
    """A moment in a device's work: it is reached once all that was run before it is done."""

    def seconds_since(self, earlier: Any) -> float:  # noqa: ANN401 - a mark of the same runtime
        """Waits until the mark is reached: the time since an earlier one was."""
        ...


class Runtime(Protocol):
    """Runs the network on one device in one precision.

    What another runtime has to write is ``encode_bytes`` and ``start``, whose session (``prefill``,
    ``step``, ``reorder``, ``keep``, ``put``) runs the decoder between two choices of tokens; the
    choices are the beam search's, on the device that the logits are on. Where calls return only
    when the device is done, ``decode_batch`` is a plain ``DecodeBatch``, ``mark`` a ``HostMark`` of
    the torch runtime, and ``computing`` a null context. What is left are questions of memory: which
    errors mean that there is none, how much the weights take, and how to give it back.

    Several sessions may be open at a time, and images may be encoded between their steps.
    """

    name: str
    device: str
    precision: str

    def computing(self) -> AbstractContextManager[None]:
        """To be entered around passes: settings of the process that they need hold within it."""
        ...

    def encode_bytes(self, images_bhwc: ImageBytes, lookup_table: Pixels) -> Tensor:
        """Visual tokens [B, num_visual_tokens, d_model] of images [B, H, W, 3] of the network's
        size, not normalised yet.

        ``lookup_table`` [3, 256] is the value of each byte of each channel.
        """
        ...

    def start(
        self,
        features: Sequence[Tensor],
        prompt_ids: Sequence[Sequence[int]],
        num_beams: int,
        max_new_tokens: int,
    ) -> Session:
        """A decoding session: one item per prompt, its image's visual tokens in ``features``."""
        ...

    def decode_batch(
        self, settings: GenerationSettings, location_probability: LocationProbability | None = None
    ) -> DecodeBatch:
        """Where one run of the decode loop with these settings searches its items."""
        ...

    def mark(self) -> Mark:
        """Marks this moment in the device's work."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether ``error`` says that this runtime's device has no memory left."""
        ...

    def is_lost(self, error: BaseException) -> bool:
        """Whether after ``error`` nothing can be run on this runtime's device any more."""
        ...

    def free_memory(self) -> None:
        """Gives cached device memory back before a smaller batch is tried."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Memory the weights take on the device now: 0 while parked and once closed."""
        ...

    def park(self) -> None:
        """Moves the weights to the computer's memory; nothing is run until ``resume``."""
        ...

    def resume(self) -> None:
        """Moves parked weights back to the device."""
        ...

    def close(self) -> None:
        """Frees the weights for good."""
        ...

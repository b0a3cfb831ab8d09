"""What the engine needs of a runtime; each way to run the network implements it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from florence2.generation.beam_search import Nearby
from florence2.generation.decode import Session, Space
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

    Several sessions may be open at a time, and images may be encoded between their steps.
    """

    name: str
    device: str
    precision: str

    def computing(self) -> AbstractContextManager[None]:
        """To be entered around passes: settings of the process that they need hold within it."""
        ...

    def encode_images(self, pixels: Pixels) -> Tensor:
        """Visual tokens [B, num_visual_tokens, d_model] of ``pixels`` [B, 3, H, W]."""
        ...

    def encode_bytes(self, images_bhwc: ImageBytes, lookup_table: Pixels) -> Tensor:
        """As ``encode_images`` for resized images [B, H, W, 3] that are not normalised yet.

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

    def space(self, settings: GenerationSettings, nearby: Nearby | None) -> Space:
        """Where one run of the decode loop with these settings searches its items."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether ``error`` says that this runtime's device has no memory left."""
        ...

    def is_lost(self, error: BaseException) -> bool:
        """Whether after ``error`` nothing can be run on this runtime's device any more."""
        ...

    def mark(self) -> Mark:
        """Marks this moment in the device's work."""
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

"""Slabs: parts of a batch of images that a CPU takes through a block one after another.

Values between two layers of a whole image are larger than the cache, and than what the C library
hands out again without asking the system: their pages would be mapped and cleared anew each time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

Slab = tuple[slice, slice]

# Bytes of the widest layer's values, four times the channels, and tokens: a product of fewer
# tokens takes longer each, because its weight is laid out anew. Whichever gives the larger slab.
SLAB_BYTES: Final = 4 * 2**20
SLAB_TOKENS: Final = 2048
# Two threads share a slab of this size; more threads get larger slabs.
SLAB_THREADS: Final = 2
# Just below the largest block (32 MiB) that glibc takes a lesson from.
LESSON_BYTES: Final = 2**25 - 2**16


@functools.cache
def keep_freed_memory() -> None:
    """Has the C library keep a slab's memory for the next one.

    glibc gives memory back to the system, which clears it anew, when twice as much lies free as
    the largest block freed so far. One large block, of which nothing is touched, teaches it that.
    """
    torch.empty(LESSON_BYTES, dtype=torch.uint8)


def runs_in_slabs(image: Tensor) -> bool:
    """Whether blocks run in slabs: on a CPU, and where no gradients need the values between."""
    return image.device.type == "cpu" and not torch.is_grad_enabled()


def slabs(image: Tensor, side: int = 1) -> Iterator[Slab]:
    """Slices of images and of their rows that together cover ``image`` [B, H, W, C].

    A slab holds whole images, or rows of one image: a multiple of ``side`` except for the last.
    """
    batch, height, width, dim = image.shape
    tokens = max(SLAB_BYTES // (4 * dim * image.element_size()), SLAB_TOKENS)
    tokens *= max(torch.get_num_threads() // SLAB_THREADS, 1)
    images = max(tokens // (height * width), 1)
    units = -(-height // side)
    parts = -(-units // max(tokens // width // side, 1))
    rows = -(-units // parts) * side
    for first in range(0, batch, images):
        for row in range(0, height, rows):
            yield slice(first, min(first + images, batch)), slice(row, min(row + rows, height))

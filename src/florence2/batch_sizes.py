"""How many images and prompts go through the network at once: by device and by their size.

A CPU is busy with one image of 768 x 768 pixels; small networks have so little work per image that
a batch costs hardly more than one. On a GPU batches always pay.
"""

from __future__ import annotations

import math
from typing import Final

from florence2.checkpoint import Checkpoint

_GPU_IMAGES: Final = 16
_GPU_PROMPTS: Final = 32
_CPU_MAX_IMAGES: Final = 8
_CPU_PIXELS: Final = 640 * 640
_CPU_PROMPTS: Final = (8, 32)
_CPU_KEY_VALUE_BYTES: Final = 128 * 2**20
_FLOAT_BYTES: Final = 4


def image_batch(checkpoint: Checkpoint, device_type: str) -> int:
    """Images of one pass through the vision tower."""
    if device_type != "cpu":
        return _GPU_IMAGES
    width, height = checkpoint.image_processor.size_wh
    return max(1, min(_CPU_MAX_IMAGES, _CPU_PIXELS // (width * height)))


def prompt_batch(checkpoint: Checkpoint, device_type: str) -> int:
    """Prompts that are decoded together; on a CPU as many as their keys and values allow."""
    if device_type != "cpu":
        return _GPU_PROMPTS
    text = checkpoint.config.text
    width, height = checkpoint.image_processor.size_wh
    visual_tokens = width * height // math.prod(checkpoint.config.vision.patch_stride) ** 2
    values = 2 * text.decoder_layers * visual_tokens * text.d_model
    fewest, most = _CPU_PROMPTS
    return max(fewest, min(most, _CPU_KEY_VALUE_BYTES // (values * _FLOAT_BYTES)))

"""How many images and prompts go together: fixed on a CPU, by measured memory on a GPU."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from florence2.checkpoint.checkpoint import Checkpoint
from florence2.generation.decode import generate
from florence2.runtimes.decode_graphs import ROWS
from florence2.runtimes.torch import VISION_BUCKETS, TorchRuntime
from florence2.tasks import TASKS
from florence2.tokens import BOS_ID, EOS_ID

logger = logging.getLogger(__name__)

COUNTS: Final = (1, 4)
"""The two batch sizes that a cost is measured at."""

_GPU_IMAGES: Final = 16
_GPU_PROMPTS: Final = 32
_CPU_MAX_IMAGES: Final = 8
_CPU_PIXELS: Final = 640 * 640
_CPU_PROMPTS: Final = (8, 32)
_CPU_KEY_VALUE_BYTES: Final = 128 * 2**20
_FLOAT_BYTES: Final = 4
MOST_IMAGES: Final = 64
MOST_PROMPTS: Final = 128

# Of the memory that is free once the checkpoint is loaded. The rest is for answers that are
# searched meanwhile, for what is cached, and for memory that is free in pieces too small to use.
_IMAGE_SHARE: Final = 0.35
_PROMPT_SHARE: Final = 0.45
_MEASURED_BEAMS: Final = 3
_PROMPT_TOKENS: Final = 32
_MEASURED_TOKENS: Final = 8


class MemoryMeter(Protocol):
    """The memory of one device."""

    def free_bytes(self) -> int:
        """What could be allocated now."""

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Does ``work``: the most that was allocated meanwhile, beyond what was before."""


@dataclass(frozen=True, slots=True)
class Cost:
    """A batch of n items takes ``fixed_bytes + n * bytes_per_item``."""

    fixed_bytes: int
    bytes_per_item: int


def measure_cost(
    meter: MemoryMeter, run: Callable[[int], object], prepare: Callable[[], None]
) -> Cost:
    """The line through the peaks of ``run(n)`` at two batch sizes, each after ``prepare``."""
    few, many = COUNTS
    prepare()
    low = meter.peak_bytes(lambda: run(few))
    prepare()
    high = meter.peak_bytes(lambda: run(many))
    slope = max(0, high - low) // (many - few)
    return Cost(max(0, low - few * slope), slope)


class CudaMeter:
    """The memory of a CUDA device as torch's allocator sees it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free_bytes(self) -> int:
        """What no program holds, once torch's cached blocks are given back."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """The peak of what torch allocated, over what it held before."""
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """Images of one pass through the vision tower, and prompts decoded together."""

    images: int
    prompts: int


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


def fit_batch(free_bytes: int, fixed_bytes: int, bytes_per_item: int, most: int) -> int:
    """The largest batch, from 1 to ``most``, with ``fixed + n * bytes_per_item`` <= ``free``.

    1 also where not even that fits: smaller batches than one there are none.
    """
    room = free_bytes - fixed_bytes
    fitting = most if bytes_per_item <= 0 else room // bytes_per_item
    return int(max(1, min(most, fitting if room > 0 else 1)))


def measured_batches(
    checkpoint: Checkpoint, runtime: TorchRuntime, meter: MemoryMeter, reserved_bytes: int = 0
) -> BatchSizes:
    """Batches that fit into the memory that is free now, but for ``reserved_bytes`` of it.

    Measured by real passes at two batch sizes, with recordings where work is recorded; what those
    keep, and buffers that are idle between searches, is not free either. A prompt is counted with
    the longest answer of the task table and 3 beams, as published; the loop halves batches that do
    not fit after all.
    """
    width, height = checkpoint.image_processor.size_wh
    image = np.zeros((1, height, width, 3), np.uint8)
    settings = replace(checkpoint.generation, num_beams=_MEASURED_BEAMS)
    growth = _longest_answer_bytes(checkpoint, runtime)

    def encode(count: int) -> Tensor:
        table = checkpoint.image_processor.lookup_table
        return runtime.encode_bytes(np.repeat(image, count, axis=0), table)

    with torch.inference_mode():
        features = encode(1)[0]

        def decode(count: int) -> None:
            ids = [BOS_ID, *[EOS_ID] * (_PROMPT_TOKENS - 1)]
            session = runtime.start(
                [features] * count, [ids] * count, _MEASURED_BEAMS, _MEASURED_TOKENS
            )
            generate(session, runtime.decode_batch(settings), [_MEASURED_TOKENS] * count)

        prompt = _cost(runtime, meter, decode)
        # Batches above the recorded sizes are what fills the memory, and those are not recorded.
        with runtime.graphs.paused():
            picture = _cost(runtime, meter, encode)
        runtime.free_memory()
        recorded = 1
        if runtime.graphs.is_enabled:
            reserved_bytes += runtime.most_idle_bytes + runtime.most_prompt_bytes
            free = max(0, meter.free_bytes() - reserved_bytes)
            fitting = _fitting(picture, int(free * _IMAGE_SHARE), 0, MOST_IMAGES)
            # Smaller ones are recorded in the memory that the largest has freed again.
            recorded = _record_largest(runtime, encode, fitting)
        free = max(0, meter.free_bytes() - reserved_bytes)
    images = max(recorded, _fitting(picture, int(free * _IMAGE_SHARE), 0, MOST_IMAGES))
    prompts = _fitting(prompt, int(free * _PROMPT_SHARE), growth, MOST_PROMPTS)
    if runtime.graphs.is_enabled:
        # Rows are rounded up to one of these.
        prompts = max(size for size in ROWS if size <= prompts)
    return BatchSizes(images, prompts)


def _fitting(cost: Cost | None, free_bytes: int, growth_bytes: int, most: int) -> int:
    """The batch that fits when each item takes ``growth_bytes`` more than was measured."""
    if cost is None:
        return 1
    return fit_batch(free_bytes, cost.fixed_bytes, cost.bytes_per_item + growth_bytes, most)


def _cost(runtime: TorchRuntime, meter: MemoryMeter, run: Callable[[int], object]) -> Cost | None:
    """What ``run`` costs in memory; None where not even a few items fit."""
    try:
        return measure_cost(meter, run, runtime.free_memory)
    except (RuntimeError, MemoryError) as error:
        if not runtime.is_out_of_memory(error):
            raise
    # Outside the handler, whose traceback keeps tensors alive.
    runtime.free_memory()
    return None


def _record_largest(runtime: TorchRuntime, encode: Callable[[int], object], fitting: int) -> int:
    """Records the largest pass of those that are recorded and fit; how many images it takes."""
    size = max(bucket for bucket in VISION_BUCKETS if bucket <= fitting)
    try:
        encode(size)
        return size
    except (RuntimeError, MemoryError) as error:
        if not runtime.is_out_of_memory(error):
            raise
        logger.warning("There is no room to record a pass over %d images", size)
    # Outside the handler, whose traceback keeps tensors alive.
    runtime.free_memory()
    return 1


def _longest_answer_bytes(checkpoint: Checkpoint, runtime: TorchRuntime) -> int:
    """Self-attention keys and values of one prompt's longest answer."""
    text = checkpoint.config.text
    tokens = min(max(task.max_new_tokens for task in TASKS), text.max_position_embeddings)
    values = 2 * text.decoder_layers * text.d_model * tokens * _MEASURED_BEAMS
    return values * runtime.network.dtype.itemsize

"""How many items go through the network together: what fits, and what a click can wait for.

Batches that do not fit are tried in parts; a request that does not fit alone fails alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from florence2.checkpoint.checkpoint import Checkpoint
from florence2.errors import FlorenceError, OutOfMemoryError
from florence2.generation.decode import generate
from florence2.runtimes.base import Mark, Runtime
from florence2.runtimes.cuda_graphs import VISION_BUCKETS
from florence2.runtimes.decode_graphs import ROWS
from florence2.runtimes.torch import TorchRuntime
from florence2.tasks import TASKS
from florence2.tokens import BOS_ID, EOS_ID

logger = logging.getLogger(__name__)

MOST_PASS_S: Final = 0.25
"""How long one pass over many items should take where someone may wait for its end."""

PATIENCE: Final = 8
"""Full batches that must fit before a lowered limit is raised by a step."""

MOST_PATIENCE: Final = 128
STEPS: Final = 8
"""A step is this part of the configured batch."""

Item = TypeVar("Item")
Done = TypeVar("Done")


def out_of_memory(device: str) -> OutOfMemoryError:
    """What to say of a request that does not fit alone."""
    return OutOfMemoryError(
        f"One request alone does not fit into the memory of {device}; close other "
        "programs, or use a smaller checkpoint or fewer beams."
    )


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


def run_halving(
    items: Sequence[Item],
    run: Callable[[Sequence[Item]], Sequence[Done]],
    runtime: Runtime,
    limit: BatchLimit,
) -> list[Done | FlorenceError]:
    """``run(items)``, in parts when memory ends; one value per item. ``limit`` learns from it."""
    try:
        done: list[Done | FlorenceError] = list(run(items))
    except (RuntimeError, MemoryError) as error:
        if not runtime.is_out_of_memory(error):
            raise
        logger.warning("%d item(s) did not fit into the memory of %s", len(items), runtime.device)
    else:
        limit.fitted(len(items))
        return done
    # Outside the handler: its traceback would keep the failed batch's tensors alive.
    runtime.free_memory()
    if len(items) == 1:
        return [out_of_memory(runtime.device)]
    size = limit.smaller(len(items))
    limit.lower(size)
    return [
        one
        for first in range(0, len(items), size)
        for one in run_halving(items[first : first + size], run, runtime, limit)
    ]


COUNTS: Final = (1, 4)
"""The two batch sizes that a cost is measured at."""


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


_BEAMS: Final = 3


_PROMPT_TOKENS: Final = 32


_MEASURED_TOKENS: Final = 8


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
    settings = replace(checkpoint.generation, num_beams=_BEAMS)
    growth = _longest_answer_bytes(checkpoint, runtime)

    def encode(count: int) -> Tensor:
        table = checkpoint.image_processor.lookup_table
        return runtime.encode_bytes(np.repeat(image, count, axis=0), table)

    with torch.inference_mode():
        features = encode(1)[0]

        def decode(count: int) -> None:
            ids = [BOS_ID, *[EOS_ID] * (_PROMPT_TOKENS - 1)]
            session = runtime.start([features] * count, [ids] * count, _BEAMS, _MEASURED_TOKENS)
            space = runtime.space(settings, None)
            generate(session, count, settings, [_MEASURED_TOKENS] * count, space=space)

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
    values = 2 * text.decoder_layers * text.d_model * tokens * _BEAMS
    return values * runtime.network.dtype.itemsize

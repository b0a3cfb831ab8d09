"""The PyTorch runtime: the network on a CPU or a CUDA device, in one stated precision."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from florence2.generation.beam_search import LocationProbability
from florence2.generation.decode import DecodeBatch
from florence2.generation.kv_cache import DecoderSession, row_index
from florence2.network.florence import Florence2Network
from florence2.pixels import look_up
from florence2.records import GenerationSettings
from florence2.runtimes.base import ImageBytes, Mark, Pixels
from florence2.runtimes.cuda_graphs import BucketedGraphs, GraphRunner, make_runner
from florence2.runtimes.decode_graphs import RecordedBatchPool, most_idle_bytes
from florence2.runtimes.device import PRECISIONS, base_precision, parse_quantization
from florence2.runtimes.quantization import quantize
from florence2.tokens import PAD_ID

Undo = Callable[[], None]


class SharedSetting:
    """A change that holds from the first of its users to the last one, in whatever thread."""

    def __init__(self, change: Callable[[], Undo]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._num_users = 0
        self._undo: Undo | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it, the change holds."""
        with self._lock:
            if self._undo is None:
                self._undo = self._change()
            self._num_users += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_users -= 1
                if not self._num_users:
                    undo, self._undo = self._undo, None
                    undo()


def _compute_exactly() -> Undo:
    """float32 in float32: TF32 has 10 bits of mantissa, and is torch's default for convolutions.

    Read by the newer of torch's two ways to say it, as reading the older one raises where a program
    used both; written by the older one where that is enough, as a program may read that.
    """
    products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    parts = (products, cudnn.conv, cudnn.rnn)  # type: ignore[attr-defined]
    before = [part.fp32_precision for part in parts]
    said = _matmul_precision()
    products.allow_tf32 = False
    cudnn.allow_tf32 = False

    def undo() -> None:
        products.allow_tf32 = before[0] == "tf32"
        cudnn.allow_tf32 = "tf32" in before[1:]
        # "medium" speaks of the CPU too, and to read it raises where the GPU's part says otherwise.
        if said is not None and said != _matmul_precision():
            torch.set_float32_matmul_precision(said)
        for part, value in zip(parts, before, strict=True):
            if part.fp32_precision != value:
                part.fp32_precision = value

    return undo


def _matmul_precision() -> str | None:
    """What ``set_float32_matmul_precision`` was told; None where other ways contradict it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _attend_without_cudnn() -> Undo:
    """cuDNN's attention comes first on new GPUs, and makes a plan for every new shape."""
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    return lambda: torch.backends.cuda.enable_cudnn_sdp(before)


_EXACT = SharedSetting(_compute_exactly)
_NO_CUDNN_ATTENTION = SharedSetting(_attend_without_cudnn)


@contextmanager
def computing(device_type: str, precision: str) -> Iterator[None]:
    """Within it, passes on this type of device compute as this precision promises."""
    with ExitStack() as settings:
        if device_type == "cuda":
            settings.enter_context(_NO_CUDNN_ATTENTION.held())
            if precision == "fp32":
                settings.enter_context(_EXACT.held())
        yield


def normalise(images_bhwc: Tensor, table: Tensor) -> Tensor:
    """Bytes [B, H, W, 3] -> float32 [B, 3, H, W], channels-last in memory.

    ``table`` [3, 256] float32 has the value of each byte of each channel
    (``ImageProcessor.lookup_table``), so the result is the host's to the last bit.
    """
    first = torch.arange(3, device=images_bhwc.device, dtype=torch.int32) * 256
    places = (images_bhwc.to(torch.int32) + first).flatten()
    values = table.flatten().index_select(0, places)
    return values.view(images_bhwc.shape).permute(0, 3, 1, 2)


def upload(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """``values`` on ``device``, in the same memory order; the caller may reuse them at once."""
    # torch warns of memory that it must not write, such as Pillow's.
    host = torch.from_numpy(np.require(values, requirements="W"))
    if device.type != "cuda":
        return host.to(device)
    # From page-locked memory the copy runs beside the host's own work.
    return host.pin_memory().to(device, non_blocking=True)


def check_bytes(images_bhwc: npt.NDArray[np.uint8], table: npt.NDArray[np.float32]) -> None:
    """ValueError unless these are bytes [B, H, W, 3] and a table [3, 256]."""
    is_image = images_bhwc.ndim == 4 and images_bhwc.shape[3] == 3
    if not is_image or images_bhwc.dtype != np.uint8:
        raise ValueError(
            "Images as bytes have the shape [B, H, W, 3] and the type uint8, and "
            f"{list(images_bhwc.shape)} of {images_bhwc.dtype} was received."
        )
    if table.shape != (3, 256):
        raise ValueError(
            f"A lookup table has the shape [3, 256], and {list(table.shape)} was received."
        )


VISION_BUCKETS: Final = (1, 2, 3, 4, 6, 8, 12, 16)
"""Batch sizes that are recorded: up to a half more work for a batch in between.

Above, the device is busy for longer than the host needs to launch its work.
"""

PROMPT_BUCKETS: Final = (1, 2, 4, 8)
"""Batch sizes that are recorded; larger ones keep the device busy for longer than launches take."""

PROMPT_LENGTHS: Final = 32
"""Encoded prompts, their image included, are padded to multiples, so that few shapes exist."""

_OUT_OF_MEMORY: Final = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_memory_error(error: BaseException) -> bool:
    """Whether torch or a library below it could not allocate; most say so only in words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


class HostMark:
    """A moment of a CPU, which is done with whatever was run before."""

    def __init__(self) -> None:
        self._at_s = time.perf_counter()

    def seconds_since(self, earlier: HostMark) -> float:
        """See ``Mark``."""
        return self._at_s - earlier._at_s


class CudaMark:
    """A moment in the current stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def seconds_since(self, earlier: CudaMark) -> float:
        """See ``Mark``."""
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000


class TorchRuntime:
    """Runs a network on ``device`` in ``precision``.

    Of a ``precision`` with 8 or 4 bits (see ``quantization``) these layers are replaced in
    ``network``, and all others are in ``base_precision``.

    ``graphs`` records work as CUDA graphs on a GPU and just runs it on a CPU; whatever is recorded
    is forgotten when the weights move. ``is_laid_out``: the network is as it is to be already.
    ``idle_share``: among how many the memory is shared that recordings may keep while idle.
    """

    name = "torch"

    def __init__(
        self,
        network: Florence2Network,
        device: torch.device,
        precision: str,
        graphs: GraphRunner | None = None,
        *,
        is_laid_out: bool = False,
        idle_share: int = 1,
    ) -> None:
        self.base_precision = base_precision(precision, device)
        self.quantization = parse_quantization(precision, device)
        self.network = network
        if not is_laid_out:
            network.to(dtype=PRECISIONS[self.base_precision]).eval()
            if self.quantization is not None:
                quantize(network, self.quantization, device)
            network.to(device).prepare_for_inference()
        self.device = str(device)
        self.precision = precision
        self.graphs = make_runner(device) if graphs is None else graphs
        self._device = device
        self.most_idle_bytes = most_idle_bytes(device) // idle_share
        self.most_prompt_bytes = self.most_idle_bytes // 2
        self.vision_graphs = BucketedGraphs("vision", self.graphs, VISION_BUCKETS)
        self.prompt_graphs = BucketedGraphs(
            "prompts", self.graphs, PROMPT_BUCKETS, self.most_prompt_bytes
        )
        self.batch_pool = RecordedBatchPool(self.network, self.graphs, self.most_idle_bytes)
        self._tables: dict[bytes, tuple[int, Tensor]] = {}

    @torch.inference_mode()
    def encode_images(self, pixels: Pixels) -> Tensor:
        """Visual tokens [B, num_visual_tokens, d_model] of ``pixels`` [B, 3, H, W]."""
        on_device = upload(pixels, self._device)
        if self.graphs.is_enabled:
            found = self.vision_graphs.run(
                "pixels", [on_device], lambda given: [self.network.encode_images(given[0])]
            )
            if found is not None:
                return found[0]
        return self.network.encode_images(on_device)

    @torch.inference_mode()
    def encode_bytes(self, images_bhwc: ImageBytes, lookup_table: Pixels) -> Tensor:
        """Visual tokens as ``encode_images``, of images that are normalised on the device.

        ``images_bhwc`` [B, H, W, 3] of the network's size and ``lookup_table`` [3, 256], the value
        of each byte of each channel, as ``ImageProcessor`` gives them.
        """
        check_bytes(images_bhwc, lookup_table)
        if not self.graphs.is_enabled and self._device.type == "cpu":
            values = np.empty(images_bhwc.shape, np.float32)
            for image, pixels in zip(images_bhwc, values, strict=True):
                look_up(image, lookup_table, pixels)
            return self.encode_images(values.transpose(0, 3, 1, 2))
        content = lookup_table.tobytes()
        if content not in self._tables:
            self._tables[content] = len(self._tables), upload(lookup_table, self._device)
        number, table = self._tables[content]

        def encode(given: Sequence[Tensor]) -> list[Tensor]:
            return [self.network.encode_images(normalise(given[0], table))]

        images = [upload(images_bhwc, self._device)]
        return (self.vision_graphs.run(("bytes", number), images, encode) or encode(images))[0]

    def computing(self) -> AbstractContextManager[None]:
        """See ``Runtime``."""
        return computing(self._device.type, self.precision)

    @torch.inference_mode()
    def start(
        self,
        features: Sequence[Tensor],
        prompt_ids: Sequence[Sequence[int]],
        num_beams: int,
        max_new_tokens: int,
    ) -> DecoderSession:
        """A decoding session; prompts of different lengths are padded and masked.

        Where work is recorded, encoding a small batch of prompts and its prefill are one recording,
        whose output is the session's own at once.
        """
        visual = torch.stack(list(features))
        width = max(len(ids) for ids in prompt_ids)
        if self.graphs.is_enabled:
            width = self._padded_width(visual.shape[1], width)
        padded = [[*ids, *[PAD_ID] * (width - len(ids))] for ids in prompt_ids]
        prompts = upload(np.array(padded, dtype=np.int64), self._device)
        lengths = row_index([len(ids) for ids in prompt_ids], self._device)
        mask = torch.arange(width, device=self._device) < lengths.unsqueeze(1)
        network = self.network
        if self.graphs.is_enabled:

            def encode(given: Sequence[Tensor]) -> list[Tensor]:
                states, states_mask = network.encode_prompts(*given)
                session = DecoderSession(network, states, states_mask, num_beams, 1, all_seen=False)
                return session.prefilled()

            found = self.prompt_graphs.run(num_beams, [visual, prompts, mask], encode)
            if found is not None:
                return DecoderSession.after_prefill(network, found, num_beams, max_new_tokens)
        states, states_mask = network.encode_prompts(visual, prompts, mask)
        all_seen = all(len(ids) == width for ids in prompt_ids)
        return DecoderSession(
            network, states, states_mask, num_beams, max_new_tokens, all_seen=all_seen
        )

    def _padded_width(self, num_visual: int, width: int) -> int:
        """The width that prompts of ``width`` tokens are padded to, after ``num_visual`` others."""
        limit = self.network.config.text.max_position_embeddings - num_visual
        total = -(-(num_visual + width) // PROMPT_LENGTHS) * PROMPT_LENGTHS
        return max(width, min(total - num_visual, limit))

    def decode_batch(
        self, settings: GenerationSettings, location_probability: LocationProbability | None = None
    ) -> DecodeBatch:
        """Where one run of the decode loop searches its items."""
        if self.graphs.is_enabled:
            return self.batch_pool.take(settings, location_probability)
        return DecodeBatch(settings, location_probability)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether torch or a library below it could not allocate; most say so only in words."""
        return is_memory_error(error)

    def is_lost(self, error: BaseException) -> bool:
        """Whether the GPU answers nothing any more: tried, as texts and codes do not say it.

        After an assert or a wrong address in a kernel every call of this process for the device
        fails, until the process ends. A CPU is never lost.
        """
        return (
            self._device.type == "cuda"
            and isinstance(error, RuntimeError)
            and not self._answers_still()
        )

    def _answers_still(self) -> bool:
        try:
            torch.zeros(1, device=self._device).cpu()
        except RuntimeError as error:
            return self.is_out_of_memory(error)
        return True

    def mark(self) -> Mark:
        """Marks this moment in the device's work."""
        return CudaMark(self._device) if self._device.type == "cuda" else HostMark()

    def free_memory(self) -> None:
        """Gives up what is recorded, and returns torch's cached GPU blocks to the device."""
        self._forget_recordings()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _forget_recordings(self) -> None:
        self.graphs.clear()
        self.vision_graphs.clear()
        self.prompt_graphs.clear()
        self.batch_pool.clear()

    @property
    def weight_bytes(self) -> int:
        """Memory the weights take on the device now; a weight used twice counts once."""
        if self.network.device.type != self._device.type:
            return 0
        return sum(
            weight.numel() * weight.element_size()
            for weight in (*self.network.parameters(), *self.network.buffers())
        )

    @torch.inference_mode(False)
    def park(self) -> None:
        """Moves the weights to the computer's memory; on a CPU they are there already."""
        self._forget_recordings()
        self.network.to("cpu")
        self.free_memory()

    @torch.inference_mode(False)
    def resume(self) -> None:
        """Moves parked weights back to the device, and lays them out for speed there again."""
        self.network.to(self._device).prepare_for_inference()

    def close(self) -> None:
        """Frees the weights for good, whoever else holds the network."""
        self._forget_recordings()
        self.network.to("meta")
        self.free_memory()


class AdapterRuntime(TorchRuntime):
    """An adapter beside its base, whose weights it shares but for those that it changes.

    ``base`` has no quantised layers. What moves its weights is called for the base first.
    """

    def __init__(
        self, base: TorchRuntime, changed: Mapping[str, Tensor], idle_share: int = 1
    ) -> None:
        super().__init__(
            base.network.sharing(changed),
            torch.device(base.device),
            base.precision,
            is_laid_out=True,
            idle_share=idle_share,
        )
        self._base = base

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights that are not the base's."""
        if self.network.device.type != self._device.type:
            return 0
        shared = set(map(id, self._base.network.parameters()))
        own = [weight for weight in self.network.parameters() if id(weight) not in shared]
        return sum(weight.numel() * weight.element_size() for weight in own)

    @torch.inference_mode(False)
    def resume(self) -> None:
        """Moves parked weights back to the device; the base's are there."""
        self.network.to(self._device)
        self.network.lay_out_as(self._base.network)

"""The PyTorch runtime: the network on a CPU or a CUDA device, in one stated precision."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from florence2.generation.beam_search import Nearby
from florence2.generation.decode import PlainSpace, Space
from florence2.generation.kv_cache import DecoderSession, row_numbers
from florence2.network.florence import Florence2Network
from florence2.pixels import look_up
from florence2.records import GenerationSettings
from florence2.runtimes.base import ImageBytes, Mark, Pixels
from florence2.runtimes.cuda_graphs import GraphRunner, PromptGraphs, VisionGraphs, make_runner
from florence2.runtimes.decode_graphs import DecodePool, most_idle_bytes
from florence2.runtimes.device import (
    PRECISIONS,
    computing,
)
from florence2.tokens import PAD_ID


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


_OUT_OF_MEMORY: Final = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


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
    """Runs a network whose weights are already on ``device`` in ``precision``.

    ``graphs`` records work as CUDA graphs on a GPU and just runs it on a CPU; whatever is recorded
    is forgotten when the weights move.
    """

    name = "torch"

    def __init__(
        self,
        network: Florence2Network,
        device: torch.device,
        precision: str,
        graphs: GraphRunner | None = None,
    ) -> None:
        self.network = network.to(device=device, dtype=PRECISIONS[precision]).eval()
        self.network.prepare_for_inference()
        self.device = str(device)
        self.precision = precision
        self.graphs = make_runner(device) if graphs is None else graphs
        self._device = device
        self._vision = VisionGraphs(self.graphs)
        self.most_idle_bytes = most_idle_bytes(device)
        self.most_prompt_bytes = self.most_idle_bytes // 2
        self._prompts = PromptGraphs(self.network, self.graphs, self.most_prompt_bytes)
        self._decode = DecodePool(self.network, self.graphs, self.most_idle_bytes)
        self._tables: dict[bytes, tuple[int, Tensor]] = {}

    @torch.inference_mode()
    def encode_images(self, pixels: Pixels) -> Tensor:
        """Visual tokens [B, num_visual_tokens, d_model] of ``pixels`` [B, 3, H, W]."""
        return self._vision.run("pixels", upload(pixels, self._device), self._encode)

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
        return self._vision.run(
            ("bytes", number),
            upload(images_bhwc, self._device),
            lambda received: self._encode(normalise(received, table)),
        )

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.network.encode_images(pixels)

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
        """A decoding session; prompts of different lengths are padded and masked."""
        visual = torch.stack(list(features))
        width = max(len(ids) for ids in prompt_ids)
        if self.graphs.is_enabled:
            width = self._prompts.padded_width(visual.shape[1], width)
        rows = [[*ids, *[PAD_ID] * (width - len(ids))] for ids in prompt_ids]
        prompts = upload(np.array(rows, dtype=np.int64), self._device)
        lengths = row_numbers([len(ids) for ids in prompt_ids], self._device)
        mask = torch.arange(width, device=self._device) < lengths.unsqueeze(1)
        recorded = self._prompts.start(visual, prompts, mask, num_beams, max_new_tokens)
        if recorded is not None:
            return recorded
        states, states_mask = self.network.encode_prompts(visual, prompts, mask)
        all_seen = all(len(ids) == width for ids in prompt_ids)
        return DecoderSession(
            self.network, states, states_mask, num_beams, max_new_tokens, all_seen=all_seen
        )

    def space(self, settings: GenerationSettings, nearby: Nearby | None) -> Space:
        """Where one run of the decode loop searches its items."""
        return self._decode.space(settings, nearby) if self.graphs.is_enabled else PlainSpace()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether torch or a library below it could not allocate; most say so only in words."""
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        return isinstance(error, RuntimeError) and any(
            words in str(error) for words in _OUT_OF_MEMORY
        )

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
        self._vision.clear()
        self._prompts.clear()
        self._decode.clear()

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

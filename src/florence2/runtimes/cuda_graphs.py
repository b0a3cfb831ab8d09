"""CUDA graphs: work is recorded once and then played back without the cost of its launches."""

from __future__ import annotations

import gc
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from florence2.generation.beam_search import PREFIX
from florence2.generation.kv_cache import DecoderSession, KeyValues, row_numbers
from florence2.network.florence import Florence2Network

logger = logging.getLogger(__name__)


Work = Callable[[], None]


WARM_UPS: Final = 2
"""Libraries choose kernels and allocate workspaces in first runs, which must not be recorded."""


MAX_GRAPHS: Final = 64


SWITCH: Final = "FLORENCE2_CUDA_GRAPHS"
"""An environment variable: 0 turns recording off for the whole process."""


class Recording(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Does the work again, on the same addresses; returns before the device is done."""

    def reset(self) -> None:
        """Gives the recording's memory back."""


class Recorder(Protocol):
    """Records work on one device."""

    def aside(self) -> AbstractContextManager[None]:
        """Where work is warmed up: the stream it will be recorded on."""

    def record(self, work: Work) -> Recording:
        """Records ``work``, which is called but not done; RuntimeError when it cannot be."""

    def settle(self) -> None:
        """Waits until nothing recorded is under way."""


class GraphRunner:
    """Runs work through recordings, or just runs it where there is no ``recorder`` (a CPU).

    At most ``max_graphs`` recordings are kept, the least recently used one goes first. The first
    recording that fails ends all recording, as a capture that broke off can leave the memory that
    recordings share unusable. Not for several threads at a time.
    """

    def __init__(self, recorder: Recorder | None, max_graphs: int = MAX_GRAPHS) -> None:
        self._recorder = recorder
        self._max_graphs = max_graphs
        self._is_paused = False
        self._is_plain = False
        # A recording knows addresses only: the work, and with it the tensors that it reaches,
        # must live as long.
        self._held: OrderedDict[Hashable, tuple[Work, Recording]] = OrderedDict()

    @property
    def is_enabled(self) -> bool:
        """Whether work is recorded now."""
        return self._recorder is not None and not self._is_paused

    @property
    def num_graphs(self) -> int:
        """Recordings kept now."""
        return len(self._held)

    @torch.inference_mode()
    def run(self, key: Hashable, work: Work, state: Sequence[Tensor] = ()) -> None:
        """Does ``work`` once: the first time for ``key`` it is recorded, later it is replayed.

        ``key`` stands for the work and for every tensor it reaches: with a known key the work of
        the first call is replayed, on the first call's tensors, and this call's is not looked at.
        Use a new key, or ``clear``, for other tensors.

        ``work`` reads and writes tensors that exist before the call and stay where they are, and
        nothing that it allocates is used outside it: other recordings overwrite that memory. It
        does not wait for the device (``item``, ``tolist``, ``nonzero``, a copy to the host), draws
        no random numbers, and its Python code has no effect of its own, as it is run
        ``WARM_UPS`` + 1 times at the first call and never again.

        The warm-up does the work for real. ``state`` names the tensors that ``work`` both reads
        and writes, such as a step counter or a list of beams: they are put back after each
        warm-up, so that afterwards the work has been done exactly once. What is only written, or
        written before it is read, needs no entry. A cache in which a step writes the slots of its
        own position needs none either: each warm-up writes the same values again.

        Work that cannot be recorded is just run, like all work after it. Errors of the work itself
        come through, with ``state`` put back.
        """
        if self._recorder is None or self._is_paused or self._is_plain:
            work()
            return
        if key in self._held:
            self._held.move_to_end(key)
        else:
            self._warm_up(self._recorder, work, state)
            self._make_room()
            recording = self._record(self._recorder, key, work)
            if recording is None:
                work()
                return
            self._held[key] = work, recording
        self._held[key][1].replay()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, work is just run; what is recorded stays."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    @contextmanager
    def plainly(self) -> Iterator[None]:
        """Within it, work goes the same ways as if it were recorded, but is just run.

        What comes out can be compared with what recordings give: it has the same shapes.
        """
        before, self._is_plain = self._is_plain, True
        try:
            yield
        finally:
            self._is_plain = before

    def give_up(self, why: object) -> None:
        """Ends all recording for good, with one warning."""
        if self._recorder is None:
            return
        logger.warning(
            "CUDA graphs are off from here on, which costs speed and changes no answer: %s", why
        )
        self.clear()
        self._recorder = None

    def forget(self, keys: Iterable[Hashable]) -> None:
        """Forgets these recordings, of which there may be none, as ``clear`` does all."""
        held = [key for key in keys if key in self._held]
        if self._recorder is not None and held:
            self._recorder.settle()
        for key in held:
            self._held.move_to_end(key, last=False)
            self._drop_oldest()

    def clear(self) -> None:
        """Forgets all recordings, to give their memory back or because tensors have moved."""
        if self._recorder is not None and self._held:
            self._recorder.settle()
        while self._held:
            self._drop_oldest()

    @staticmethod
    def _warm_up(recorder: Recorder, work: Work, state: Sequence[Tensor]) -> None:
        saved = [tensor.clone() for tensor in state]
        with recorder.aside():
            for _ in range(WARM_UPS):
                try:
                    work()
                finally:
                    for tensor, value in zip(state, saved, strict=True):
                        tensor.copy_(value)

    def _record(self, recorder: Recorder, key: Hashable, work: Work) -> Recording | None:
        try:
            return recorder.record(work)
        except RuntimeError as error:
            self.give_up(f"recording {key} failed: {error}")
            return None

    def _make_room(self) -> None:
        if self._recorder is not None and len(self._held) >= self._max_graphs:
            self._recorder.settle()
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, (_, recording) = self._held.popitem(last=False)
        recording.reset()


class CudaRecorder:
    """Records CUDA graphs of one device, all on one stream and in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._recordings: list[torch.cuda.CUDAGraph] = []

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The recording stream, in order with the current one before and after."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                current.wait_stream(self._stream)

    def record(self, work: Work) -> Recording:
        """Records ``work``; other threads may go on using the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        # A pool lives as long as the recordings that share it; the first one brings a new one.
        pool = self._recordings[0].pool() if self._recordings else None
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            try:
                with (
                    _no_garbage_collection(),
                    torch.cuda.graph(
                        graph,
                        pool=pool,
                        stream=self._stream,
                        capture_error_mode="thread_local",
                    ),
                ):
                    work()
            finally:
                # torch stays on the recording stream when ending a broken recording raises.
                torch.cuda.set_stream(current)
        self._recordings.append(graph)
        return _CudaRecording(graph, self._recordings)

    def settle(self) -> None:
        """Waits for the device."""
        torch.cuda.synchronize(self._device)


class _CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph, alive: list[torch.cuda.CUDAGraph]) -> None:
        self._graph = graph
        self._alive = alive

    def replay(self) -> None:
        self._graph.replay()

    def reset(self) -> None:
        self._alive.remove(self._graph)
        self._graph.reset()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A tensor or graph that is collected while recording would free memory, which breaks it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def make_runner(device: torch.device, max_graphs: int = MAX_GRAPHS) -> GraphRunner:
    """Recording on a CUDA device, none on a CPU or where ``FLORENCE2_CUDA_GRAPHS`` is 0."""
    is_on = device.type == "cuda" and os.environ.get(SWITCH, "").strip() != "0"
    return GraphRunner(CudaRecorder(device) if is_on else None, max_graphs)


VISION_BUCKETS: Final = (1, 2, 3, 4, 6, 8, 12, 16)
"""Batch sizes that are recorded: up to a half more work for a batch in between.

Above, the device is busy for longer than the host needs to launch its work.
"""

Encode = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class _VisionBuffers:
    """What a recording reads and writes; the output appears in the first warm-up."""

    received: Tensor
    features: Tensor | None = None


class VisionGraphs:
    """Runs the tower on batches of any size."""

    def __init__(self, graphs: GraphRunner, buckets: tuple[int, ...] = VISION_BUCKETS) -> None:
        self._graphs = graphs
        self._buckets = buckets
        self._buffers: dict[Hashable, _VisionBuffers] = {}

    def run(self, kind: Hashable, received: Tensor, encode: Encode) -> Tensor:
        """``encode(received)``, [B, ...] on the device to features [B, N, d], a tensor of its own.

        ``kind`` stands for ``encode`` and whatever it reaches, as in ``GraphRunner.run``; each row
        of its result must depend on the same row of its input only.
        """
        count = received.shape[0]
        size = next((bucket for bucket in self._buckets if bucket >= count), None)
        if size is None or not count or not self._graphs.is_enabled:
            return encode(received)
        key = ("vision", kind, size, received.shape[1:], received.dtype)
        buffers = self._buffers.get(key)
        if buffers is None:
            buffers = _VisionBuffers(received.new_empty(size, *received.shape[1:]))
            self._buffers[key] = buffers
        _fill(buffers.received, received)
        self._graphs.run(key, _work(buffers, encode))
        return _features_of(buffers)[:count].clone()

    def clear(self) -> None:
        """Forgets the buffers; the recordings are the runner's to forget, and first."""
        self._buffers.clear()


def _fill(buffer: Tensor, received: Tensor) -> None:
    """Copies a batch in; the rows that are left take its first image, whose numbers are sane."""
    count = received.shape[0]
    buffer[:count].copy_(received)
    buffer[count:].copy_(received[:1].expand(buffer.shape[0] - count, *received.shape[1:]))


def _work(buffers: _VisionBuffers, encode: Encode) -> Callable[[], None]:
    def work() -> None:
        features = encode(buffers.received)
        if buffers.features is None:
            buffers.features = torch.empty_like(features)
        buffers.features.copy_(features)

    return work


def _features_of(buffers: _VisionBuffers) -> Tensor:
    if buffers.features is None:
        raise RuntimeError("The tower was recorded without ever having been run.")
    return buffers.features


PROMPT_BUCKETS: Final = (1, 2, 4, 8)
"""Batch sizes that are recorded; larger ones keep the device busy for longer than launches take."""

LENGTHS: Final = 32
"""Encoded prompts, their image included, are padded to multiples, so that few shapes exist."""


@dataclass(slots=True)
class _PromptBuffers:
    """What a recording reads, and writes: the outputs appear in the first warm-up."""

    inputs: tuple[Tensor, Tensor, Tensor]
    outputs: list[Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that these take."""
        return sum(part.nbytes for part in (*self.inputs, *(self.outputs or ())))


class PrefilledSession(DecoderSession):
    """A session whose prompts, and the prefix of every answer, have been through the network."""

    def __init__(
        self,
        network: Florence2Network,
        outputs: Sequence[Tensor],
        num_beams: int,
        max_new_tokens: int,
    ) -> None:
        """``outputs`` as ``first_pass`` gives them, of B items."""
        self._logits, cross_mask, *keys_and_values = outputs
        num_items = self._logits.shape[0]
        with torch.inference_mode():
            states = network.lm_head.weight.new_empty(0, 0, network.config.text.d_model)
            nothing_seen = torch.zeros(0, 0, dtype=torch.bool, device=states.device)
            super().__init__(
                network, states, nothing_seen, num_beams, max_new_tokens, all_seen=True
            )
            self._layers = [
                _restored(keys_and_values[place : place + 4])
                for place in range(0, len(keys_and_values), 4)
            ]
            self._cross_mask = cross_mask
            self._steps_of = [0] * num_items
            self._steps = self._steps.new_zeros(num_items)
            self._own_mask = cross_mask.new_empty(num_items, num_beams, 0)

    @torch.inference_mode()
    def prefill(self, prefix_ids: Sequence[int]) -> Tensor:
        """The logits [B, V] after the prefix, which must be the one of all answers."""
        if self._prefix_length or tuple(prefix_ids) != PREFIX:
            raise RuntimeError(f"The prefix is {PREFIX}, once, and {prefix_ids} was received.")
        self._prefix_length = len(prefix_ids)
        self.reserve(0)
        return self._logits


def first_pass(
    network: Florence2Network,
    inputs: tuple[Tensor, Tensor, Tensor],
    prefix: Tensor,
    num_beams: int,
) -> list[Tensor]:
    """Logits after the prefix, the cross-attention mask, and four tensors of each layer: keys and
    values of the encoded prompts and of the prefix.

    ``inputs`` are visual tokens [B, N, d], prompts and their mask [B, T] as for
    ``encode_prompts``; ``prefix`` the ids [P] that every answer begins with.
    """
    states, states_mask = network.encode_prompts(*inputs)
    session = DecoderSession(network, states, states_mask, num_beams, 1, all_seen=False)
    logits = session.prefill_on_device(prefix)
    return [logits, session.cross_mask, *session.layer_tensors()]


class PromptGraphs:
    """Starts sessions; small batches through recordings, whose output is copied out at once.

    What they read and write, the keys and values of all layers among it, takes at most
    ``max_bytes``, or what one recording needs; the least recently used goes first.
    """

    def __init__(self, network: Florence2Network, graphs: GraphRunner, max_bytes: int) -> None:
        self._network = network
        self._graphs = graphs
        self._max_bytes = max_bytes
        self._prefix: Tensor | None = None
        self._buffers: OrderedDict[Hashable, _PromptBuffers] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Memory that recordings read and write."""
        return sum(buffers.num_bytes for buffers in self._buffers.values())

    def padded_width(self, num_visual: int, width: int) -> int:
        """The width that prompts of ``width`` tokens are padded to, after ``num_visual`` others."""
        limit = self._network.config.text.max_position_embeddings - num_visual
        total = -(-(num_visual + width) // LENGTHS) * LENGTHS
        return max(width, min(total - num_visual, limit))

    def start(
        self,
        features: Tensor,
        prompts: Tensor,
        mask: Tensor,
        num_beams: int,
        max_new_tokens: int,
    ) -> DecoderSession | None:
        """A session as after ``encode_prompts``; None for batches that are not recorded."""
        count = len(prompts)
        size = next((bucket for bucket in PROMPT_BUCKETS if bucket >= count), None)
        if size is None or not count or not self._graphs.is_enabled:
            return None
        given = (features, prompts, mask)
        key = ("prompts", size, features.shape[1:], prompts.shape[1], num_beams)
        buffers = self._buffers.get(key)
        is_new = buffers is None
        if buffers is None:
            empty = [part.new_empty(size, *part.shape[1:]) for part in given]
            buffers = self._buffers[key] = _PromptBuffers((empty[0], empty[1], empty[2]))
        self._buffers.move_to_end(key)
        for buffer, part in zip(buffers.inputs, given, strict=True):
            buffer[:count].copy_(part)
            # The rows that are left take the first prompt, whose numbers are sane.
            buffer[count:].copy_(part[:1].expand(size - count, *part.shape[1:]))
        self._graphs.run(key, self._work(buffers, num_beams))
        if buffers.outputs is None:
            raise RuntimeError("Prompts were recorded without ever having been encoded.")
        outputs = [output[:count].clone() for output in buffers.outputs]
        if is_new:
            self._make_room()
        return PrefilledSession(self._network, outputs, num_beams, max_new_tokens)

    def _make_room(self) -> None:
        while len(self._buffers) > 1 and self.num_bytes > self._max_bytes:
            oldest = next(iter(self._buffers))
            self._graphs.forget([oldest])
            del self._buffers[oldest]

    def _work(self, buffers: _PromptBuffers, num_beams: int) -> Work:
        if self._prefix is None:
            self._prefix = row_numbers(list(PREFIX), self._network.device)
        prefix = self._prefix

        def work() -> None:
            found = first_pass(self._network, buffers.inputs, prefix, num_beams)
            if buffers.outputs is None:
                buffers.outputs = [torch.empty_like(part) for part in found]
            for output, part in zip(buffers.outputs, found, strict=True):
                output.copy_(part)

        return work

    def clear(self) -> None:
        """Forgets the buffers; the recordings are the runner's to forget, and first."""
        self._buffers.clear()
        self._prefix = None


def _restored(tensors: Sequence[Tensor]) -> KeyValues:
    cross_key, cross_value, own_key, own_value = tensors
    layer = KeyValues(cross_key, cross_value)
    layer.own_key, layer.own_value = own_key, own_value
    return layer

"""CUDA graphs: work is recorded once and then played back without the cost of its launches."""

from __future__ import annotations

import gc
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

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

    def stream(self) -> AbstractContextManager[None]:
        """The stream that work is recorded on, for warming it up."""

    def record(self, work: Work) -> Recording:
        """Records ``work``, which is called but not done; RuntimeError when it cannot be."""

    def synchronize(self) -> None:
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
        self.is_enabled = recorder is not None
        """Whether work goes the ways of recorded work now: not on a CPU, nor while paused."""
        self._is_plain = False
        # A recording knows addresses only: the work, and with it the tensors that it reaches,
        # must live as long.
        self._held: OrderedDict[Hashable, tuple[Work, Recording]] = OrderedDict()

    @property
    def num_graphs(self) -> int:
        """Recordings kept now."""
        return len(self._held)

    @property
    def keys(self) -> list[Hashable]:
        """What they are known by, the least recently used first."""
        return list(self._held)

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
        if self._recorder is None or not self.is_enabled or self._is_plain:
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
        before, self.is_enabled = self.is_enabled, False
        try:
            yield
        finally:
            self.is_enabled = before and self._recorder is not None

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
        self.is_enabled = False

    def forget(self, keys: Iterable[Hashable]) -> None:
        """Forgets these recordings, of which there may be none, as ``clear`` does all."""
        held = [key for key in keys if key in self._held]
        if self._recorder is not None and held:
            self._recorder.synchronize()
        for key in held:
            self._held.move_to_end(key, last=False)
            self._drop_oldest()

    def clear(self) -> None:
        """Forgets all recordings, to give their memory back or because tensors have moved."""
        if self._recorder is not None and self._held:
            self._recorder.synchronize()
        while self._held:
            self._drop_oldest()

    @staticmethod
    def _warm_up(recorder: Recorder, work: Work, state: Sequence[Tensor]) -> None:
        saved = [tensor.clone() for tensor in state]
        with recorder.stream():
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
            self._recorder.synchronize()
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, (_, recording) = self._held.popitem(last=False)
        recording.reset()


class CudaRecorder:
    """Records CUDA graphs of one device, all on one stream and in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recording_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._recordings: list[torch.cuda.CUDAGraph] = []

    @contextmanager
    def stream(self) -> Iterator[None]:
        """The recording stream, in order with the current one before and after."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._recording_stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._recording_stream):
                    yield
            finally:
                current.wait_stream(self._recording_stream)

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
                        stream=self._recording_stream,
                        capture_error_mode="thread_local",
                    ),
                ):
                    work()
            finally:
                # torch stays on the recording stream when ending a broken recording raises.
                torch.cuda.set_stream(current)
        self._recordings.append(graph)
        return _CudaRecording(graph, self._recordings)

    def synchronize(self) -> None:
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


@dataclass(slots=True)
class _Buffers:
    """What a recording reads, and writes: the outputs appear in the first warm-up."""

    inputs: list[Tensor]
    outputs: list[Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in (*self.inputs, *(self.outputs or ())))


BatchFunction = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""From tensors [B, ...] to others; each row of these depends on the same row of those only."""


class BucketedGraphs:
    """Runs functions of batches through recordings, of which there is one for a few sizes.

    A batch of another size is filled up to the next of these ``buckets``. What recordings read
    and write takes at most ``max_bytes``, or what one of them needs; the least recently used goes
    first.
    """

    def __init__(
        self, name: str, graphs: GraphRunner, buckets: Sequence[int], max_bytes: float = math.inf
    ) -> None:
        """``name`` tells these recordings from the runner's others."""
        self._name = name
        self._graphs = graphs
        self._buckets = buckets
        self.max_bytes = max_bytes
        self._buffers: OrderedDict[Hashable, _Buffers] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Memory that recordings read and write."""
        return sum(buffers.num_bytes for buffers in self._buffers.values())

    def run(
        self, kind: Hashable, inputs: Sequence[Tensor], function: BatchFunction
    ) -> list[Tensor] | None:
        """``function(inputs)``, tensors of their own; None for batches that are not recorded.

        ``kind`` stands for ``function`` and whatever it reaches, as in ``GraphRunner.run``.
        """
        count = len(inputs[0])
        size = next((bucket for bucket in self._buckets if bucket >= count), None)
        if size is None or not count or not self._graphs.is_enabled:
            return None
        key = (self._name, kind, size, *((part.shape[1:], part.dtype) for part in inputs))
        is_new = key not in self._buffers
        if is_new:
            self._buffers[key] = _Buffers(
                [part.new_empty(size, *part.shape[1:]) for part in inputs]
            )
        self._buffers.move_to_end(key)
        buffers = self._buffers[key]
        for buffer, part in zip(buffers.inputs, inputs, strict=True):
            buffer[:count].copy_(part)
            # The rows that are left take the first one, whose numbers are sane.
            buffer[count:].copy_(part[:1].expand(size - count, *part.shape[1:]))
        self._graphs.run(key, _work(buffers, function))
        if buffers.outputs is None:
            raise RuntimeError("Work was recorded without ever having been run.")
        outputs = [output[:count].clone() for output in buffers.outputs]
        if is_new:
            self._make_room()
        return outputs

    def clear(self) -> None:
        """Forgets the buffers; the recordings are the runner's to forget, and first."""
        self._buffers.clear()

    def _make_room(self) -> None:
        while len(self._buffers) > 1 and self.num_bytes > self.max_bytes:
            oldest = next(iter(self._buffers))
            self._graphs.forget([oldest])
            del self._buffers[oldest]


def _work(buffers: _Buffers, function: BatchFunction) -> Work:
    def work() -> None:
        found = function(buffers.inputs)
        if buffers.outputs is None:
            buffers.outputs = [torch.empty_like(part) for part in found]
        for output, part in zip(buffers.outputs, found, strict=True):
            output.copy_(part)

    return work

"""CUDA graphs: work is recorded once and then played back without the cost of its launches.

What they need and why is described in torch's notes on CUDA graphs: static addresses, no waiting
for the device inside, a warm-up on another stream, one memory pool for graphs that share a stream.
"""

from __future__ import annotations

import gc
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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

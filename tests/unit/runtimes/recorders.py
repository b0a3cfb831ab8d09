"""Recorders with and without a GPU, and a pool of recorded batches for one of the tiny models."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny_reference import our_network, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from florence2.pixels import ImageProcessor
from florence2.runtimes.cuda_graphs import CudaRecorder, GraphRunner
from florence2.runtimes.decode_graphs import RecordedBatchPool

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TABLE = ImageProcessor().lookup_table


class ReplayingRecorder:
    """Records the work itself, which is done again at each replay.

    Counts what a GPU would see; ``refuse`` makes recording fail as an unsupported call does."""

    def __init__(self, refuse=False):
        self.refuse = refuse
        self.events: list[str] = []
        self.num_alive = 0

    @contextmanager
    def stream(self):
        self.events.append("warm up")
        yield

    def record(self, work):
        self.events.append("record")
        if self.refuse:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.num_alive += 1
        return _Replayed(self, work)

    def synchronize(self):
        self.events.append("synchronize")


class _Replayed:
    def __init__(self, recorder, work):
        self._recorder = recorder
        self._work = work

    def replay(self):
        self._recorder.events.append("replay")
        self._work()

    def reset(self):
        self._recorder.events.append("reset")
        self._recorder.num_alive -= 1


# What would wait for a GPU, or bring numbers from the host to it.
NOT_RECORDABLE = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "lift_fresh"}


class TapingRecorder(ReplayingRecorder):
    """Replays as a GPU does: the operations of the recorded run on its tensors, no Python."""

    def record(self, work):
        tape = _Tape()
        try:
            with tape:
                work()
        finally:
            # Recording does not do the work.
            for tensor, value in tape.before:
                tensor.copy_(value)
        super().record(work)
        return _Taped(self, tape.operations)


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []
        self.before = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in NOT_RECORDABLE:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        writes = func._schema.is_mutable
        if writes:
            self.before.insert(0, (inputs[0], inputs[0].clone()))
        found = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        places = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        is_view = any(tensor.untyped_storage().data_ptr() in places for tensor in outputs)
        if writes or not is_view:
            self.operations.append((func, args, kwargs, [] if writes else outputs))
        return found


class _Taped:
    def __init__(self, recorder, operations):
        self._recorder = recorder
        self._operations = operations

    def replay(self):
        self._recorder.events.append("replay")
        for func, args, kwargs, outputs in self._operations:
            found = tree_leaves(func(*args, **kwargs))
            values = [leaf for leaf in found if isinstance(leaf, torch.Tensor)]
            for place, value in zip(outputs, values, strict=bool(outputs)):
                place.copy_(value)

    def reset(self):
        self._recorder.events.append("reset")
        self._recorder.num_alive -= 1
        self._operations = None


class RecorderOfGpu(CudaRecorder):
    """A GPU's own, which counts as the others do."""

    def __init__(self):
        super().__init__(CUDA)
        self.events = []

    def record(self, work):
        self.events.append("record")
        recording = super().record(work)
        return Counted(recording, self.events)


class Counted:
    def __init__(self, recording, events):
        self.replay, self._reset, self._events = recording.replay, recording.reset, events

    def reset(self):
        self._events.append("reset")
        self._reset()


RECORDERS = [
    pytest.param(ReplayingRecorder, id="replayed"),
    pytest.param(TapingRecorder, id="taped"),
    pytest.param(RecorderOfGpu, id="on a GPU", marks=GPU),
]


def device_of(recorder):
    return CUDA if isinstance(recorder, CudaRecorder) else CPU


def pixels_of(images):
    """What the bytes of images stand for, as the network reads them."""
    values = np.stack([TABLE[channel][images[..., channel]] for channel in range(3)], axis=1)
    return np.ascontiguousarray(values)


class Place:
    """The pool, with what records for it."""

    def __init__(self, seed, recorder=None, max_idle_bytes=2**30):
        self.seed, self.recorder = seed, recorder
        self.graphs, self.device = GraphRunner(recorder), device_of(recorder).type
        network = our_network(tiny_model(seed), self.device)
        self.pool = RecordedBatchPool(network, self.graphs, max_idle_bytes)

    def batch(self, settings):
        return self.pool.take(settings, None)

    def free_memory(self):
        self.graphs.clear()
        self.pool.clear()

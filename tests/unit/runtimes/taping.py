"""A recorder without a GPU that replays as one does: operations on addresses, no Python."""

from __future__ import annotations

import torch
from replaying import ReplayingRecorder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What would wait for a GPU, or bring numbers from the host to it.
NOT_RECORDABLE = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "lift_fresh"}


class TapingRecorder(ReplayingRecorder):
    """Replays the operations of the recorded run on that run's tensors."""

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

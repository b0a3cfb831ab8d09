"""torch's settings for the whole process, as they must be while our networks compute on a GPU.

They belong to the host program, which has them back as they were once nobody computes any longer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

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

"""``florence2`` whose device fails for good once the file DEVICE_FAILS is there, and takes it away.

The way of a real GPU: a RuntimeError of a call to it, after which it answers nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from florence2.runtimes.torch import TorchRuntime
from serve.cli.main import main

SWITCH = Path(os.environ["DEVICE_FAILS"])
encode, is_lost = TorchRuntime.encode_bytes, TorchRuntime.is_lost
lost: set[int] = set()


def encode_or_fail(runtime: TorchRuntime, *arguments: Any) -> Any:
    if SWITCH.exists():
        SWITCH.unlink()
        lost.add(id(runtime))
    if id(runtime) in lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return encode(runtime, *arguments)


TorchRuntime.encode_bytes = encode_or_fail
TorchRuntime.is_lost = lambda runtime, error: id(runtime) in lost or is_lost(runtime, error)
main()

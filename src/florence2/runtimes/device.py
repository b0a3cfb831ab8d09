"""Why torch computes on the CPU of a machine that seems to have a GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

NAMES_NO_DEVICE: Final = frozenset({"", "-1", "none", "void", "nodevfiles"})
"""Values of the variables that give a process, or a container, no GPU."""


_VARIABLES: Final = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")


_DRIVER: Final = Path("proc", "driver", "nvidia", "version")


_DRIVER_VERSION: Final = re.compile(r"\b(\d{3,4}(?:\.\d+)+)\b")


_TOO_OLD: Final = "driver on your system is too old"


_FOUND: Final = re.compile(r"found version (\d+)")


def missing_gpu(root: Path = Path("/")) -> str | None:
    """One sentence: what lets expect a GPU, why torch sees none, and what to do about it.

    None where torch sees one, and where nothing below ``root`` or in the environment tells of any.
    """
    if torch.cuda.is_available():
        return None
    error = _error_of_cuda()
    sign = _driver_sign(root) or _variable_sign()
    if sign is None and _TOO_OLD in error:
        sign = "an NVIDIA driver is installed"
    if sign is None:
        return None
    return f"A GPU can be expected here ({sign}), but torch sees none: {_reason(error)}."


def _driver_sign(root: Path) -> str | None:
    try:
        text = (root / _DRIVER).read_text(encoding="utf-8", errors="replace")
    except OSError:
        # A container may have the devices without the file, and Windows' Linux has neither.
        for pattern in ("dev/nvidia[0-9]*", "usr/lib/wsl/lib/libcuda.so*"):
            if found := sorted(root.glob(pattern)):
                return f"there is /{found[0].relative_to(root)}"
        return None
    version = _DRIVER_VERSION.search(text)
    return f"NVIDIA driver {version[1]} is loaded" if version else "an NVIDIA driver is loaded"


def _variable_sign() -> str | None:
    for name in _VARIABLES:
        if name in os.environ and not _names_no_device(name):
            return f"{name}={os.environ[name]}"
    return None


def _names_no_device(name: str) -> bool:
    # A list ends for CUDA where it names something that is no device.
    return os.environ[name].split(",")[0].strip().lower() in NAMES_NO_DEVICE


def _error_of_cuda() -> str:
    """What torch says when it is made to use CUDA, on one line; nothing if it does not mind."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError, OSError, torch.cuda.DeferredCudaCallError) as error:
        return " ".join(str(error).split())
    return ""


def _reason(error: str) -> str:
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA; install the build for CUDA "
            "(pip install torch from PyPI)"
        )
    for name in _VARIABLES:
        if name in os.environ and _names_no_device(name):
            return f"{name}={os.environ[name]!r} hides it; unset it or name a device"
    for text, reason in _REASONS.items():
        if text in error:
            return reason(error)
    first = error.partition(". ")[0].rstrip(".")
    return first or "it does not say why; nvidia-smi may"


def _too_old(error: str) -> str:
    found = _FOUND.search(error)
    # 12040 stands for 12.4, and torch's own message shows it as it is.
    knows = f" knows CUDA {int(found[1]) // 1000}.{int(found[1]) % 1000 // 10} and" if found else ""
    return (
        f"the driver is too old, it{knows} would have to know CUDA {torch.version.cuda}; update "
        "the driver"
    )


_REASONS: Final[dict[str, Callable[[str], str]]] = {
    _TOO_OLD: _too_old,
    "Found no NVIDIA driver": lambda _: (
        "CUDA's part of the driver (libcuda.so.1) cannot be opened; install the driver, and start "
        "a container with the NVIDIA runtime and NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    ),
    "No CUDA GPUs are available": lambda _: (
        "the driver shows no device; name one that exists in CUDA_VISIBLE_DEVICES, or start the "
        "container with one"
    ),
}

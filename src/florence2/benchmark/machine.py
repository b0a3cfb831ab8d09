"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any, Final

import torch

from florence2.runtimes.device import choose_device

_PROCESSOR: Final = Path("/proc/cpuinfo")
_INSTRUCTIONS: Final = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe_machine(device: str) -> dict[str, Any]:
    """Processor, cores, memory and versions; nothing that names the machine or its user."""
    import transformers

    found = {
        "processor": _field("model name") or platform.processor() or platform.machine(),
        "instructions": [name for name in _INSTRUCTIONS if name in _field("flags").split()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    chosen = choose_device(device)
    if chosen.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(chosen)
    return found


def _field(name: str) -> str:
    """The first value of a line of the processor's description, "" where there is none."""
    if not _PROCESSOR.is_file():
        return ""
    for line in _PROCESSOR.read_text(encoding="utf-8").splitlines():
        label, _, value = line.partition(":")
        if label.strip() == name:
            return value.strip()
    return ""


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)

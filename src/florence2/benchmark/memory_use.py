"""How much memory a process needs, for one run at a time."""

from __future__ import annotations

import ctypes
import ctypes.util
import resource
import sys
from pathlib import Path
from typing import Final

import torch

_STATUS: Final = Path("/proc/self/status")
_CLEAR: Final = Path("/proc/self/clear_refs")
_KILL_ORDER: Final = Path("/proc/self/oom_score_adj")


class PeakMemory:
    """On a GPU what torch held of its memory at most, on a CPU the largest resident size."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    def restart(self) -> None:
        """Counts from now on, with what an earlier run left behind given back first.

        Where the system does not let a process do that, the peak is the one since its start.
        """
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        if sys.platform == "linux":
            trim = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "malloc_trim", None)
            if trim is not None:
                trim(0)
            _write(_CLEAR, "5")

    def peak_mib(self) -> float:
        """MiB at most since ``restart``."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device) / 2**20
        if _STATUS.is_file():
            for line in _STATUS.read_text(encoding="utf-8").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest / (2**20 if sys.platform == "darwin" else 1024)


def be_ended_first() -> None:
    """When memory runs out, the system ends this process and not the one that writes the rows."""
    _write(_KILL_ORDER, "1000")


def _write(path: Path, text: str) -> None:
    """Asks the system for something that the figures are right without."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError:
        return

"""How the threads of OpenMP, which compute for torch, wait for each other."""

from __future__ import annotations

import os
import time
from typing import Final

# By default a thread that waits turns in a loop for milliseconds. Where other programs want the
# cores too, it waits for one that is not running, and takes the core that this one needs: labeling
# took ten times as long. So beside others it sleeps at once, which is also how it comes first when
# it wakes. Alone it turns long enough to bridge two operations: falling asleep between them costs a
# third of a decoder step's speed. The names are those of GNU's library (Linux) and of LLVM's and
# Intel's (in milliseconds).
_ALONE: Final = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
_BESIDE_OTHERS: Final = {"GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
_CHOSEN_BY_USER: Final = "OMP_WAIT_POLICY"

_CHOSEN_COUNT: Final = "OMP_NUM_THREADS"
_SMALL_D_MODEL: Final = 512

_LOADAVG: Final = "/proc/loadavg"
_LOOKS: Final = 5
_BETWEEN_LOOKS_S: Final = 0.01


def bound_spinning() -> None:
    """Must come before torch is imported; what the environment says already stays."""
    if _CHOSEN_BY_USER not in os.environ:
        for name, value in (_BESIDE_OTHERS if is_machine_busy() else _ALONE).items():
            os.environ.setdefault(name, value)


def leave_cores_to_others(d_model: int) -> None:
    """One thread for a small network beside others: two gain little, and wait for each other."""
    if d_model < _SMALL_D_MODEL and _CHOSEN_COUNT not in os.environ and is_machine_busy():
        import torch

        torch.set_num_threads(1)


def is_machine_busy() -> bool:
    """Whether others keep at least half of the cores running, at each of a few looks in a row.

    False where the system does not tell. A load average would be a minute late.
    """
    cores = os.cpu_count() or 1
    for look in range(_LOOKS):
        if look:
            time.sleep(_BETWEEN_LOOKS_S)
        if 2 * _others_running() < cores:
            return False
    return True


def _others_running() -> int:
    """Threads of the whole machine that run or want to, but this one."""
    try:
        with open(_LOADAVG, encoding="ascii") as file:
            return int(file.read().split()[3].split("/")[0]) - 1
    except (OSError, ValueError, IndexError):
        return 0

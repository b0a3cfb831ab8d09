"""How the threads of OpenMP, which compute for torch, wait for each other."""

from __future__ import annotations

import os
from typing import Final

# By default a thread that waits turns in a loop for milliseconds. Where other programs want the
# cores too, it waits for one that is not running, and takes the core that this one needs: labeling
# took ten times as long. So it turns for some microseconds, which bridges two operations, and then
# sleeps. The names are those of GNU's library (Linux) and of LLVM's and Intel's (in milliseconds).
_DEFAULTS: Final = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
_CHOSEN_BY_USER: Final = "OMP_WAIT_POLICY"


def bound_spinning() -> None:
    """Must come before torch is imported; what the environment says already stays."""
    if _CHOSEN_BY_USER not in os.environ:
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)

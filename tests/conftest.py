"""What every test process starts with: one compute thread, and a cheap garbage collection.

Its tensors are tiny, and every core has a test process. Two threads that compute a tensor
together wait for each other, and on a busy machine such a wait lasts until the other one has its
turn. Set here because the libraries read it when they are loaded, and through the environment
because programs that tests start compute as well.
"""

from __future__ import annotations

import gc
import os
import sys

import pytest

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

# The name of xdist's workers is no module's, which ends an import of the SDK that comes before
# serve.sdk, see there.
sys.modules.setdefault("__channelexec__", sys.modules["__main__"])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores: tests of servers and of processes mostly wait."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_finish() -> None:
    """Collections, of which each app that stops makes one, pass over all that was imported."""
    gc.collect()
    gc.freeze()

"""Batches that do not fit are halved; a request that does not fit alone fails alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from florence2.errors import FlorenceError
from florence2.runtimes.base import Runtime

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Done = TypeVar("Done")


class OutOfMemoryError(FlorenceError):
    """One request alone does not fit into the device's memory."""

    code = "out_of_memory"


def out_of_memory(device: str) -> OutOfMemoryError:
    """What to say of a request that does not fit alone."""
    return OutOfMemoryError(
        f"One request alone does not fit into the memory of {device}; close other "
        "programs, or use a smaller checkpoint or fewer beams."
    )


def run_halving(
    items: Sequence[Item], run: Callable[[Sequence[Item]], Sequence[Done]], runtime: Runtime
) -> list[Done | FlorenceError]:
    """``run(items)``, in halves when the device has no memory left; one value per item."""
    try:
        return list(run(items))
    except (RuntimeError, MemoryError) as error:
        if not runtime.is_out_of_memory(error):
            raise
        logger.warning("%d item(s) did not fit into the memory of %s", len(items), runtime.device)
    # Outside the handler: its traceback would keep the failed batch's tensors alive.
    runtime.free_memory()
    if len(items) == 1:
        return [out_of_memory(runtime.device)]
    half = len(items) // 2
    first = run_halving(items[:half], run, runtime)
    return first + run_halving(items[half:], run, runtime)

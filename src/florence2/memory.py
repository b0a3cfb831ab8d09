"""How many items go through the network together: what fits, and what a click can wait for.

Batches that do not fit are tried in parts; a request that does not fit alone fails alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from florence2.errors import FlorenceError
from florence2.runtimes.base import Mark, Runtime

logger = logging.getLogger(__name__)

MOST_PASS_S: Final = 0.25
"""How long one pass over many items should take where someone may wait for its end."""

PATIENCE: Final = 8
"""Full batches that must fit before a lowered limit is raised by a step."""

MOST_PATIENCE: Final = 128
STEPS: Final = 8
"""A step is this part of the configured batch."""

Item = TypeVar("Item")
Done = TypeVar("Done")


class OutOfMemoryError(FlorenceError):
    """One request alone does not fit into memory."""

    code = "out_of_memory"


def out_of_memory(device: str) -> OutOfMemoryError:
    """What to say of a request that does not fit alone."""
    return OutOfMemoryError(
        f"One request alone does not fit into the memory of {device}; close other "
        "programs, or use a smaller checkpoint or fewer beams."
    )


class BatchLimit:
    """How many items of a kind are tried together; kept from one run to the next.

    ``most`` is the configured batch, which is never exceeded. What did not fit lowers the limit to
    what did. Other programs come and go on a GPU, so after ``PATIENCE`` full batches it is raised
    by a step; a step that turns out too large is taken back, and the next one is tried after twice
    as many batches. Where someone may wait for the end of a pass it is also cut so that, at the
    speed of the pass before, it takes ``MOST_PASS_S``; one item is the least. Not for several
    threads at a time: it is used by who holds the engine.
    """

    def __init__(self, most: int) -> None:
        self._most = self._now = most
        self._proven: int | None = None
        self._num_fitted = 0
        self._patience = PATIENCE
        self._item_s: float | None = None
        self._under_way: tuple[int, Mark, Mark] | None = None
        self.num_searches = 0
        """Searches under way, of which each but the first one runs within another."""

    @property
    def most(self) -> int:
        """The configured batch; setting it forgets what memory was short for."""
        return self._most

    @most.setter
    def most(self, most: int) -> None:
        self._most = self._now = most
        self._proven, self._num_fitted, self._patience = None, 0, PATIENCE

    @property
    def now(self) -> int:
        """What memory is taken to hold."""
        return self._now

    def pass_size(self, *, is_awaited: bool) -> int:
        """Items of the next pass; ``is_awaited`` says that someone may wait for its end."""
        if not is_awaited or self._item_s is None or self._item_s <= 0:
            return self._now
        return max(1, min(self._now, int(MOST_PASS_S / self._item_s)))

    def smaller(self, size: int) -> int:
        """What to try after ``size`` items, more than one, did not fit."""
        held = self._proven
        return held if held is not None and size // 2 < held < size else max(1, size // 2)

    def lower(self, size: int) -> None:
        """Not more than ``size`` items fit."""
        is_step_back = size == self._proven
        self._patience = min(2 * self._patience, MOST_PATIENCE) if is_step_back else PATIENCE
        self._now = max(1, min(self._now, size))
        self._proven, self._num_fitted = None, 0

    def fitted(self, size: int) -> None:
        """A batch of ``size`` items fitted; one below the limit says nothing about it."""
        if size < self._now:
            return
        if self._proven is not None:
            self._proven, self._patience = None, PATIENCE
        self._num_fitted += 1
        if self._num_fitted >= self._patience and self._now < self._most:
            self._proven, self._num_fitted = self._now, 0
            self._now = min(self._most, self._now + max(1, self._most // STEPS))

    def begun(self, size: int, start: Mark, end: Mark) -> None:
        """A pass over ``size`` items was handed to the device between two marks."""
        self._under_way = size, start, end

    def catch_up(self) -> None:
        """Waits for the end of the pass under way, if there is one, and learns its speed.

        Without it a GPU would be given pass after pass, and a click would wait for all of them.
        """
        if self._under_way is not None:
            (size, start, end), self._under_way = self._under_way, None
            self._item_s = end.seconds_since(start) / size


def run_halving(
    items: Sequence[Item],
    run: Callable[[Sequence[Item]], Sequence[Done]],
    runtime: Runtime,
    limit: BatchLimit,
) -> list[Done | FlorenceError]:
    """``run(items)``, in parts when memory ends; one value per item. ``limit`` learns from it."""
    try:
        done: list[Done | FlorenceError] = list(run(items))
    except (RuntimeError, MemoryError) as error:
        if not runtime.is_out_of_memory(error):
            raise
        logger.warning("%d item(s) did not fit into the memory of %s", len(items), runtime.device)
    else:
        limit.fitted(len(items))
        return done
    # Outside the handler: its traceback would keep the failed batch's tensors alive.
    runtime.free_memory()
    if len(items) == 1:
        return [out_of_memory(runtime.device)]
    size = limit.smaller(len(items))
    limit.lower(size)
    return [
        one
        for first in range(0, len(items), size)
        for one in run_halving(items[first : first + size], run, runtime, limit)
    ]

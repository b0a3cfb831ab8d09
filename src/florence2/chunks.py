"""Work in chunks of a stated size; what is given up before its turn is left out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from florence2.errors import FlorenceError
from florence2.memory import run_halving
from florence2.runtimes.base import Runtime
from florence2.stopping import BetweenPasses, Stop, watch_over

Item = TypeVar("Item", bound=Hashable)
Done = TypeVar("Done")


def run_in_chunks(
    stops: Mapping[Item, Stop | None],
    size: int,
    run: Callable[[Sequence[Item]], Sequence[Done]],
    runtime: Runtime,
    between_passes: BetweenPasses | None,
) -> dict[Item, Done | FlorenceError]:
    """What ``run`` gives for each item, or why the item was given up.

    ``stops`` has every item in order, with its Stop; both it and ``between_passes`` are called
    before every chunk. A chunk that does not fit into the memory of ``runtime`` is halved.
    """
    done: dict[Item, Done | FlorenceError] = {}
    left = list(stops)
    while left:
        given_up = watch_over([stops[item] for item in left], between_passes)()
        done |= {left[place]: reason for place, reason in given_up.items()}
        left = [item for item in left if item not in done]
        chunk, left = left[:size], left[size:]
        if chunk:
            done |= zip(chunk, run_halving(chunk, run, runtime), strict=True)
    return done

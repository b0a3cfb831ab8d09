"""Work in chunks of a stated size; what is given up before its turn is left out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from florence2.errors import FlorenceError
from florence2.stopping import BetweenPasses, Stop, watch_over

Item = TypeVar("Item", bound=Hashable)
Done = TypeVar("Done")


def run_in_chunks(
    stops: Mapping[Item, Stop | None],
    size: Callable[[], int],
    run: Callable[[Sequence[Item]], Sequence[Done]],
    between_passes: BetweenPasses | None,
) -> dict[Item, Done | FlorenceError]:
    """What ``run`` gives for each item, or why the item was given up.

    ``stops`` has every item in order, with its Stop; both it and ``between_passes`` are called
    before every chunk, and ``size`` says how large that is.
    """
    done: dict[Item, Done | FlorenceError] = {}
    left = list(stops)
    while left:
        given_up = watch_over([stops[item] for item in left], between_passes)()
        done |= {left[place]: reason for place, reason in given_up.items()}
        left = [item for item in left if item not in done]
        most = size()
        chunk, left = left[:most], left[most:]
        if chunk:
            done |= zip(chunk, run(chunk), strict=True)
    return done

"""How often the best logits are equal in bf16, and answers are those of float32.

    python bench/reduced_precision.py --scenes 64

Held-out scenes, the demo checkpoint on a CPU. "plain" takes the logits as the output projection
gives them, "best rescored" is what the engine does, "float32 head" computes the whole output
projection in float32 from the same decoder states.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Final
from unittest import mock

from torch import Tensor

from florence2 import Ask, Florence2
from florence2.network.florence import Florence2Network
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene

Head = Callable[[Florence2Network, Tensor, int], Tensor]
Tokens = list[tuple[int, ...]]

_rescored: Final = Florence2Network.next_logits


def _plain(network: Florence2Network, hidden: Tensor, _: int) -> Tensor:
    return network.lm_head(hidden).float()


def _float32(network: Florence2Network, hidden: Tensor, _: int) -> Tensor:
    return hidden.float() @ network.lm_head.weight.float().t()


HEADS: Final[dict[str, Head]] = {
    "plain": _plain,
    "best rescored": _rescored,
    "float32 head": _float32,
}


def main() -> None:
    """Prints a line per head."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task", default="<OD>")
    parser.add_argument("--beams", type=int, default=1)
    given = parser.parse_args()
    seeds = range(given.seed, given.seed + given.scenes)
    asks = [Ask(draw_scene(make_scene(seed)), given.task, num_beams=given.beams) for seed in seeds]
    exact, _, _ = _answers("fp32", asks, _rescored)
    for name, head in HEADS.items():
        found, ties, rows = _answers("bf16", asks, head)
        equal = sum(one == other for one, other in zip(found, exact, strict=True))
        print(
            f"{name}: the two best logits are equal in {ties} of {rows} rows; "
            f"{equal} of {len(asks)} answers are those of float32"
        )


def _answers(precision: str, asks: list[Ask], head: Head) -> tuple[Tokens, int, int]:
    """The tokens of every answer; how many rows had equal best logits, and of how many."""
    counted = [0, 0]

    def counting(network: Florence2Network, hidden: Tensor, num_exact: int) -> Tensor:
        logits = head(network, hidden, num_exact)
        best = logits.flatten(0, -2).topk(2).values
        counted[0] += int((best[:, 0] == best[:, 1]).sum())
        counted[1] += len(best)
        return logits

    with mock.patch.object(Florence2Network, "next_logits", counting):
        model = Florence2.load("demo", device="cpu", precision=precision)
        counted[:] = 0, 0
        # One by one: rows of a batch whose own answer has ended would be counted too.
        found = [model.run_many([ask])[0].token_ids for ask in asks]
    return found, counted[0], counted[1]


if __name__ == "__main__":
    main()

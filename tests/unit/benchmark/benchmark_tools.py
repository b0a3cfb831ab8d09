"""Rows and runs with stated seconds, for tests of what is made of them."""

from __future__ import annotations

from florence2.benchmark.plan import Case, Subject
from florence2.benchmark.results import SIDES, make_row
from florence2.benchmark.run import SideFailedError
from florence2.benchmark.sides import OTHERS, STAGES, Measured


def a_run(seconds, asks=1, measured=None, running_mib=100.0, ids=(7, 8)):
    """A run of ``seconds``, split evenly over the stages."""
    count = asks if measured is None else measured
    tokens = (ids,) * count + (None,) * (asks - count)
    stages_s = dict.fromkeys(STAGES, seconds / len(STAGES))
    return Measured(stages_s, tokens, 90.0, running_mib)


def a_row(seconds, case=None, size="base", precision="bf16", failed=None):
    """A row whose sides take ``seconds``: ours, the reference in fp32 and bf16, others."""
    case = case or Case(1, 1, 3, 30)
    runs = {
        side: [a_run(spent, case.asks)]
        for side, spent in zip(SIDES, seconds, strict=True)
        if spent is not None
    }
    return make_row(Subject(size, "torch", precision), case, runs, failed or {}, True)


class ScriptedSides:
    """Answers in the place of the processes; ``seconds`` by side, a text where a side fails."""

    def __init__(self, seconds, asks=1, measured=None):
        self.seconds = seconds
        self.asks = asks
        self.measured = measured or {}
        self.asked = []

    def ask(self, asked, case, round_index, limit_s):
        side = asked.name if asked.name == OTHERS else f"{asked.name}_{asked.precision}"
        self.asked.append((side, round_index))
        spent = self.seconds[side]
        if isinstance(spent, list):
            spent = spent[min(round_index, len(spent) - 1)]
        if isinstance(spent, str):
            raise SideFailedError(spent)
        return a_run(spent, self.asks, self.measured.get(side))

    def count(self, side):
        return sum(asked == side for asked, _ in self.asked)

"""Rows and runs with stated seconds, for tests of what is made of them."""

from __future__ import annotations

from florence2.benchmark.case import STAGES, Case, Timing
from florence2.benchmark.plan import Subject
from florence2.benchmark.process import Measured, SideFailedError
from florence2.benchmark.rows import OTHERS, OURS, REFERENCE_BF16, REFERENCE_FP32, make_row


def a_run(seconds, asks=1, measured=None, running_mib=100.0, ids=(7, 8)):
    """A run of ``seconds``, split evenly over the stages."""
    count = asks if measured is None else measured
    tokens = (ids,) * count + (None,) * (asks - count)
    stages_s = dict.fromkeys(STAGES, seconds / len(STAGES))
    return Measured(Timing(stages_s, tokens), 90.0, running_mib)


def a_row(seconds, case=None, size="base", precision="bf16", failed=None):
    """A row whose sides take ``seconds``: ours, the reference in fp32 and bf16, others."""
    case = case or Case(1, 1, 3, 30)
    sides = (OURS, REFERENCE_FP32, REFERENCE_BF16, OTHERS)
    runs = {
        side: [a_run(spent, case.asks)]
        for side, spent in zip(sides, seconds, strict=True)
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

    def ask(self, way, case, round_index, limit_s):
        side = name_of(way)
        self.asked.append((side, round_index))
        spent = self.seconds[side]
        if isinstance(spent, list):
            spent = spent[min(round_index, len(spent) - 1)]
        if isinstance(spent, str):
            raise SideFailedError(spent)
        return a_run(spent, self.asks, self.measured.get(side))

    def count(self, side):
        return sum(asked == side for asked, _ in self.asked)


def name_of(way):
    """How the rows name a side: the reference by its precision, ours by its own."""
    if way.name == "ours":
        return f"ours_{way.process.precision}"
    return OTHERS if way.name == OTHERS else f"reference_{way.process.precision}"

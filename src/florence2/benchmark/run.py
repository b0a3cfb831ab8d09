"""Runs the comparison: the sides take turns on each case, so all see the same machine."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from florence2.benchmark.case import Case
from florence2.benchmark.plan import BenchmarkPlan, Subject
from florence2.benchmark.process import Measured, Place, Process, SideFailedError, Way, Workers
from florence2.benchmark.rows import (
    OTHERS,
    OURS,
    REFERENCE_BF16,
    REFERENCE_FP32,
    Row,
    have_same_tokens,
    make_row,
)
from florence2.benchmark.weights import write_checkpoint
from florence2.runtimes.device import choose_device

# A whole reference is worth waiting for longer than one that nobody compares tokens with.
_REFERENCE_LIMITS: Final = 5

Ask = Callable[[Way, Case, int, float], Measured]


@dataclass(slots=True)
class _Figure:
    """The runs of one case on one side so far; the first is not timed where it was short."""

    way: Way
    runs: list[Measured] = field(default_factory=list)
    is_warmed_up: bool = False
    failed: str | None = None

    @property
    def timed(self) -> list[Measured]:
        return self.runs[1:] if self.is_warmed_up else self.runs

    def wants(self, plan: BenchmarkPlan) -> bool:
        """Whether another run is due, and fits into the figure's time."""
        if self.failed is not None or len(self.timed) >= plan.repeats:
            return False
        spent = [_spent_s(run) for run in self.timed]
        return not spent or sum(spent) + statistics.fmean(spent) <= plan.figure_limit_s

    def run(self, ask: Ask, case: Case, plan: BenchmarkPlan) -> None:
        share = 1 if self.way.name == OTHERS else _REFERENCE_LIMITS
        try:
            found = ask(self.way, case, len(self.runs), share * plan.figure_limit_s)
        except SideFailedError as error:
            self.failed = str(error)
            return
        self.is_warmed_up |= not self.runs and _spent_s(found) < plan.warm_up_below_s
        self.runs.append(found)


def run_benchmark(plan: BenchmarkPlan, show: Callable[[Row], None]) -> list[Row]:
    """Every row of the plan; ``show`` gets each as soon as it is measured."""
    rows: list[Row] = []
    for size, cases in plan.work().items():
        with tempfile.TemporaryDirectory(prefix="florence2-benchmark-") as name:
            write_checkpoint(size, Path(name))
            device = str(choose_device(plan.device))
            place = Place(Path(name), device, torch.get_num_threads(), plan.timeout_s)
            with Workers(place) as workers:
                for case, subjects in cases.items():
                    for row in measure(case, subjects, workers.run, plan):
                        rows.append(row)
                        show(row)
    return rows


def measure(case: Case, subjects: Iterable[Subject], ask: Ask, plan: BenchmarkPlan) -> list[Row]:
    """One case on every side, in turns; one row per subject.

    A side that fails has its reason in the rows, and the others go on.
    """
    ours = {
        subject: _Figure(Way(Process("ours", subject.runtime, subject.precision), OURS))
        for subject in subjects
    }
    theirs = {side: _Figure(way) for side, way in _compared(plan).items()}
    figures = [*ours.values(), *theirs.values()]
    while any(figure.wants(plan) for figure in figures):
        for figure in figures:
            if figure.wants(plan):
                figure.run(ask, case, plan)
    return [_row(subject, case, figure, theirs) for subject, figure in ours.items()]


def _compared(plan: BenchmarkPlan) -> dict[str, Way]:
    fp32 = Process("reference", "transformers", "fp32")
    ways = {REFERENCE_FP32: Way(fp32, "reference")}
    if plan.reference_bf16:
        ways[REFERENCE_BF16] = Way(Process("reference", "transformers", "bf16"), "reference")
    if plan.others:
        ways[OTHERS] = Way(fp32, OTHERS)
    return ways


def _row(subject: Subject, case: Case, ours: _Figure, theirs: dict[str, _Figure]) -> Row:
    sides = {OURS: ours, **theirs}
    pairs = list(zip(ours.runs, theirs[REFERENCE_FP32].runs, strict=False))
    return make_row(
        subject,
        case,
        {side: figure.timed for side, figure in sides.items() if figure.timed},
        {side: figure.failed for side, figure in sides.items() if figure.failed is not None},
        all(have_same_tokens(*pair) for pair in pairs) if pairs else None,
    )


def _spent_s(run: Measured) -> float:
    return sum(run.timing.stages_s.values())

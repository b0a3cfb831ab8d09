"""Runs the comparison: the two sides take turns on each case, so both see the same machine."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

from florence2.benchmark.case import Case
from florence2.benchmark.weights import size_config, write_weights
from florence2.errors import FlorenceError, RequestError, unknown_name
from florence2.runtimes.torch import check_precision, choose_device

SIZES: Final = ("base", "large", "tiny")
STAGES: Final = ("vision_s", "prompt_s", "decode_s")


@dataclass(frozen=True, slots=True)
class BenchmarkPlan:
    """The axes of the table, and how each figure is measured."""

    sizes: Sequence[str] = ("base", "large")
    batches: Sequence[int] = (1,)
    prompts: Sequence[int] = (1,)
    beams: Sequence[int] = (3,)
    tokens: Sequence[int] = (30, 100)
    device: str = "cpu"
    precision: str = "fp32"
    repeats: int = 3
    reference_bf16: bool = True

    def cases(self) -> list[Case]:
        """Every combination of the axes; RequestError for a plan that cannot be run."""
        self._check()
        return [
            Case(*axes) for axes in product(self.batches, self.prompts, self.beams, self.tokens)
        ]

    def _check(self) -> None:
        for size in self.sizes:
            if size not in SIZES:
                raise RequestError(unknown_name("size", size, SIZES))
        check_precision(self.precision, choose_device(self.device))
        longest = size_config("base").text.max_position_embeddings
        if max(self.tokens) > longest:
            raise RequestError(
                f"An answer can have at most {longest} tokens, and {max(self.tokens)} were asked "
                "for; measure fewer."
            )
        if self.repeats < 1:
            raise RequestError(
                f"Every figure needs at least 1 timed run, and {self.repeats} were asked for."
            )


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; seconds are medians, memory is the process's peak so far."""

    size: str
    precision: str
    batch: int
    prompts: int
    beams: int
    tokens: int
    ours_s: float
    reference_fp32_s: float
    reference_bf16_s: float | None
    ratio_fp32: float
    ratio_bf16: float | None
    peak_memory_mib: float
    reference_peak_memory_mib: float
    same_tokens: bool
    ours_stages_s: dict[str, float]
    reference_stages_s: dict[str, float]


class Worker:
    """A side in a process of its own."""

    def __init__(self, kind: str, folder: Path, precision: str, plan: BenchmarkPlan) -> None:
        threads = os.cpu_count() or 1
        command = [sys.executable, "-m", "florence2.benchmark.worker", kind, str(folder)]
        command += [plan.device, precision, str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def _read(self) -> str:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise FlorenceError(
                f"A side of the benchmark ended with code {self.process.wait()}; its messages are "
                "above."
            )
        return line

    def run(self, case: Case) -> dict[str, Any]:
        """One timed run."""
        if self.process.stdin is None:
            raise FlorenceError("The side of the benchmark was started without an input.")
        self.process.stdin.write(json.dumps(asdict(case)) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self._read()))

    def close(self) -> None:
        """Ends the process."""
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait(timeout=60)


@contextmanager
def _workers(folder: Path, plan: BenchmarkPlan) -> Iterator[dict[str, Worker]]:
    sides = {"ours": ("ours", plan.precision), "fp32": ("reference", "fp32")}
    if plan.reference_bf16:
        sides["bf16"] = ("reference", "bf16")
    with ExitStack() as stack:
        started: dict[str, Worker] = {}
        for name, (kind, precision) in sides.items():
            started[name] = Worker(kind, folder, precision, plan)
            stack.callback(started[name].close)
        yield started


def run_benchmark(plan: BenchmarkPlan, show: Callable[[Row], None]) -> list[Row]:
    """Every row of the plan; ``show`` gets each as soon as it is measured."""
    rows: list[Row] = []
    cases = plan.cases()
    for size in plan.sizes:
        with tempfile.TemporaryDirectory(prefix="florence2-benchmark-") as name:
            folder = Path(name)
            write_weights(size, folder)
            with _workers(folder, plan) as workers:
                for case in cases:
                    rows.append(measure(size, case, workers, plan))
                    show(rows[-1])
    return rows


def measure(size: str, case: Case, workers: dict[str, Worker], plan: BenchmarkPlan) -> Row:
    """One case on every side: a warm-up, then the sides in turn, ``repeats`` times."""
    for worker in workers.values():
        worker.run(case)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for _ in range(plan.repeats):
        for name, worker in workers.items():
            runs[name].append(worker.run(case))
    stages = {name: _median_stages(found) for name, found in runs.items()}
    whole = {
        name: statistics.median(sum(run[stage] for stage in STAGES) for run in found)
        for name, found in runs.items()
    }
    bf16 = whole.get("bf16")
    return Row(
        size=size,
        precision=plan.precision,
        **asdict(case),
        ours_s=whole["ours"],
        reference_fp32_s=whole["fp32"],
        reference_bf16_s=bf16,
        ratio_fp32=whole["fp32"] / whole["ours"],
        ratio_bf16=bf16 / whole["ours"] if bf16 else None,
        peak_memory_mib=runs["ours"][-1]["peak_memory_mib"],
        reference_peak_memory_mib=runs["fp32"][-1]["peak_memory_mib"],
        same_tokens=runs["ours"][-1]["token_ids"] == runs["fp32"][-1]["token_ids"],
        ours_stages_s=stages["ours"],
        reference_stages_s=stages["fp32"],
    )


def _median_stages(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {stage: statistics.median(run[stage] for run in runs) for stage in STAGES}

"""A side in a process of its own, so that its memory is its own and its end is not ours.

Reads a question a line from stdin, answers with a JSON line: the stages' seconds, the tokens and
the peak memory, or why the run failed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TextIO

import torch

from florence2.benchmark.case import Case, Timing
from florence2.benchmark.memory_use import PeakMemory, be_ended_first
from florence2.benchmark.our_side import OurSide
from florence2.benchmark.reference_side import ReferenceSide
from florence2.errors import FlorenceError

Run = Callable[[Case, int, float], Timing]

WARM_UP: Final = Case(batch=1, prompts=1, beams=1, tokens=8)
WARM_UP_ROUND: Final = 1_000_000
# What torch and the libraries below it raise when they lack memory or a kernel for a precision.
_FAILURES: Final = (FlorenceError, RuntimeError, MemoryError)


def make_runs(kind: str, folder: Path, device: str, runtime: str, precision: str) -> dict[str, Run]:
    """The ways to run a case with what is loaded here, by name."""
    if kind == "ours":
        return {"ours": OurSide(folder, device, runtime, precision).run}
    reference = ReferenceSide(folder, device, precision)
    return {"reference": reference.run_reference, "others": reference.run_others}


def main() -> None:
    """``... ours|reference FOLDER DEVICE RUNTIME PRECISION THREADS``."""
    kind, folder, device, runtime, precision, threads = sys.argv[1:]
    answers = _own_output()
    be_ended_first()
    torch.set_num_threads(int(threads))
    memory = PeakMemory(device)
    try:
        runs = make_runs(kind, Path(folder), device, runtime, precision)
        # Every side has answered once before it is timed, as ours has when it is loaded.
        next(iter(runs.values()))(WARM_UP, WARM_UP_ROUND, 0.0)
    except _FAILURES as error:
        _say(answers, _failure(error))
        return
    _say(answers, {"peak_memory_mib": memory.peak_mib()})
    for line in sys.stdin:
        _say(answers, _answer(json.loads(line), runs, memory))


def _answer(question: Mapping[str, Any], runs: Mapping[str, Run], memory: PeakMemory) -> Any:  # noqa: ANN401
    memory.restart()
    try:
        run = runs[question["way"]]
        timing = run(Case(**question["case"]), question["round_index"], question["limit_s"])
    except _FAILURES as error:
        return _failure(error)
    return asdict(timing) | {"peak_memory_mib": memory.peak_mib()}


def _failure(error: BaseException) -> dict[str, str]:
    lines = str(error).splitlines() or [type(error).__name__]
    return {"failed": lines[0]}


def _own_output() -> TextIO:
    """Where answers go; whatever else is printed, also by libraries in C, goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, content: Mapping[str, Any]) -> None:
    print(json.dumps(content), file=answers, flush=True)


if __name__ == "__main__":
    main()

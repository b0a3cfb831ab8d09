"""Runs the comparison: the sides take turns on each case, so all see the same machine.

Each side answers in a process of its own; one that ends does not end the benchmark.
"""

from __future__ import annotations

import json
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

import torch
from safetensors.torch import save_file

from florence2.benchmark.plan import BenchmarkPlan, Case, Subject, all_texts, size_config
from florence2.benchmark.report import row_sentence
from florence2.benchmark.results import (
    REFERENCE_BF16,
    REFERENCE_FP32,
    Row,
    describe_machine,
    have_same_tokens,
    make_row,
    save_rows,
)
from florence2.benchmark.sides import CONVERT, OTHERS, OURS, REFERENCE, Measured
from florence2.benchmark.tokenizer_training import build_tokenizer
from florence2.errors import FlorenceError, shown_s
from florence2.network.florence import Florence2Network
from florence2.runtimes.device import choose_device
from florence2.tasks import TASKS
from florence2.tokens import ADDED_TOKENS, EOS_ID

_END_LIMIT_S: Final = 60.0
# A whole reference is worth waiting for longer than one that nobody compares tokens with.
_REFERENCE_LIMITS: Final = 5
# The words of all prompts; the rest of the embedding's rows are tokens that nobody spells.
_SPELLED: Final = 400


class SideFailedError(FlorenceError):
    """A side gave no figure for a case; the text is what its row says."""

    code = "side_failed"


@dataclass(frozen=True, slots=True)
class Side:
    """One side of the comparison: who answers (OURS, REFERENCE, OTHERS), and how it is loaded."""

    name: str
    runtime: str
    precision: str

    @property
    def process(self) -> tuple[str, str, str]:
        """What is loaded for it, once: both ways to ask the reference share a process."""
        return OURS if self.name == OURS else REFERENCE, self.runtime, self.precision


Ask = Callable[[Side, Case, int, float], Measured]
"""Answers a case: the side, the case, the round's number, and the seconds it may take."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What all sides run on: the checkpoint, the device, and the limit of every wait."""

    folder: Path
    device: str
    threads: int
    timeout_s: float

    def folder_of(self, side: Side) -> Path:
        """What a side loads: the checkpoint, or its conversion."""
        is_converted = side.runtime == "openvino"
        return self.folder / f"openvino-{side.precision}" if is_converted else self.folder


class Worker:
    """A side's process."""

    def __init__(self, side: Side, setup: Setup) -> None:
        """Waits until it has loaded; SideFailedError if it cannot."""
        self._timeout_s = setup.timeout_s
        folder = setup.folder_of(side)
        if not folder.is_dir():
            _convert(setup.folder, folder, side.precision)
        command = [sys.executable, "-m", "florence2.benchmark.sides", *side.process]
        command += [str(folder), setup.device, str(setup.threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def run(self, side: Side, case: Case, round_index: int, limit_s: float) -> Measured:
        """One timed run; SideFailedError if there is no answer."""
        question = {
            "way": side.name,
            "case": asdict(case),
            "round_index": round_index,
            "limit_s": limit_s,
        }
        if self._process.stdin is None:
            raise SideFailedError("it was started without an input")
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise SideFailedError(self._end()) from error
        found = self._read()
        tokens = tuple(None if ids is None else tuple(ids) for ids in found["token_ids"])
        return Measured(**found | {"token_ids": tokens})

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked again."""
        return self._process.poll() is None

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            # A process that has ended may have left a question unread.
            with suppress(BrokenPipeError):
                if pipe:
                    pipe.close()
        self._wait()

    def _wait(self) -> int:
        """The code that it ended with; it is ended where it does not end by itself."""
        try:
            return self._process.wait(timeout=_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _read(self) -> dict[str, Any]:
        output = self._process.stdout
        if output is None:
            raise SideFailedError("it was started without an output")
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            # A side writes one line per question, so none can wait in the buffer.
            if not selector.select(self._timeout_s):
                self._process.kill()
                self._wait()
                raise SideFailedError(
                    f"no answer within {shown_s(self._timeout_s)} (--timeout sets how long to wait)"
                )
        line = output.readline()
        if not line:
            raise SideFailedError(self._end())
        found: dict[str, Any] = json.loads(line)
        if "failed" in found:
            raise SideFailedError(str(found["failed"]))
        return found

    def _end(self) -> str:
        code = self._wait()
        if code == -signal.SIGKILL:
            return "the system ended it, most likely for want of memory"
        return f"it ended with code {code}, and its messages are above the table"


def _convert(folder: Path, out: Path, precision: str) -> None:
    """In a process of its own, whose memory and time are not counted; SideFailedError."""
    command = [sys.executable, "-m", "florence2.benchmark.sides", CONVERT, precision]
    done = subprocess.run([*command, str(folder), str(out)], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing was said"]
        raise SideFailedError(f"it could not be converted ({lines[-1]})")


class Workers:
    """The processes of one checkpoint, started when they are first needed."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._started: dict[tuple[str, str, str], Worker] = {}
        self._unusable: dict[tuple[str, str, str], str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, side: Side, case: Case, round_index: int, limit_s: float) -> Measured:
        """One timed run; SideFailedError for a side that gives none, others are not touched."""
        return self._worker(side).run(side, case, round_index, limit_s)

    def _worker(self, side: Side) -> Worker:
        if side.process in self._unusable:
            raise SideFailedError(self._unusable[side.process])
        worker = self._started.get(side.process)
        if worker is None or not worker.is_alive:
            try:
                worker = self._started[side.process] = Worker(side, self._setup)
            except SideFailedError as error:
                self._unusable[side.process] = str(error)
                raise
            self._stack.callback(worker.close)
        return worker


@dataclass(slots=True)
class _Figure:
    """The runs of one case on one side so far; the first is not timed where it was short."""

    side: Side
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
        spent = [run.spent_s for run in self.timed]
        return not spent or sum(spent) + statistics.fmean(spent) <= plan.figure_limit_s

    def run(self, ask: Ask, case: Case, plan: BenchmarkPlan) -> None:
        share = 1 if self.side.name == OTHERS else _REFERENCE_LIMITS
        try:
            found = ask(self.side, case, len(self.runs), share * plan.figure_limit_s)
        except SideFailedError as error:
            self.failed = str(error)
            return
        self.is_warmed_up |= not self.runs and found.spent_s < plan.warm_up_below_s
        self.runs.append(found)


def run_benchmark(
    plan: BenchmarkPlan, json_file: Path | None, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Row]]:
    """Measures the plan: the machine, and every row.

    The file has each row as soon as it is measured, and ``say`` gets a sentence about it.
    """
    machine = describe_machine(plan.device)
    rows: list[Row] = []
    for size, cases in plan.work().items():
        with tempfile.TemporaryDirectory(prefix="florence2-benchmark-") as name:
            write_checkpoint(size, Path(name))
            device = str(choose_device(plan.device))
            setup = Setup(Path(name), device, torch.get_num_threads(), plan.timeout_s)
            with Workers(setup) as workers:
                for case, subjects in cases.items():
                    for row in measure(case, subjects, workers.run, plan):
                        rows.append(row)
                        say(row_sentence(row))
                        if json_file is not None:
                            save_rows(json_file, machine, rows)
    return machine, rows


def measure(case: Case, subjects: Iterable[Subject], ask: Ask, plan: BenchmarkPlan) -> list[Row]:
    """One case on every side, in turns; one row per subject.

    A side that fails has its reason in the rows, and the others go on.
    """
    ours = {
        subject: _Figure(Side(OURS, subject.runtime, subject.precision)) for subject in subjects
    }
    theirs = {name: _Figure(side) for name, side in _compared(plan).items()}
    figures = [*ours.values(), *theirs.values()]
    while any(figure.wants(plan) for figure in figures):
        for figure in figures:
            if figure.wants(plan):
                figure.run(ask, case, plan)
    return [_row(subject, case, figure, theirs) for subject, figure in ours.items()]


def _compared(plan: BenchmarkPlan) -> dict[str, Side]:
    sides = {REFERENCE_FP32: Side(REFERENCE, "transformers", "fp32")}
    if plan.reference_bf16:
        sides[REFERENCE_BF16] = Side(REFERENCE, "transformers", "bf16")
    if plan.others:
        sides[OTHERS] = Side(OTHERS, "transformers", "fp32")
    return sides


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


def write_checkpoint(size: str, folder: Path) -> None:
    """Writes a whole random checkpoint, weights in float16 as published.

    The embedding of ``</s>`` is zero, so that its logit never ranks among the first and every
    answer runs to the token limit: all sides then do the same work.
    """
    texts = [task.sentence.replace("{input}", text) for text in all_texts() for task in TASKS]
    build_tokenizer(folder, texts, _SPELLED)
    torch.manual_seed(1)
    config = replace(size_config(size), image_token_id=_SPELLED + len(ADDED_TOKENS))
    network = Florence2Network(config)
    with torch.no_grad():
        network.model.language_model.shared.weight[EOS_ID] = 0.0
    state = {name: value.to(torch.float16) for name, value in network.native_state().items()}
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_native_dict()), encoding="utf-8")

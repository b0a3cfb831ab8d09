"""Starts the sides' processes and asks them; a side that ends does not end the benchmark."""

from __future__ import annotations

import json
import selectors
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from florence2.benchmark.case import Case, Timing
from florence2.errors import FlorenceError, shown_s

_END_LIMIT_S: Final = 60.0


class SideFailedError(FlorenceError):
    """A side gave no figure for a case; the text is what its row says."""

    code = "side_failed"


@dataclass(frozen=True, slots=True)
class Process:
    """What is loaded once: ``kind`` is ours or reference."""

    kind: str
    runtime: str
    precision: str


@dataclass(frozen=True, slots=True)
class Way:
    """One side of the comparison: a process, and what it is asked to do."""

    process: Process
    name: str


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of a case on one side; memory as ``PeakMemory`` counts it."""

    timing: Timing
    loading_mib: float
    running_mib: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where the sides run: the checkpoint, the device, and the limit of every wait."""

    folder: Path
    device: str
    threads: int
    timeout_s: float


class Worker:
    """A side's process."""

    def __init__(self, process: Process, place: Place) -> None:
        """Waits until it has loaded; SideFailedError if it cannot."""
        self._timeout_s = place.timeout_s
        command = [sys.executable, "-m", "florence2.benchmark.worker", process.kind]
        command += [str(place.folder), place.device, process.runtime, process.precision]
        self._process = subprocess.Popen(
            [*command, str(place.threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.loading_mib: float = self._read()["peak_memory_mib"]

    def run(self, way: str, case: Case, round_index: int, limit_s: float) -> Measured:
        """One timed run; SideFailedError if there is no answer."""
        question = {
            "way": way,
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
        timing = Timing(found["stages_s"], tokens)
        return Measured(timing, self.loading_mib, found["peak_memory_mib"])

    @property
    def process_id(self) -> int:
        """The system's number of the process."""
        return self._process.pid

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


class Workers:
    """The processes of one checkpoint, started when they are first needed."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._started: dict[Process, Worker] = {}
        self._unusable: dict[Process, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def run(self, way: Way, case: Case, round_index: int, limit_s: float) -> Measured:
        """One timed run; SideFailedError for a side that gives none, others are not touched."""
        return self._worker(way.process).run(way.name, case, round_index, limit_s)

    @property
    def process_ids(self) -> dict[Process, int]:
        """The system's numbers of the processes that were started."""
        return {process: worker.process_id for process, worker in self._started.items()}

    def _worker(self, process: Process) -> Worker:
        if process in self._unusable:
            raise SideFailedError(self._unusable[process])
        worker = self._started.get(process)
        if worker is None or not worker.is_alive:
            worker = self._started[process] = self._start(process)
        return worker

    def _start(self, process: Process) -> Worker:
        try:
            worker = Worker(process, self._place)
        except SideFailedError as error:
            self._unusable[process] = str(error)
            raise
        self._stack.callback(worker.close)
        return worker

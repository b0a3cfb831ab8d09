"""What a run shows while it works, and how it is told to stop."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Final

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from florence2.errors import shown_s
from serve.console import ERR, say

_LINE_EVERY_S: Final = 30.0


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.2f} {self._unit}/s" if speed else f"- {self._unit}/s")


@contextmanager
def progress_bar(
    total: int | Callable[[], int], doing: str = "Labeling", unit: str = "images"
) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left; without a terminal, a line every half minute.

    What it gives is told how many images (or what ``unit`` names) were done since it was last told.
    A ``total`` that grows is asked for each time.
    """
    total_now = total if callable(total) else lambda: total
    if not ERR.is_terminal:
        yield _Lines(total_now, unit)
        return
    columns = (
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=ERR, speed_estimate_period=120.0) as bar:
        task = bar.add_task("", total=total_now())
        yield lambda images: bar.update(task, advance=images, total=total_now())


class _Lines:
    def __init__(self, total: Callable[[], int], unit: str) -> None:
        self._total, self._done, self._unit = total, 0, unit
        self._started = self._said = time.monotonic()

    def __call__(self, images: int, /) -> None:
        self._done += images
        now = time.monotonic()
        if now - self._said < _LINE_EVERY_S:
            return
        self._said = now
        rate = self._done / (now - self._started)
        total = self._total()
        left = max(0, total - self._done) / rate
        done = f"{self._done}/{total} {self._unit}"
        say(f"{done}, {rate:.2f} {self._unit}/s, {shown_s(left)} left")


@dataclass(slots=True)
class StopSwitch:
    """Pulled by the first Ctrl-C; the second one interrupts, as does any between the batches' work.

    Only labeling waits for its batch: loading a model or writing an export stops at once.
    ``interrupted`` is set once the process is to end.
    """

    pulled: bool = False
    interrupted: threading.Event = field(default_factory=threading.Event)
    _is_patient: bool = False

    def __call__(self) -> bool:
        return self.pulled

    @contextmanager
    def after_batch(self) -> Iterator[None]:
        """While open, the first signal only pulls the switch."""
        self._is_patient = True
        try:
            yield
        finally:
            self._is_patient = False

    def pull(self, signum: int, frame: FrameType | None) -> None:
        if self.pulled or not self._is_patient:
            self.interrupted.set()
            raise KeyboardInterrupt
        self.pulled = True
        say("Stopping after the batch in hand; press Ctrl-C again to stop at once.")


@contextmanager
def stop_on_signals() -> Iterator[StopSwitch]:
    """While open, Ctrl-C, a polite kill and a closed terminal pull the switch instead of ending the
    process."""
    switch = StopSwitch()
    before = {number: signal.signal(number, switch.pull) for number in _signals()}
    try:
        yield switch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signals() -> list[signal.Signals]:
    wanted = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        # Under nohup it stays ignored.
        wanted.append(signal.SIGHUP)
    return wanted

"""What a run of the benchmark measures, and how long a figure may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

from florence2.api import RUNTIMES
from florence2.benchmark.case import Case
from florence2.benchmark.weights import SIZES, size_config
from florence2.errors import RequestError, unknown_name
from florence2.runtimes.device import check_precision, choose_device, choose_precision

KNOWN_RUNTIMES: Final = tuple(name for name in RUNTIMES if name != "auto")


@dataclass(frozen=True, slots=True)
class Axes:
    """A block of the table: every combination of the axes."""

    sizes: Sequence[str] = ("base", "large")
    runtimes: Sequence[str] = ("torch",)
    precisions: Sequence[str] = ("fp32",)
    batches: Sequence[int] = (1,)
    prompts: Sequence[int] = (1,)
    beams: Sequence[int] = (3,)
    tokens: Sequence[int] = (30, 100)

    def cases(self) -> list[Case]:
        """Every combination of batch, prompts, beams and tokens."""
        return [
            Case(*axes) for axes in product(self.batches, self.prompts, self.beams, self.tokens)
        ]


CHOSEN: Final = (
    Axes(("base",), precisions=("fp32", "bf16")),
    Axes(("base",), precisions=("bf16",), beams=(1,), tokens=(30,)),
    Axes(("base",), precisions=("bf16",), batches=(8,), tokens=(30,)),
    Axes(("base",), precisions=("bf16",), prompts=(5,)),
    Axes(("base",), precisions=("bf16",), prompts=(20,), tokens=(30,)),
    Axes(("large",), precisions=("bf16",)),
)
"""A selection that two CPU cores finish in less than half an hour."""

FULL: Final = (
    Axes(precisions=("fp32", "bf16"), batches=(1, 8, 32), prompts=(1, 5, 20), beams=(1, 3)),
)


@dataclass(frozen=True, slots=True)
class Subject:
    """What of ours is measured: one checkpoint size on one runtime in one precision."""

    size: str
    runtime: str
    precision: str


@dataclass(frozen=True, slots=True)
class BenchmarkPlan:
    """The blocks of the table, and how each figure is measured.

    A figure is the median of at most ``repeats`` runs; after the first of them no run is begun
    that would take the figure over ``figure_limit_s`` seconds. Within a run the side that answers
    one prompt at a time begins no further answer after that time, and the reference no further
    prompt after five times that time. A first run shorter than ``warm_up_below_s`` is not
    counted. A side that does not answer within ``timeout_s`` is ended.
    """

    blocks: Sequence[Axes] = CHOSEN
    device: str = "cpu"
    repeats: int = 3
    figure_limit_s: float = 30.0
    warm_up_below_s: float = 15.0
    timeout_s: float = 3600.0
    reference_bf16: bool = True
    others: bool = True

    def __post_init__(self) -> None:
        """RequestError for a plan that cannot be run."""
        if self.repeats < 1:
            raise RequestError(
                f"Every figure needs at least 1 timed run, and {self.repeats} were asked for."
            )
        for axes in self.blocks:
            self._check(axes)

    def work(self) -> dict[str, dict[Case, list[Subject]]]:
        """For each size its cases in order, and for each case what of ours is measured."""
        found: dict[str, dict[Case, list[Subject]]] = {}
        for axes in self.blocks:
            for size, runtime, precision, case in product(
                axes.sizes, axes.runtimes, axes.precisions, axes.cases()
            ):
                used = choose_precision(
                    precision, choose_device(self.device), size_config(size).text.d_model
                )
                subjects = found.setdefault(size, {}).setdefault(case, [])
                subject = Subject(size, runtime, used)
                if subject not in subjects:
                    subjects.append(subject)
        return found

    def _check(self, axes: Axes) -> None:
        for size in axes.sizes:
            if size not in SIZES:
                raise RequestError(unknown_name("size", size, SIZES))
        for runtime in axes.runtimes:
            if runtime not in KNOWN_RUNTIMES:
                raise RequestError(unknown_name("runtime", runtime, KNOWN_RUNTIMES))
        for precision in axes.precisions:
            check_precision(precision, choose_device(self.device))
        longest = min(size_config(size).text.max_position_embeddings for size in axes.sizes)
        if max(axes.tokens) > longest:
            raise RequestError(
                f"An answer can have at most {longest} tokens, and {max(axes.tokens)} were asked "
                "for; measure fewer."
            )

"""What a run of the benchmark measures: cases, their images and prompts, and the rows of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

import numpy as np
from PIL import Image

from florence2.api import RUNTIMES
from florence2.conversion.kept import check_choice
from florence2.errors import RequestError, unknown_name
from florence2.network.config import NetworkConfig, base_config, large_config, tiny_config
from florence2.records import SizeWh
from florence2.runtimes.device import check_precision, choose_device, choose_precision

TASK: Final = "<CAPTION_TO_PHRASE_GROUNDING>"
IMAGE_SIZE_WH: Final[SizeWh] = (1280, 720)
_COLOURS: Final = ("red", "green", "blue", "white", "black")
_THINGS: Final = ("car", "tree", "house", "dog", "boat", "star", "bird", "lamp", "sign", "door")
SIZES: Final = ("base", "large", "tiny")
VOCABULARY: Final = 51328
KNOWN_RUNTIMES: Final = tuple(name for name in RUNTIMES if name != "auto")


@dataclass(frozen=True, slots=True)
class Case:
    """``batch`` images with ``prompts`` prompts each, every answer ``tokens`` tokens long."""

    batch: int
    prompts: int
    beams: int
    tokens: int

    @property
    def asks(self) -> int:
        """Answers of the whole case."""
        return self.batch * self.prompts


def case_images(case: Case, round_index: int) -> list[Image.Image]:
    """The RGB images, ``case.batch`` of them: noise, the same on all sides.

    Every round has images of its own, so that nothing kept from an earlier round can help.
    """
    generator = np.random.default_rng([5, round_index])
    width, height = IMAGE_SIZE_WH
    return [
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for _ in range(case.batch)
    ]


def case_texts(case: Case) -> list[str]:
    """What the prompts ask for, ``case.prompts`` texts; a prompt with one has 13 tokens."""
    return [
        f"a {_COLOURS[place % len(_COLOURS)]} {_THINGS[place % len(_THINGS)]}"
        for place in range(case.prompts)
    ]


def all_texts() -> list[str]:
    """Every text that a case can ask for, for the tokenizer to know their words."""
    return [f"a {colour} {thing}" for colour in _COLOURS for thing in _THINGS]


def size_config(size: str) -> NetworkConfig:
    """The shape of ``base`` or ``large``; ``tiny`` is for trying the benchmark itself."""
    if size == "tiny":
        # 24 visual tokens a side, as at full size, but from a very small network.
        return tiny_config(vocab_size=VOCABULARY, max_positions=1024, patch_stride=(4, 2, 2, 2))
    return {"base": base_config, "large": large_config}[size](VOCABULARY)


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
    Axes(("base",), ("openvino",), ("fp32", "bf16", "int8")),
    Axes(("base",), ("openvino",), ("bf16", "int8"), prompts=(5,)),
    Axes(("large",), precisions=("bf16",)),
    Axes(("large",), ("openvino",), ("fp32", "bf16", "int8")),
    Axes(("large",), ("openvino",), ("int8",), prompts=(5,)),
)
"""A selection for two CPU cores and an hour or more."""

FULL: Final = (
    Axes(precisions=("fp32", "bf16"), batches=(1, 8, 32), prompts=(1, 5, 20), beams=(1, 3)),
)
_COUNTED: Final = ("batches", "prompts", "beams", "tokens")


def named_blocks(options: Mapping[str, str | None], *, full: bool) -> Sequence[Axes]:
    """The blocks that were asked for; ``options`` has for each axis its values with commas.

    Raises RequestError for counts that are none, and for axes beside ``full``.
    """
    given = {axis: text for axis, text in options.items() if text is not None}
    named: dict[str, Any] = {axis: _values(axis, text) for axis, text in given.items()}
    if full and named:
        raise RequestError(
            f"--full measures every combination, and {', '.join(named)} were named besides; "
            "leave out one of the two."
        )
    if full:
        return FULL
    return (Axes(**named),) if named else CHOSEN


def _values(axis: str, text: str) -> list[str] | list[int]:
    parts = [part.strip() for part in text.split(",")]
    if axis not in _COUNTED:
        return parts
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise RequestError(
            f"The {axis} are whole numbers of at least 1, separated by commas, and {text!r} was "
            "received."
        )
    return [int(part) for part in parts]


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
            for runtime in axes.runtimes:
                check_choice(runtime, choose_device(self.device), precision)
        longest = min(size_config(size).text.max_position_embeddings for size in axes.sizes)
        if max(axes.tokens) > longest:
            raise RequestError(
                f"An answer can have at most {longest} tokens, and {max(axes.tokens)} were asked "
                "for; measure fewer."
            )

"""How the rows of a benchmark are shown: a sentence each, one table, and the notes below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.table import Table

from florence2.benchmark.growth import Growth, growth_of
from florence2.benchmark.rows import OTHERS, OURS, REFERENCE_BF16, REFERENCE_FP32, Row

# A fixed width: columns cut to a pipe's 80 characters would be useless.
_WIDTH: Final = 178
_STAGES: Final = ("preprocess", "vision", "prompt", "decode")
_SIDES: Final = {
    OURS: "ours",
    REFERENCE_FP32: "the reference in fp32",
    REFERENCE_BF16: "the reference in bf16",
    OTHERS: "one prompt at a time",
}
_HEADING: Final = (
    "seconds and MiB: ours / generate() of transformers in fp32; ratios: generate() in fp32, "
    "in bf16, and one prompt at a time, over ours; all in the same run"
)


def row_sentence(row: Row) -> str:
    """What is said while the run goes on."""
    axes = (
        f"{row.size} {row.precision}, batch {row.batch}, prompts {row.prompts}, "
        f"beams {row.beams}, tokens {row.tokens}"
    )
    if row.ours_s is None:
        return f"{axes}: failed: {row.failed.get(OURS, 'no figure')}"
    if row.ratio_fp32 is None:
        return f"{axes}: {row.ours_s:.2f} s, the reference failed: {row.failed[REFERENCE_FP32]}"
    return f"{axes}: {row.ours_s:.2f} s, the reference takes {row.ratio_fp32:.2f} times as long"


def print_results(rows: Sequence[Row]) -> None:
    """The table, what is to be known about its figures, and how the cost grows."""
    console = Console(width=_WIDTH, highlight=False)
    console.print(_table(rows))
    for line in (*_notes(rows), *(_growth_sentence(one) for one in growth_of(rows))):
        console.print(line, markup=False)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title=_HEADING, box=None)
    for name in ("size", "precision", "batch", "prompts", "beams", "tokens"):
        table.add_column(name)
    ratios = ("fp32", "bf16", "one by one")
    for name in (*_STAGES, "whole", *ratios, "MiB", "same", "runs"):
        table.add_column(name, justify="right")
    for row in rows:
        axes = (row.size, row.precision, row.batch, row.prompts, row.beams, row.tokens)
        table.add_row(*(str(axis) for axis in axes), *_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    ours, reference = row.stages_s.get(OURS, {}), row.stages_s.get(REFERENCE_FP32, {})
    stages = [(ours.get(f"{name}_s"), reference.get(f"{name}_s")) for name in _STAGES]
    counted = "*" if row.others_measured_asks not in (None, row.asks) else ""
    return [
        *(_pair(*stage) for stage in stages),
        _pair(row.ours_s, row.reference_fp32_s),
        _ratio(row.ratio_fp32),
        _ratio(row.ratio_bf16),
        _ratio(row.ratio_others) + counted,
        f"{_mib(row.peak_memory_mib)} / {_mib(row.reference_peak_memory_mib)}",
        {True: "yes", False: "no", None: "-"}[row.same_tokens],
        "/".join(str(row.runs.get(side, 0)) for side in _SIDES),
    ]


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = [
        "runs: timed runs of ours, of the reference in fp32 and bf16, and one by one. "
        "same: the tokens are those of the reference in fp32."
    ]
    for row in rows:
        where = f"{row.size} {row.precision} {row.batch}x{row.prompts}x{row.beams}x{row.tokens}"
        notes += [
            f"{where} (batch x prompts x beams x tokens): {_SIDES[side]} measured on {count} of "
            f"{row.asks} answers and counted over all."
            for side, count in row.measured_asks.items()
            if count < row.asks
        ]
        notes += [f"{where}: {_SIDES[side]} failed: {why}." for side, why in row.failed.items()]
    return notes


def _growth_sentence(growth: Growth) -> str:
    theirs = [
        f"{_SIDES[side]} {slope:.2f} s" for side, slope in growth.slopes_s.items() if side != OURS
    ]
    each = ", ".join(f"{value:.2f}" for value in growth.each_s[OURS])
    counts = ", ".join(str(count) for count in growth.counts)
    return (
        f"{growth.size} {growth.precision}, {growth.beams} beams, {growth.tokens} tokens: each "
        f"further {growth.per} costs {growth.slopes_s[OURS]:.2f} s ({'; '.join(theirs)}); "
        f"seconds per {growth.per} at {counts}: {each}."
    )


def _pair(ours: float | None, reference: float | None) -> str:
    return f"{_seconds(ours)} / {_seconds(reference)}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"

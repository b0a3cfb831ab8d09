"""How ``florence2 benchmark`` shows its rows: a sentence each, one table, and the notes below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from florence2.benchmark.growth import growth_of
from florence2.benchmark.rows import OTHERS, OURS, REFERENCE_BF16, REFERENCE_FP32
from florence2.errors import RequestError
from serve.cli.console import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from florence2.benchmark.growth import Growth
    from florence2.benchmark.plan import Axes, BenchmarkPlan
    from florence2.benchmark.rows import Row


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


def register(app: typer.Typer) -> None:
    app.command("benchmark")(benchmark)


def benchmark(
    size: Annotated[str | None, typer.Option(help="base, large, or both with a comma.")] = None,
    runtime: Annotated[str | None, typer.Option(help="The runtime of ours: torch.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="The precision of ours: fp32, bf16, several with commas.")
    ] = None,
    beams: Annotated[str | None, typer.Option(help="Beams, several with commas.")] = None,
    tokens: Annotated[str | None, typer.Option(help="New tokens, several with commas.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Prompts per image.")] = None,
    batch: Annotated[str | None, typer.Option(help="Images at once.")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Every combination of the axes; takes many hours.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:N.")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Timed runs per figure, after a warm-up.")] = 3,
    seconds: Annotated[
        float, typer.Option(help="Runs of one figure stop when the next would exceed this time.")
    ] = 30.0,
    timeout: Annotated[
        float, typer.Option(help="Seconds after which a side without an answer is ended.")
    ] = 3600.0,
    bf16_reference: Annotated[bool, typer.Option(help="Time the reference in bf16 too.")] = True,
    others: Annotated[bool, typer.Option(help="Time one prompt at a time, nothing kept.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows here, each as it is measured.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the ratios into this SVG file.")] = None,
    saved: Annotated[
        Path | None, typer.Option("--from", help="Show an earlier run's file; measure nothing.")
    ] = None,
) -> None:
    """Compare speed and memory with transformers' generate(), with random weights at full size.

    Without axes a chosen selection is run, less than half an hour on two cores. Naming any of
    --size, --runtime, --precision, --beams, --tokens, --prompts and --batch runs their
    combinations, by default base and large, fp32, 3 beams, 30 and 100 tokens, one prompt on one
    image.
    """
    from florence2.benchmark.plan import BenchmarkPlan
    from florence2.benchmark.saved import load_rows

    if saved is not None:
        machine, rows = load_rows(saved)
    else:
        words = {"sizes": size, "runtimes": runtime, "precisions": precision}
        numbers = {"batches": batch, "prompts": prompts, "beams": beams, "tokens": tokens}
        plan = BenchmarkPlan(
            blocks=_blocks(words, numbers, full),
            device=device,
            repeats=repeats,
            figure_limit_s=seconds,
            timeout_s=timeout,
            reference_bf16=bf16_reference,
            others=others,
        )
        machine, rows = _run(plan, json_file)
    print_results(rows)
    if plot is not None:
        _draw(plot, rows, machine)


def _blocks(
    words: dict[str, str | None], numbers: dict[str, str | None], full: bool
) -> Sequence[Axes]:
    """The blocks that were asked for; both dictionaries have an option's text by its axis."""
    from florence2.benchmark.plan import CHOSEN, FULL, Axes

    named: dict[str, Any] = {axis: _split(text) for axis, text in words.items() if text is not None}
    named |= {axis: _counts(axis, text) for axis, text in numbers.items() if text is not None}
    if full and named:
        raise RequestError(
            f"--full measures every combination, and {', '.join(named)} were named besides; "
            "leave out one of the two."
        )
    if full:
        return FULL
    return (Axes(**named),) if named else CHOSEN


def _run(plan: BenchmarkPlan, json_file: Path | None) -> tuple[dict[str, Any], list[Row]]:
    """Measures all rows; the file has each of them as soon as it is measured."""
    from florence2.benchmark.machine import describe_machine
    from florence2.benchmark.run import run_benchmark
    from florence2.benchmark.saved import save_rows

    machine = describe_machine(plan.device)
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        say(row_sentence(row))
        if json_file is not None:
            save_rows(json_file, machine, rows)

    run_benchmark(plan, keep)
    return machine, rows


def _draw(file: Path, rows: Sequence[Row], machine: dict[str, Any]) -> None:
    from florence2.benchmark.plot import draw_plot
    from florence2.benchmark.saved import write_text

    write_text(file, draw_plot(rows, machine))


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _counts(axis: str, text: str) -> list[int]:
    parts = _split(text)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise RequestError(
            f"The {axis} are whole numbers of at least 1, separated by commas, and {text!r} was "
            "received."
        )
    return [int(part) for part in parts]

"""``florence2 benchmark``: speed and memory against the reference implementation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from florence2.errors import RequestError
from serve.cli.console import say

if TYPE_CHECKING:
    from florence2.benchmark.plan import Axes, BenchmarkPlan
    from florence2.benchmark.rows import Row


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
    from florence2.benchmark.table import print_results

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
    from florence2.benchmark.table import row_sentence

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

"""``florence2 benchmark``: speed and memory against the reference implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve.console import say


def register(app: typer.Typer) -> None:
    app.command("benchmark")(benchmark)


def benchmark(
    size: Annotated[str | None, typer.Option(help="base, large, or both with a comma.")] = None,
    runtime: Annotated[
        str | None, typer.Option(help="The runtime of ours: torch, openvino.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="The precision of ours: fp32, bf16, int8.")
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

    Without axes a chosen selection is run, which takes two cores an hour or more. Naming any of
    --size, --runtime, --precision, --beams, --tokens, --prompts and --batch runs their
    combinations, by default base and large, fp32, 3 beams, 30 and 100 tokens, one prompt on one
    image.
    """
    from florence2.benchmark.plan import BenchmarkPlan, named_blocks
    from florence2.benchmark.report import draw_plot, print_results
    from florence2.benchmark.results import load_rows, write_text
    from florence2.benchmark.run import run_benchmark

    if saved is not None:
        machine, rows = load_rows(saved)
    else:
        axes = {"sizes": size, "runtimes": runtime, "precisions": precision}
        axes |= {"batches": batch, "prompts": prompts, "beams": beams, "tokens": tokens}
        plan = BenchmarkPlan(
            blocks=named_blocks(axes, full=full),
            device=device,
            repeats=repeats,
            figure_limit_s=seconds,
            timeout_s=timeout,
            reference_bf16=bf16_reference,
            others=others,
        )
        machine, rows = run_benchmark(plan, json_file, say)
    print_results(rows)
    if plot is not None:
        write_text(plot, draw_plot(rows, machine))

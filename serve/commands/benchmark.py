"""``florence2 benchmark``: ours against the reference implementation, in one run."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from florence2.errors import RequestError
from serve.console import say

if TYPE_CHECKING:
    from florence2.benchmark.run import Row


def register(app: typer.Typer) -> None:
    app.command("benchmark")(benchmark)


def benchmark(
    size: Annotated[str, typer.Option(help="base, large, or both with a comma.")] = "base,large",
    runtime: Annotated[str, typer.Option(help="The runtime of ours.")] = "torch",
    precision: Annotated[str, typer.Option(help="The precision of ours: fp32, bf16.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    beams: Annotated[str, typer.Option(help="Beams, several with commas.")] = "3",
    tokens: Annotated[str, typer.Option(help="New tokens, several with commas.")] = "30,100",
    prompts: Annotated[str, typer.Option(help="Prompts per image.")] = "1",
    batch: Annotated[str, typer.Option(help="Images at once.")] = "1",
    repeats: Annotated[int, typer.Option(help="Timed runs per figure, after a warm-up.")] = 3,
    bf16_reference: Annotated[bool, typer.Option(help="Time the reference in bf16 too.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Compare speed and memory with transformers' generate(), with random weights at full size."""
    from florence2.benchmark.run import BenchmarkPlan, run_benchmark

    if runtime != "torch":
        raise RequestError(f"The benchmark runs runtime 'torch', and {runtime!r} was received.")
    plan = BenchmarkPlan(
        sizes=[name.strip() for name in size.split(",")],
        batches=_counts("--batch", batch),
        prompts=_counts("--prompts", prompts),
        beams=_counts("--beams", beams),
        tokens=_counts("--tokens", tokens),
        device=device,
        precision=precision,
        repeats=repeats,
        reference_bf16=bf16_reference,
    )
    rows = run_benchmark(plan, lambda row: say(_sentence(row)))
    # A fixed width: columns cut to a pipe's 80 characters would be useless.
    Console(width=150, highlight=False).print(_table(rows))
    if json_file is not None:
        content = {"machine": _machine(), "rows": [asdict(row) for row in rows]}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _counts(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise RequestError(
            f"{option} takes whole numbers of at least 1, separated by commas, and {text!r} was "
            "received."
        )
    return [int(part) for part in parts]


def _sentence(row: Row) -> str:
    return (
        f"{row.size}, batch {row.batch}, prompts {row.prompts}, beams {row.beams}, "
        f"tokens {row.tokens}: {row.ours_s:.2f} s, the reference takes {row.ratio_fp32:.2f} times "
        "as long"
    )


def _table(rows: list[Row]) -> Table:
    table = Table(title="ours / transformers in float32, seconds, same run", box=None)
    for name in ("size", "batch", "prompts", "beams", "tokens"):
        table.add_column(name)
    for name in ("vision", "prompt", "decode", "whole", "ratio", "vs bf16", "MiB", "same tokens"):
        table.add_column(name, justify="right")
    for row in rows:
        axes = (row.size, row.batch, row.prompts, row.beams, row.tokens)
        stages = [
            _pair(row.ours_stages_s[stage], row.reference_stages_s[stage])
            for stage in ("vision_s", "prompt_s", "decode_s")
        ]
        table.add_row(
            *(str(axis) for axis in axes),
            *stages,
            _pair(row.ours_s, row.reference_fp32_s),
            f"{row.ratio_fp32:.2f}x",
            f"{row.ratio_bf16:.2f}x" if row.ratio_bf16 else "-",
            f"{row.peak_memory_mib:.0f} / {row.reference_peak_memory_mib:.0f}",
            "yes" if row.same_tokens else "no",
        )
    return table


def _pair(ours: float, reference: float) -> str:
    return f"{ours:.2f} / {reference:.2f}"


def _machine() -> dict[str, Any]:
    import torch
    import transformers

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }

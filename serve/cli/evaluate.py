"""``florence2 evaluate``: how good a checkpoint's answers are, on scenes it has never seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from florence2.errors import RequestError
from serve.cli.loading import load_model
from serve.console import ERR, OUT


def register(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)


def evaluate(
    model: Annotated[
        str, typer.Option(help="A name of `florence2 models`, hub id or folder.")
    ] = "demo",
    scenes: Annotated[
        int, typer.Option(min=1, help="How many scenes to draw and ask about.")
    ] = 500,
    seed: Annotated[
        int, typer.Option(min=0, help="The first scene; training never sees these.")
    ] = 0,
    file: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="TASK,...", help="Only these tasks. [default: all 15]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    runtime: Annotated[str, typer.Option(help="auto, torch or openvino.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="auto, fp32, bf16, fp16, int8, or on a GPU nf4.")
    ] = "auto",
    beams: Annotated[int | None, typer.Option(min=1, help="Beams of the search.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Scenes per step.")] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens.")
    ] = None,
    compare_scores: Annotated[
        bool, typer.Option("--compare-scores", help="Compare ways to score a box; needs <OD>.")
    ] = False,
) -> None:
    """Measure a checkpoint on drawn scenes that it was not trained on."""
    from florence2_demo.evaluation import EvaluationPlan, evaluate_checkpoint, task_tokens

    chosen = task_tokens((tasks or "").split(","))
    plan = EvaluationPlan(scenes, seed, chosen, beams, batch, max_new_tokens, compare_scores)
    # A mistyped path is told before minutes of asking, not after them.
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise RequestError(
            f"The figures go into a file in a folder that exists, and {str(file)!r} is none; "
            "choose another."
        )
    report = evaluate_checkpoint(load_model(model, device, runtime, precision), plan, ERR)
    report.show(OUT)
    if file is not None:
        file.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")

"""``florence2 evaluate``: how good a checkpoint's answers are, on scenes it has never seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from serve.cli.console import ERR, OUT
from serve.cli.loading import load_model

if TYPE_CHECKING:
    from florence2.api import Florence2
    from florence2.evaluation.evaluate import Plan, Report
    from florence2.evaluation.score_study import ScoreStudy


DEFAULT_MODEL: Final = "demo"

ModelName = Annotated[str, typer.Option(help="A name of `florence2 models`, hub id or folder.")]
Scenes = Annotated[int, typer.Option(min=1, help="How many scenes to draw and ask about.")]
Seed = Annotated[int, typer.Option(min=0, help="The first scene; training never sees these.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")]
Tasks = Annotated[
    str | None, typer.Option(metavar="TASK,...", help="Only these tasks. [default: all 15]")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Runtime = Annotated[str, typer.Option(help="auto or torch.")]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")]
Beams = Annotated[int | None, typer.Option(min=1, help="Beams of the search.")]
Batch = Annotated[int, typer.Option(min=1, max=256, help="Scenes per step.")]
Tokens = Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")]
Compare = Annotated[
    bool, typer.Option("--compare-scores", help="Compare ways to score a box; needs <OD>.")
]


def register(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)


def evaluate(
    model: ModelName = DEFAULT_MODEL,
    scenes: Scenes = 500,
    seed: Seed = 0,
    file: JsonFile = None,
    tasks: Tasks = None,
    device: Device = "auto",
    runtime: Runtime = "auto",
    precision: Precision = "auto",
    beams: Beams = None,
    batch: Batch = 8,
    max_new_tokens: Tokens = None,
    compare_scores: Compare = False,
) -> None:
    """Measure a checkpoint on drawn scenes that it was not trained on."""
    from florence2.errors import RequestError
    from florence2.evaluation.evaluate import Plan, task_tokens
    from florence2.evaluation.score_study import ScoreStudy

    chosen = task_tokens((tasks or "").split(","))
    if compare_scores and "<OD>" not in chosen:
        raise RequestError("--compare-scores compares the boxes of <OD>; add <OD> to --tasks.")
    plan = Plan(scenes, seed, chosen, beams, batch, max_new_tokens)
    _check_writable(file)
    loaded = load_model(model, device, runtime, precision)
    study = ScoreStudy(loaded.engine.checkpoint.vocabulary) if compare_scores else None
    report = _measured(loaded, plan, study)
    content = report.to_dict()
    if study is not None:
        content["score_definitions"] = _study_rows(study)
    _show(report, content)
    if file is not None:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_writable(file: Path | None) -> None:
    """A mistyped path is told before minutes of asking, not after them."""
    from florence2.errors import RequestError

    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise RequestError(
            f"The figures go into a file in a folder that exists, and {str(file)!r} is none; "
            "choose another."
        )


def _measured(model: Florence2, plan: Plan, study: ScoreStudy | None) -> Report:
    from dataclasses import replace

    from rich.progress import Progress

    from florence2.evaluation.evaluate import evaluate as measure

    checkpoint = model.engine.checkpoint
    plan = replace(plan, beams=plan.beams or checkpoint.generation.num_beams)
    with Progress(console=ERR, transient=True, disable=not ERR.is_terminal) as bar:
        task = bar.add_task("Asking", total=plan.num_scenes)
        report = measure(
            model,
            plan,
            progress=lambda count: bar.advance(task, count),
            watch=study.see if study else None,
        )
    report.checkpoint.update(
        checkpoint=checkpoint.name,
        revision=checkpoint.revision,
        device=model.device,
        precision=model.precision,
    )
    return report


def _study_rows(study: ScoreStudy) -> dict[str, dict[str, float | None]]:
    from dataclasses import asdict

    return {
        name: {key: round(value, 4) if value == value else None for key, value in row.items()}
        for name, row in ((name, asdict(found)) for name, found in study.qualities().items())
    }


def _show(report: Report, content: dict[str, Any]) -> None:
    from rich.table import Table

    known = [f"{content[name]}" for name in ("checkpoint", "precision", "device")]
    revision = f"@{str(content['revision'])[:12]}" if content["revision"] else ""
    OUT.print(
        f"{known[0]}{revision} in {known[1]} on {known[2]}: scenes {content['seed']} to "
        f"{content['seed'] + content['scenes'] - 1}, {content['beams']} beams, "
        f"{content['images_per_s']:.2f} images/s",
        markup=False,
    )
    figures = Table("figure", "value", "95 % interval", "of", box=None, pad_edge=False)
    for name, found in report.figures.items():
        if found.value is not None:
            interval = f"{found.low:.3f} to {found.high:.3f}"
            figures.add_row(name, f"{found.value:.3f}", interval, str(found.count))
    OUT.print(figures)
    forms = Table("task", "well-formed", "known words", box=None, pad_edge=False)
    for name, share in report.well_formed.items():
        forms.add_row(name, f"{share:.3f}", f"{report.known_words[name]:.3f}")
    OUT.print(forms)
    _show_study(content.get("score_definitions"))


def _show_study(rows: dict[str, dict[str, float | None]] | None) -> None:
    from rich.table import Table

    if rows:
        table = Table("score of a box", "mAP50", "AUROC", "ECE", box=None, pad_edge=False)
        for name, row in rows.items():
            table.add_row(name, *("" if v is None else f"{v:.3f}" for v in row.values()))
        OUT.print(table)

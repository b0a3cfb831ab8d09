"""``florence2 evaluate``: how good a checkpoint's answers are, on labeled data or drawn scenes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from florence2.errors import RequestError
from serve.cli.loading import OneModel, load_model, one_model
from serve.cli.options import Batch, Beams, Device, ModelName, Precision, Runtime, Tokens
from serve.console import ERR, OUT, say

if TYPE_CHECKING:
    from florence2.labeled.records import LabeledData
    from serve.evaluation import TaskPlan, TaskReport

_FOR_SCENES: Final = ("scenes", "seed", "tasks", "compare_scores")
_FOR_DATA: Final = (
    "task",
    "prompt",
    "class_",
    "settings_file",
    "threshold",
    "split",
    "out",
    "against",
)

Data = Annotated[
    Path | None,
    typer.Argument(
        help="Labeled images: a Supervisely project, COCO file, YOLO's data.yaml, .jsonl file, or "
        "the folder of one. Without it scenes are drawn."
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        help="What to ask about DATA. [default: what .jsonl lines ask; grounding with --class, "
        "else <OD>]"
    ),
]
Prompt = Annotated[str | None, typer.Option(help="What to look for, as `florence2 label` has it.")]
Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--class",
        metavar="NAME=PROMPT;...",
        help="A class of DATA and the prompts for it. [default, where a task takes text: each "
        "class by its name]",
    ),
]
SettingsFile = Annotated[
    Path | None,
    typer.Option(
        "--settings",
        metavar="FILE.yaml",
        help="Settings as the app and `label` take them: thresholds, NMS, tiling, classes.",
    ),
]
Threshold = Annotated[
    float | None, typer.Option(help="Confidence from which on an object counts as found.")
]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="SPLIT",
        help="Only these images: dataset:NAME, tag:NAME, hash:0.2, file:NAMES.txt, or a NAME.",
    ),
]
Out = Annotated[Path | None, typer.Option(help="A folder for report.html and evaluation.json.")]
Scenes = Annotated[int, typer.Option(min=1, help="How many scenes to draw and ask about.")]
Seed = Annotated[int, typer.Option(min=0, help="The first scene; training never sees these.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")]
Tasks = Annotated[
    str | None,
    typer.Option(metavar="TASK,...", help="Only these tasks about scenes. [default: all 15]"),
]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="PRECISION",
        help="Ask DATA in this precision too, and say what the other one loses. After less than a "
        "point from fp32 to int8, --precision auto takes int8.",
    ),
]
CompareScores = Annotated[
    bool, typer.Option("--compare-scores", help="Compare ways to score a box; needs scenes, <OD>.")
]


def register(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)


def evaluate(
    context: typer.Context,
    data: Data = None,
    model: ModelName = "demo",
    task: TaskName = None,
    prompt: Prompt = None,
    class_: Classes = None,
    settings_file: SettingsFile = None,
    threshold: Threshold = None,
    split: Split = None,
    out: Out = None,
    scenes: Scenes = 500,
    seed: Seed = 0,
    file: JsonFile = None,
    tasks: Tasks = None,
    device: Device = "auto",
    runtime: Runtime = "auto",
    precision: Precision = "auto",
    against: Against = None,
    beams: Beams = None,
    batch: Batch = 8,
    max_new_tokens: Tokens = None,
    compare_scores: CompareScores = False,
) -> None:
    """Measure a checkpoint on your own labeled images, or on drawn scenes it was not trained on."""
    _check_options(context, has_data=data is not None)
    # A mistyped path is told before minutes of asking, not after them.
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise RequestError(
            f"The figures go into a file in a folder that exists, and {str(file)!r} is none; "
            "choose another."
        )
    if data is not None:
        if out is not None and out.exists() and not out.is_dir():
            raise RequestError(
                f"The report goes into a folder, and {str(out)!r} is a file; choose another."
            )
        settings = {
            "file": settings_file,
            "task": task,
            "prompt": prompt,
            "threshold": threshold,
            "num_beams": beams,
            "max_new_tokens": max_new_tokens,
        }
        loaded = (model, device, runtime, precision)
        command = shlex.join(["florence2", *(context.obj or ())])
        _on_data(data, split, class_ or [], settings, loaded, against, batch, command, file, out)
        return
    from florence2_demo.evaluation import EvaluationPlan, evaluate_checkpoint, task_tokens

    chosen = task_tokens((tasks or "").split(","))
    plan = EvaluationPlan(scenes, seed, chosen, beams, batch, max_new_tokens, compare_scores)
    report = evaluate_checkpoint(load_model(model, device, runtime, precision), plan, ERR)
    report.show(OUT)
    if file is not None:
        file.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")


def _check_options(context: typer.Context, *, has_data: bool) -> None:
    """RequestError for an option of scenes beside data, or of data without any."""
    for name in _FOR_SCENES if has_data else _FOR_DATA:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            option = {"class_": "class", "settings_file": "settings"}.get(name, name)
            raise RequestError(
                f"--{option.replace('_', '-')} is for "
                + ("scenes, and labeled data was named; leave out one of them."
                   if has_data else "labeled data, and none was named; name the folder or file.")
            )  # fmt: skip


def _on_data(
    path: Path,
    split: str | None,
    classes: list[str],
    options: dict[str, Any],
    loaded: tuple[str, str, str, str],
    against: str | None,
    batch: int,
    command: str,
    file: Path | None,
    out: Path | None,
) -> None:
    from florence2.labeled.split import chosen_images
    from serve.evaluation import LabeledReport, write_json
    from serve.labeled_data import open_labeled
    from serve.precision_loss import compared, keep

    if against is not None:
        _check_against(against, *loaded[1:])
    data = open_labeled(path)
    if split is not None:
        data = chosen_images(data, split)
    plans = _plans_of(data, classes, options)
    before: list[TaskReport] = []
    if against is not None:
        models, before = _asked((*loaded[:3], against), plans, batch)
        # Two at a time may not fit.
        models.current.scheduler.close()
        models.current.model.close()
    models, reports = _asked(loaded, plans, batch)
    model = models.current.model
    checkpoint = model.engine.checkpoint
    loss = compared(before, reports, against, model.precision) if against is not None else None
    report = LabeledReport(
        data,
        {
            "checkpoint": checkpoint.name,
            "revision": checkpoint.revision,
            "device": model.device,
            "precision": model.precision,
        },
        tuple(reports),
        command,
        loss,
    )
    # The files first: whoever reads the table may leave before its end.
    if file is not None:
        write_json(file, report.to_dict())
    if out is not None:
        report.write(out)
        say(f"The report is in {out / 'report.html'}")
    try:
        kept = keep(loss, model, data, command) if loss is not None else None
        if kept is not None:
            say(kept)
    finally:
        report.show(OUT)


def _plans_of(data: LabeledData, classes: list[str], options: dict[str, Any]) -> list[TaskPlan]:
    from florence2.tasks import TaskInput, parse_steps
    from serve.evaluation import class_mapping, plans_of
    from serve.labeling.settings import label_settings, read_classes

    mapping = read_classes(classes, by_semicolon=True)
    task = options["task"]
    if task and parse_steps(task)[0].takes is TaskInput.TEXT and not options["file"]:
        mapping = mapping or ({} if options["prompt"] else class_mapping(data))
    # Every object of the data is a region to ask about.
    asks_regions = task is not None and parse_steps(task)[0].takes is TaskInput.REGION
    region = "0,0,9,9" if asks_regions else None
    settings = label_settings(classes=mapping, region=region, **options)
    has_task = bool(task or mapping or options["prompt"] or options["file"])
    return plans_of(data, settings, has_task=has_task)


def _asked(
    loaded: tuple[str, str, str, str], plans: Sequence[TaskPlan], batch: int
) -> tuple[OneModel, list[TaskReport]]:
    from serve.evaluation import evaluate_tasks
    from serve.predict.predictor import Predictor

    models = one_model(*loaded)
    # No reader of these labels was told of classes before.
    predictor = Predictor(models, fixed_shapes={})
    return models, evaluate_tasks(predictor, plans, batch=batch, console=ERR)


def _check_against(against: str, device: str, runtime: str, precision: str) -> None:
    """FlorenceError where one of both cannot be loaded here, before minutes of the other."""
    from florence2.conversion.kept import check_choice
    from florence2.runtimes.device import check_precision, choose_device

    if against in ("auto", precision):
        raise RequestError(
            f"--against is a precision by name and another one than --precision, and {against!r} "
            f"was given beside {precision!r}; compare --precision int8 --against fp32."
        )
    chosen = choose_device(device)
    for name in (against, precision):
        check_precision(name, chosen)
        check_choice(runtime, chosen, name)

"""``florence2 label``: a folder of images becomes a project on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from serve.cli.loading import fingerprint, load_model

if TYPE_CHECKING:
    from serve.labeling.plan import Plan
    from serve.labeling.run import Model


DEFAULT_MODEL: Final = "Florence-2-large"

_PROMPT_HELP: Final = (
    'What to look for: "red car. dog" or "red car; dog" asks for two things; '
    '"red car, dog" is one phrase.'
)

Images = Annotated[Path, typer.Argument(help="A folder of images, or one image.")]
Out = Annotated[
    Path,
    typer.Option(
        help="The run's folder, with project, report and exports; run again to go on with it."
    ),
]
Prompt = Annotated[str | None, typer.Option(help=_PROMPT_HELP)]
TaskName = Annotated[
    str | None,
    typer.Option(help="A task of `florence2 tasks`. [default: grounding with a prompt, else <OD>]"),
]
Classes = Annotated[
    list[str] | None,
    typer.Option("--class", metavar="NAME=PROMPT,...", help="A class and the prompts for it."),
]
RegionXyxy = Annotated[
    str | None, typer.Option(metavar="X1,Y1,X2,Y2", help="In pixels, for tasks about a region.")
]
ModelName = Annotated[str, typer.Option(help="A name of `florence2 models`, hub id or folder.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Runtime = Annotated[str, typer.Option(help="auto or torch.")]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")]
Threshold = Annotated[float, typer.Option(help="Drop objects with a lower confidence.")]
Batch = Annotated[int, typer.Option(min=1, max=256, help="Images per step.")]
Beams = Annotated[int | None, typer.Option(min=1, help="Beams of the search.")]
Tokens = Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")]
Recursive = Annotated[bool, typer.Option("--recursive", help="Look into subfolders too.")]
Link = Annotated[bool, typer.Option("--link", help="Link images into the project, not copy.")]
Coco = Annotated[bool, typer.Option("--coco", help="Write COCO files too.")]
Yolo = Annotated[bool, typer.Option("--yolo", help="Write YOLO files too.")]
ValFraction = Annotated[
    float, typer.Option(help="Share of the images that YOLO files have for validation.")
]
Draw = Annotated[bool, typer.Option("--draw", help="Write previews with the labels drawn on.")]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Only what failed before.")]
Relabel = Annotated[
    bool, typer.Option("--relabel-changed", help="Also images that changed since their labels.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Begin anew; earlier labels move to OUT.old-1.")
]


def register(app: typer.Typer) -> None:
    app.command("label")(label)


def label(
    context: typer.Context,
    images: Images,
    out: Out,
    prompt: Prompt = None,
    task: TaskName = None,
    class_: Classes = None,
    region: RegionXyxy = None,
    model: ModelName = DEFAULT_MODEL,
    device: Device = "auto",
    runtime: Runtime = "auto",
    precision: Precision = "auto",
    threshold: Threshold = 0.0,
    batch: Batch = 8,
    num_beams: Beams = None,
    max_new_tokens: Tokens = None,
    recursive: Recursive = False,
    link: Link = False,
    coco: Coco = False,
    yolo: Yolo = False,
    val_fraction: ValFraction = 0.2,
    draw: Draw = False,
    retry_failed: Retry = False,
    relabel_changed: Relabel = False,
    overwrite: Overwrite = False,
) -> None:
    """Label a folder of images into a Supervisely project on disk; stop and go on at will."""
    plan = _plan(task, prompt, class_, region, threshold, model, num_beams, max_new_tokens)
    from serve.labeling.run import Job, label_folder

    job = Job(
        images=images,
        out=out,
        batch=batch,
        recursive=recursive,
        link=link,
        coco=coco,
        yolo=yolo,
        val_fraction=val_fraction,
        draw=draw,
        retry_failed=retry_failed,
        relabel_changed=relabel_changed,
        overwrite=overwrite,
        arguments=tuple(context.obj or ()),
    )
    load = _loader(model, device, runtime, precision)
    raise typer.Exit(label_folder(plan, job, load, lambda: fingerprint(model)).exit_code)


def _plan(
    task: str | None,
    prompt: str | None,
    classes: list[str] | None,
    region: str | None,
    threshold: float,
    model: str,
    num_beams: int | None,
    max_new_tokens: int | None,
) -> Plan:
    from serve.labeling.plan import make_plan

    return make_plan(
        task=task,
        prompt=prompt,
        classes=classes or (),
        region=region,
        threshold=threshold,
        model=model,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
    )


def _loader(
    name: str, device: str, runtime: str, precision: str
) -> Callable[[], tuple[Model, Callable[..., Any]]]:
    def load() -> tuple[Model, Callable[..., Any]]:
        from florence2.engine.ask import Ask

        return load_model(name, device, runtime, precision), Ask

    return load

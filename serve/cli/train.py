"""``florence2 train``: a checkpoint learns from labeled images, on this machine."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from florence2.errors import RequestError, shown_s
from serve.console import ERR, OUT, say
from serve.labeling.progress import StopSwitch, stop_on_signals
from serve.process import leave_cores_to_others

if TYPE_CHECKING:
    from florence2.finetune.plan import FineTuningPlan
    from florence2.finetune.trainer import Progress as Now
    from florence2.finetune.trainer import Watcher
    from florence2.finetune.validation import Validation
    from florence2.labeled.records import LabeledData

_LINE_EVERY_S: Final = 30.0
_DEFAULT_EPOCHS: Final = 10.0


def register(app: typer.Typer) -> None:
    app.command("train")(train)


Data = Annotated[
    Path,
    typer.Argument(
        help="A Supervisely project on disk, a COCO file, a YOLO data.yaml, or .jsonl of image, "
        "prefix and suffix."
    ),
]
Model = Annotated[str, typer.Option(help="What to begin with: a name, hub id or folder.")]
Out = Annotated[Path, typer.Option(help="The training's folder; the same command goes on with it.")]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task", metavar="TASK", help="What to teach; several times or with commas for several."
    ),
]
Classes = Annotated[
    list[str] | None,
    typer.Option("--class", metavar="NAME=PROMPT", help="The prompt that asks for a class."),
]
Targets = Annotated[
    str | None,
    typer.Option(
        "--lora-targets",
        metavar="NAME,...",
        help="Layers that get an adapter. [default: q_proj,k_proj,v_proj,out_proj,fc1,fc2]",
    ),
]
Method = Annotated[str, typer.Option(help="lora (an adapter) or full (all weights).")]
Val = Annotated[
    str | None,
    typer.Option(
        help="Images to measure on: dataset:NAME, tag:NAME, hash:0.2 or file:NAMES.txt. "
        "[default: a dataset called val, else a fifth by hash]"
    ),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Updates of the weights.")]
Epochs = Annotated[
    float | None,
    typer.Option(min=0.01, max=1e6, help="Instead: passes over the images. [default: 10]"),
]
StepImages = Annotated[int, typer.Option(min=1, help="Images of each step.")]
AtOnce = Annotated[
    int | None,
    typer.Option(min=1, help="Of them together in memory. [default: found by trying]"),
]
Prompts = Annotated[int, typer.Option(min=1, help="Questions about each image.")]
Rate = Annotated[
    float | None,
    typer.Option(help="Highest learning rate. [default: 3e-4 for lora, 1e-5 for full]"),
]
Schedule = Annotated[str, typer.Option(help="linear, cosine or constant.")]
WarmUp = Annotated[float, typer.Option(help="Share of the steps to reach the rate in.")]
Rank = Annotated[int, typer.Option(min=1, help="Rank of the adapter.")]
Alpha = Annotated[float, typer.Option(help="Its scale is alpha/rank.")]
Dropout = Annotated[float, typer.Option(help="Of the adapter's input, or of the text network.")]
RsLora = Annotated[bool, typer.Option("--rslora", help="Scale by alpha/sqrt(rank) instead.")]
FreezeVision = Annotated[
    bool, typer.Option("--freeze-vision", help="Train the network of text only.")
]
Augment = Annotated[str, typer.Option(metavar="NAME,...", help="flip, crop, colour, or none.")]
MixedPrecision = Annotated[str, typer.Option(help="auto, fp32, or mixed with fp32: bf16 or fp16.")]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Less memory, more time: recompute activations.")
]
ValidateEvery = Annotated[
    int | None, typer.Option(min=1, help="Steps between measurements. [default: a tenth]")
]
ValImages = Annotated[int, typer.Option(min=1, help="Measure on at most so many images.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads that compute.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that open images.")]
Seed = Annotated[int, typer.Option(min=0, help="Another seed, another order.")]
Upload = Annotated[
    bool, typer.Option("--upload", help="Then upload the model, as upload-model does.")
]


def train(
    context: typer.Context,
    data: Data,
    model: Model,
    out: Out,
    tasks: Tasks = None,
    method: Method = "lora",
    classes: Classes = None,
    val: Val = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch: StepImages = 8,
    at_once: AtOnce = None,
    prompts: Prompts = 2,
    rate: Rate = None,
    schedule: Schedule = "linear",
    warm_up: WarmUp = 0.05,
    rank: Rank = 16,
    alpha: Alpha = 32.0,
    dropout: Dropout = 0.05,
    rslora: RsLora = False,
    lora_targets: Targets = None,
    freeze_vision: FreezeVision = False,
    augment: Augment = "flip,crop,colour",
    precision: MixedPrecision = "auto",
    checkpointing: Checkpointing = False,
    validate_every: ValidateEvery = None,
    val_images: ValImages = 100,
    device: Device = "auto",
    threads: Threads = None,
    workers: Workers = 0,
    seed: Seed = 0,
    upload: Upload = False,
) -> None:
    """Train a checkpoint on your own labeled images; the best weights are in OUT/best.

    They are served like any other: florence2 serve --model OUT/best.
    """
    from florence2.finetune.augmentation import parse_augmentations
    from florence2.finetune.plan import LORA_TARGETS, FineTuningPlan, LoraSettings
    from florence2.labeled.split import split_data
    from serve.cli.upload_model import upload_training
    from serve.labeled_data import open_labeled
    from serve.platform.team_files import platform_of_environment

    if steps is not None and epochs is not None:
        raise RequestError("--steps and --epochs say the same; give one of them.")
    if upload:
        # Told now, and not after hours.
        platform_of_environment(None)
    labeled = open_labeled(data)
    _tell_left_out(labeled)
    training, validation = split_data(labeled, val)
    passes = _DEFAULT_EPOCHS if epochs is None else epochs
    count = steps or max(1, round(passes * len(training.images) / batch))
    plan = FineTuningPlan(
        model=model,
        tasks=tuple(_listed(tasks or ())),
        method=method,
        steps=count,
        batch=batch,
        prompts=prompts,
        at_once=at_once,
        rate=rate,
        schedule=schedule,
        warm_up=warm_up,
        dropout=dropout,
        lora=LoraSettings(
            targets=tuple(_listed([lora_targets])) if lora_targets else LORA_TARGETS,
            rank=rank,
            alpha=alpha,
            is_rank_stabilised=rslora,
        ),
        freeze_vision=freeze_vision,
        augmentations=parse_augmentations(augment),
        prompts_by_class=_prompts_by_class(classes or ()),
        device=device,
        precision=precision,
        has_checkpointing=checkpointing,
        validate_every=validate_every or max(1, count // 10),
        validation_images=val_images,
        workers=workers,
        seed=seed,
    )
    command = shlex.join(["florence2", *(context.obj or ())])
    record = _train(training, validation, plan, out, command, threads)
    if upload and record["status"] == "done":
        upload_training(out)


def _train(
    training: LabeledData,
    validation: LabeledData,
    plan: FineTuningPlan,
    out: Path,
    command: str,
    threads: int | None,
) -> dict[str, Any]:
    # peft imports it, and it misses something that no training here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from florence2.finetune.run import fine_tune
    except ModuleNotFoundError as error:
        if error.name not in ("peft", "accelerate"):
            raise
        raise RequestError(
            f"Training needs the package {error.name}; install it with pip install "
            "'serve-florence-2[train]'."
        ) from error
    import torch

    from florence2.checkpoint.checkpoint import open_checkpoint

    if threads is not None:
        torch.set_num_threads(threads)
    else:
        leave_cores_to_others(open_checkpoint(plan.model).config.text.d_model)
    with stop_on_signals() as switch, switch.after_batch(), _shown(plan.steps) as show:
        watcher = _watcher(switch, show)
        record = fine_tune(training, validation, plan, out, watcher, command)
    if record["status"] != "done":
        say(f"Stopped at step {record['steps_done']}; the same command goes on from there.")
    if record["metric"] is not None:
        metric = record["metric"]
        OUT.print(f"{metric['name']} {metric['value']:.4f} at step {record['best_step']}")
        OUT.print(f"{out / 'best'}", markup=False)
    say(f"Report: {out / 'report.html'}")
    return record


Show = Callable[["Now"], None]


@contextmanager
def _shown(steps: int) -> Iterator[Show]:
    """A line that is drawn anew at a terminal; else a line every half minute."""
    if not ERR.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("Training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=ERR) as bar:
        task = bar.add_task("", total=steps, said="")
        yield lambda now: bar.update(task, completed=now.step, said=_said(now))


def _said(now: Now) -> str:
    return f"loss {now.loss:.3f}, {now.images_per_s:.1f} images/s, {shown_s(now.left_s)} left"


class _Lines:
    def __init__(self) -> None:
        self._said_s = 0.0

    def __call__(self, now: Now) -> None:
        if time.monotonic() - self._said_s >= _LINE_EVERY_S or now.step == now.steps:
            self._said_s = time.monotonic()
            say(f"{now.step}/{now.steps} steps, {_said(now)}")


def _watcher(switch: StopSwitch, show: Show) -> Watcher:
    from florence2.finetune.trainer import Watcher

    class AtTheTerminal(Watcher):
        def progress(self, now: Now) -> None:
            show(now)

        def validated(self, step: int, found: Validation, *, is_best: bool) -> None:
            figures = ", ".join(f"{one.task} {one.metric} {one.value:.3f}" for one in found.tasks)
            say(f"Step {step}: {figures}{', the best so far' if is_best else ''}")

        def note(self, sentence: str) -> None:
            say(sentence)

        def should_stop(self) -> bool:
            return switch()

    return AtTheTerminal()


def _tell_left_out(data: LabeledData) -> None:
    for one in data.left_out[:5]:
        say(f"Left out: {one.name}: {one.reason}")
    if len(data.left_out) > 5:
        say(f"{len(data.left_out) - 5} more were left out.")


def _listed(values: Iterable[str]) -> list[str]:
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def _prompts_by_class(given: Iterable[str]) -> dict[str, str]:
    prompts: dict[str, str] = {}
    for one in given:
        name, separator, prompt = one.partition("=")
        if not separator or not name.strip() or not prompt.strip():
            raise RequestError(
                f"A class has the form NAME=PROMPT, such as dog='a small dog', and {one!r} was "
                "received; correct it."
            )
        prompts[name.strip()] = prompt.strip()
    return prompts

"""``florence2 tune``: prompts, thresholds, NMS and tiling chosen by labeled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from florence2.errors import RequestError
from serve.cli.loading import one_model
from serve.cli.options import Beams, Device, ModelName, Precision, Runtime
from serve.console import OUT, complain, say

if TYPE_CHECKING:
    from florence2.evaluation.metrics import Estimate
    from florence2.labeled.records import LabeledData, LabeledImage, LeftOut
    from serve.predict.predictor import Predictor
    from serve.settings import Tiling
    from serve.tuning.asking import Answers
    from serve.tuning.plan import TuningPlan
    from serve.tuning.report import ClassReport, PromptFigures, Tuned

DEFAULT_MODEL: Final = "Florence-2-large"
_SHOWN: Final = 10
_WIDTH: Final = 120
_INTERRUPTED: Final = 130

Data = Annotated[
    Path,
    typer.Argument(
        help="Labeled images: a Supervisely project, COCO file, YOLO data.yaml or .jsonl file."
    ),
]
Out = Annotated[Path, typer.Option(metavar="FILE.yaml", help="The settings that won.")]
Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--class",
        metavar="NAME=PROMPTS",
        help='A class and prompts to try, such as dog="dog; puppy; a small dog"; without prompts '
        "its name. [default: all classes, by their names]",
    ),
]
TaskName = Annotated[str, typer.Option(help="A task that takes text and finds places.")]
Optimise = Annotated[
    str,
    typer.Option(
        metavar="f1|precision|recall@P",
        help="What is to be high: F1, F0.5 (precision counts twice as much), or recall where "
        "precision is at least P.",
    ),
]
MostImages = Annotated[
    int, typer.Option("--images", min=2, help="At most so many images, drawn by a hash.")
]
Split = Annotated[
    str | None, typer.Option(help="Only these images: dataset:NAME, tag:NAME or file:NAMES.txt.")
]
NmsList = Annotated[str, typer.Option(metavar="0.7,...|off", help="NMS thresholds to try.")]
Tilings = Annotated[
    list[str] | None,
    typer.Option(
        "--tiling",
        metavar="SIZE|MAPPING|off",
        help="Windows to try besides none; can be given more than once. [default: four windows, "
        "for images larger than what the model looks at]",
    ),
]
Iou = Annotated[
    float, typer.Option(min=0.05, max=1.0, help="The IoU from which a box found is right.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace FILE.yaml if it is there.")]


def register(app: typer.Typer) -> None:
    app.command("tune")(tune)


def tune(
    data: Data,
    out: Out,
    class_: Classes = None,
    model: ModelName = DEFAULT_MODEL,
    task: TaskName = "<CAPTION_TO_PHRASE_GROUNDING>",
    optimise: Optimise = "f1",
    images: MostImages = 200,
    split: Split = None,
    nms: NmsList = "0.7,0.5,0.3",
    tiling: Tilings = None,
    iou: Iou = 0.5,
    num_beams: Beams = None,
    device: Device = "auto",
    runtime: Runtime = "auto",
    precision: Precision = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Choose prompts, thresholds, NMS and tiling by labeled images, and calibrate the scores."""
    _check_out(out, overwrite=overwrite)
    from florence2.evaluation.operating_points import Objective
    from florence2.labeled.split import chosen_images
    from serve.labeled_data import open_labeled
    from serve.tuning.plan import TuningPlan, classes_in, some_of, windows_for
    from serve.tuning.report import MIN_IMAGES
    from serve.tuning.report import tune as tune_by

    tried = _tilings(tiling), _nms(nms), Objective.of(optimise), iou, num_beams
    named = _named(class_ or ())
    labeled = open_labeled(data)
    if split is not None:
        labeled = chosen_images(labeled, split)
    prompts, ignored = classes_in(labeled, named)
    plan = TuningPlan(prompts, task, *tried)
    chosen = some_of(labeled.images, images)
    _say_what_is_used(labeled, chosen, ignored)
    predictor, input_wh = _loaded(model, device, runtime, precision)
    if tiling is None:
        windows = windows_for([image.size_wh for image in chosen], input_wh)
        plan = replace(plan, tilings=(None,) if windows is None else (None, windows))
    answers = _asked(predictor, chosen, plan)
    if answers.is_interrupted and len(answers.images) < MIN_IMAGES:
        say("Interrupted before anything was known; nothing is written.")
        raise typer.Exit(_INTERRUPTED)
    say(f"Comparing settings on {len(answers.images)} images ...")
    tuned = tune_by(answers, plan)
    _show(tuned)
    if answers.is_interrupted:
        say(
            f"Interrupted: this is what {tuned.num_images} of {len(chosen)} images say, and "
            "nothing is written."
        )
        raise typer.Exit(_INTERRUPTED)
    _write(out, _file_text(tuned, model, data))
    say(f"Settings: {out}")
    raise typer.Exit(1 if answers.failed else 0)


def _asked(predictor: Predictor, chosen: Sequence[LabeledImage], plan: TuningPlan) -> Answers:
    from serve.labeling.progress import progress_bar, stop_on_signals
    from serve.tuning.asking import ask_all

    with (
        stop_on_signals() as stop,
        progress_bar(len(chosen), "Asking") as advance,
        stop.after_batch(),
    ):
        answers = ask_all(predictor, chosen, plan, advance, stop)
    _say_left_out("Failed, and counted neither as found nor as missed", answers.failed)
    if answers.num_truncated:
        say(f"{answers.num_truncated} answers were cut at their longest.")
    return answers


def _check_out(out: Path, *, overwrite: bool) -> None:
    """Before minutes of asking, not after them."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise RequestError(
            f"Settings go into a file in a folder that exists, and {str(out)!r} is none; choose "
            "another --out."
        )
    if out.exists() and not overwrite:
        raise RequestError(
            f"{str(out)!r} is there already; add --overwrite, or choose another --out."
        )


def _named(classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Prompts by class; a class that is asked for by its name has none of its own."""
    from serve.labeling.settings import read_classes

    named = read_classes(classes, by_semicolon=True)
    return {name: () if prompts == (name,) else prompts for name, prompts in named.items()}


def _nms(listed: str) -> tuple[float | None, ...]:
    from serve.settings import parse_settings

    parts = [part.strip() for part in listed.split(",") if part.strip()]
    if not parts:
        raise RequestError(f"--nms names thresholds, and {listed!r} names none; write 0.7,0.5.")
    read = [parse_settings({"nms_threshold": part}).nms_threshold for part in parts]
    return tuple(dict.fromkeys(read))


def _tilings(named: Sequence[str] | None) -> tuple[Tiling | None, ...]:
    """No windows, and those that are named."""
    from serve.settings import parse_settings

    windows = [parse_settings({"tiling": one}).tiling for one in named or ()]
    return tuple(dict.fromkeys((None, *windows)))


def _loaded(
    name: str, device: str, runtime: str, precision: str
) -> tuple[Predictor, tuple[int, int]]:
    """Who answers, and the size (width, height) at which the model looks at an image."""
    from serve.predict.predictor import Predictor

    models = one_model(name, device, runtime, precision)
    processor = models.current.model.engine.checkpoint.image_processor
    return Predictor(models, fixed_shapes={}), processor.size_wh


def _say_what_is_used(
    data: LabeledData, chosen: Sequence[LabeledImage], ignored: dict[str, int]
) -> None:
    _say_left_out("Left out while reading", data.left_out)
    if len(chosen) < len(data.images):
        say(f"Asking about {len(chosen)} of {len(data.images)} images; --images takes more.")
    if ignored:
        named = ", ".join(f"{name} ({count})" for name, count in sorted(ignored.items()))
        say(f"Ignored, because --class does not name them: {named}.")


def _say_left_out(what: str, left_out: Sequence[LeftOut]) -> None:
    if left_out:
        say(f"{what}: {len(left_out)}")
    for one in left_out[:_SHOWN]:
        say(f"  {one.name}: {one.reason}")
    if len(left_out) > _SHOWN:
        say(f"  ... and {len(left_out) - _SHOWN} more")


def _show(tuned: Tuned) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A row is one line, also where the terminal has to break it.
    wide = Console(file=OUT.file, width=max(OUT.width, _WIDTH), highlight=False, soft_wrap=True)

    OUT.print(
        f"{tuned.num_images} images, {tuned.num_objects} objects. What was chosen on one half of "
        "the images is measured on the other;\nin brackets 95 % intervals over images. Untuned: no "
        "threshold, no tiling, NMS 0.7.",
        markup=False,
    )
    for report in tuned.classes:
        title = Text(f"{report.name}: {report.num_objects} objects")
        table = Table(title=title, title_justify="left")
        table.add_column("prompts", overflow="fold")
        for figure in ("precision", "recall", "F1", "F1 untuned"):
            table.add_column(figure, no_wrap=True)
        for one in report.compared:
            table.add_row(*_cells("; ".join(one.prompts), one))
        table.add_section()
        table.add_row(*_cells(f"chosen: {'; '.join(report.chosen.prompts)}", report.chosen))
        wide.print(table)
        OUT.print(_in_words(tuned, report), markup=False)
        for note in report.notes:
            complain(f"{report.name}: {note}")
    table = Table(title="tiling and NMS, on the images they were chosen on", title_justify="left")
    for column in ("tiling", "NMS", "mean of the classes"):
        table.add_column(column)
    for option in tuned.options:
        own = "off" if option.nms is None else f"{option.nms:g}"
        table.add_row(
            _tiling_words(option.tiling),
            f"{own} (chosen)" if option.is_chosen else own,
            _interval(option.value),
        )
    wide.print(table)
    OUT.print(f"Mean F1 of the classes: {_interval(tuned.mean_f1)}", markup=False)


def _cells(title: str, one: PromptFigures) -> list[Any]:
    from rich.text import Text

    figures = one.figures
    several = (figures.precision, figures.recall, figures.f1, one.untuned_f1)
    return [Text(title), *map(_interval, several)]


def _in_words(tuned: Tuned, report: ClassReport) -> str:
    own = tuned.choice.of_class[report.name]
    unit = "calibrated confidence" if own.curve else "score"
    error = f"{_interval(report.raw_error)} raw"
    if report.calibrated_error is not None:
        error += f", {_interval(report.calibrated_error)} calibrated"
    return f"Threshold: {own.threshold:g} ({unit}). Error of the scores (ECE): {error}."


def _tiling_words(tiling: Tiling | None) -> str:
    if tiling is None:
        return "off"
    (width, height), (x, y) = tiling.size_wh, tiling.overlap_wh
    return f"{width} x {height}, overlap {x} x {y}"


def _interval(one: Estimate) -> str:
    if one.value is None:
        return "-"
    return f"{one.value:.3f} ({one.low:.3f}–{one.high:.3f})"


def _file_text(tuned: Tuned, model: str, data: Path) -> str:
    """The settings, with what they were chosen for and by as comments."""
    import yaml

    lines = [
        f"Made by florence2 tune for {model} on {data}: {tuned.num_images} images, "
        f"{tuned.num_objects} objects.",
        f"Mean F1 on images they were not chosen on: {_interval(tuned.mean_f1)}.",
        "Where a class has a calibration, its threshold is about the calibrated confidence: they",
        "go together, and are true of this model, task and kind of image only.",
        *(
            f"{report.name}: precision {_interval(report.chosen.figures.precision)}, "
            f"recall {_interval(report.chosen.figures.recall)}, {report.num_objects} objects"
            for report in tuned.classes
        ),
        *(f"{report.name}: {note}" for report in tuned.classes for note in report.notes),
    ]
    head = "".join(f"# {' '.join(line.split())}\n" for line in lines)
    body: str = yaml.safe_dump(
        tuned.settings, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )
    return head + body


def _write(out: Path, text: str) -> None:
    """The whole file or nothing of it."""
    partial = out.with_name(f"{out.name}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise

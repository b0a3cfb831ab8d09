"""``florence2 convert``: a checkpoint to a folder that OpenVINO runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from florence2.errors import FlorenceError, RequestError, unknown_name
from serve.console import say

if TYPE_CHECKING:
    from florence2.conversion.convert import Picture

Model = Annotated[str, typer.Argument(help="A name of `florence2 models`, hub id or folder.")]
Runtime = Annotated[str, typer.Option(help="What is to run it: openvino.")]
Precision = Annotated[
    str, typer.Option(help="fp32, fp16 (stored), bf16, or int8 (calibrated on images).")
]
Out = Annotated[Path, typer.Option(help="A new folder; an earlier conversion in it is replaced.")]
CalibrationImages = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="DIR",
        help="Images like those you will label, for int8; without it, drawn scenes.",
    ),
]


def register(app: typer.Typer) -> None:
    app.command("convert")(convert)


def convert(
    model: Model,
    out: Out,
    runtime: Runtime = "openvino",
    precision: Precision = "fp32",
    calibration: CalibrationImages = None,
) -> None:
    """Convert a checkpoint once, for use by --model OUT on any machine with a CPU like this one."""
    from florence2.checkpoint.checkpoint import open_checkpoint
    from florence2.conversion.convert import convert as write
    from florence2.conversion.kept import notes_of
    from serve.cli.loading import fetch

    if runtime != "openvino":
        raise RequestError(unknown_name("runtime", runtime, ["openvino"]))
    images, source = _calibration(calibration, precision, out)
    fetch(model)
    checkpoint = open_checkpoint(model)
    converted = write(
        checkpoint, precision, out, calibration=images, calibration_source=source, progress=say
    )
    for note in (*converted.notes, *notes_of(converted)):
        say(f"Note: {note}")
    features, logits = converted.error["features"], converted.error["logits"]
    say(
        f"{converted.source} is in {out}, in {precision}: features {features:.2g} and logits "
        f"{logits:.2g} from float32. Use it with --model {out}"
    )


def _calibration(folder: Path | None, precision: str, out: Path) -> tuple[Sequence[Picture], str]:
    """Images and where they are from; none where the precision needs none."""
    if precision != "int8":
        if folder is not None:
            raise RequestError(
                f"Only int8 is calibrated on images, and precision {precision!r} was chosen; leave "
                "--calibration out."
            )
        return (), ""
    if folder is None:
        from florence2_demo.calibration import calibration_scenes

        say("Calibrating on drawn scenes; --calibration DIR with images of yours is better.")
        return calibration_scenes()
    return _opened(folder, out), f"images of {folder.name}"


def _opened(folder: Path, out: Path) -> list[Picture]:
    """Images of a folder and those below it, evenly chosen, and those that cannot be read named."""
    import numpy as np

    from florence2.conversion.convert import CALIBRATION_IMAGES
    from florence2.images import open_image
    from serve.labeling.images import find_images

    if not folder.is_dir():
        raise RequestError(
            f"--calibration is a folder with images, and {str(folder)!r} is none; name one."
        )
    files = [found.path for found in find_images(folder, recursive=True, skip=out)]
    count = min(len(files), CALIBRATION_IMAGES)
    opened: list[Picture] = []
    for number in range(count):
        file = files[number * len(files) // count]
        try:
            opened.append(np.asarray(open_image(file).image, np.uint8))
        except FlorenceError as error:
            say(f"{file} is left out: {error}")
    if not opened:
        raise RequestError(
            f"Calibration needs at least one image that can be opened, and {folder} holds none; "
            "name a folder with images like those you will label."
        )
    return opened

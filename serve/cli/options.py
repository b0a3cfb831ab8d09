"""Options that several commands have, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelName = Annotated[str, typer.Option(help="A name of `florence2 models`, hub id or folder.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Devices = Annotated[
    str | None,
    typer.Option(help="Several at once, in place of --device: all, or cuda:0,cuda:1, ..."),
]
Runtime = Annotated[str, typer.Option(help="auto, torch or openvino.")]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16, fp16, int8, or on a GPU nf4.")]
Batch = Annotated[int, typer.Option(min=1, max=256, help="Images per step.")]
Beams = Annotated[int | None, typer.Option(min=1, help="Beams of the search.")]
Tokens = Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")]
Labeled = Annotated[
    str,
    typer.Argument(
        metavar="PROJECT",
        help="The folder that florence2 label wrote to, or the id of a project of the platform.",
    ),
]


def project_or_folder(named: str) -> int | Path:
    """An id of the platform for digits, unless there is such a folder."""
    folder = Path(named)
    return int(named) if named.isascii() and named.isdigit() and not folder.exists() else folder

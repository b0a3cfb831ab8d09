"""Loading a model for a command, with a bar while its files are downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from serve.console import ERR

if TYPE_CHECKING:
    from florence2.api import Florence2
    from florence2.hub import ProgressUpdate


def load_model(name: str, device: str, runtime: str, precision: str = "auto") -> Florence2:
    """The model, or the FlorenceError that says in a sentence why there is none."""
    from florence2.api import Florence2

    if not ERR.is_terminal:
        return Florence2.load(name, device=device, runtime=runtime, precision=precision)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=ERR, transient=True) as bar:
        task = bar.add_task(f"Loading {name}", total=None)

        def show(update: ProgressUpdate) -> None:
            bar.update(task, completed=update.done_bytes, total=update.total_bytes)

        return Florence2.load(
            name, device=device, runtime=runtime, precision=precision, progress=show
        )

"""``florence2 undo``: the labels of one run go, as far as nobody has changed them since."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from serve.cli.options import Labeled, project_or_folder
from serve.console import OUT

if TYPE_CHECKING:
    from serve.provenance import Undone

Run = Annotated[str, typer.Option("--run", help="The run's id, see florence2 runs.")]
Show = Annotated[bool, typer.Option("--show", help="Only say what would be deleted.")]


def register(app: typer.Typer) -> None:
    app.command("undo")(undo)


def undo(project: Labeled, run: Run, show: Show = False) -> None:
    """Delete the labels of one run that nobody has changed since; name those that stay."""
    undone = _undone(project, run, show=show)
    for line in undone.lines():
        OUT.print(line, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1 if undone.failed else 0)


def _undone(project: str, run: str, *, show: bool) -> Undone:
    place = project_or_folder(project)
    if not isinstance(place, int):
        from serve.labeling.undo import undo_in

        return undo_in(place, run, show=show)
    from serve.cli.loading import platform_failures_told
    from serve.platform.team_files import api_of_environment
    from serve.platform.undo import undo_run

    api = api_of_environment()
    with platform_failures_told():
        return undo_run(api, place, run, show=show)

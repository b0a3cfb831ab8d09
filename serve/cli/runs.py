"""``florence2 runs``: which runs labeled a project, on disk or on the platform."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from serve.cli.options import Labeled, project_or_folder
from serve.console import OUT, say

if TYPE_CHECKING:
    from serve.provenance import Manifest


def register(app: typer.Typer) -> None:
    app.command("runs")(runs)


def runs(project: Labeled) -> None:
    """List the runs that labeled a project, the newest first: id, time, model, task, counts."""
    found = _runs_of(project)
    if not found:
        say("No run is noted there.")
    for manifest in found:
        OUT.print(manifest.line(), markup=False, highlight=False, soft_wrap=True)


def _runs_of(project: str) -> list[Manifest]:
    place = project_or_folder(project)
    if not isinstance(place, int):
        from serve.labeling.undo import runs_in

        return runs_in(place)
    from serve.cli.loading import platform_failures_told
    from serve.platform.run_store import runs_of
    from serve.platform.team_files import api_of_environment

    api = api_of_environment()
    with platform_failures_told():
        return runs_of(api, place)

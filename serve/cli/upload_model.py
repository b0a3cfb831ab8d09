"""``florence2 upload-model``: a trained model into the team files of a platform."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve.console import OUT, say

Out = Annotated[Path, typer.Argument(help="The folder that florence2 train wrote to.")]
Name = Annotated[
    str | None, typer.Option(help="What lists show. [default: the name of the folder]")
]
Team = Annotated[int | None, typer.Option(help="The team's id. [default: TEAM_ID]")]
Project = Annotated[
    int | None, typer.Option(help="The id of the project it was trained on, for its picture.")
]


def register(app: typer.Typer) -> None:
    app.command("upload-model")(upload_model)


def upload_model(out: Out, name: Name = None, team: Team = None, project: Project = None) -> None:
    """Upload a trained model, so that Serve Florence-2 lists and deploys it on the platform.

    The platform is that of SERVER_ADDRESS and API_TOKEN. An upload that broke off goes on.
    """
    upload_training(out, name=name, team_id=team, project_id=project)


def upload_training(
    out: Path,
    *,
    name: str | None = None,
    team_id: int | None = None,
    project_id: int | None = None,
) -> None:
    """Writes a training's result as an experiment and uploads it; RequestError without a platform.

    Prints the path that ``api.nn.deploy`` takes.
    """
    from serve.cli.loading import platform_failures_told, transfer_bar
    from serve.platform.experiments import write_experiment
    from serve.platform.team_files import platform_of_environment, upload_experiment

    api, team = platform_of_environment(team_id)
    folder = write_experiment(out, name=name, project_id=project_id)
    with platform_failures_told(), transfer_bar(f"Uploading {folder.parent.name}") as progress:
        checkpoint = upload_experiment(api, team, folder, progress)
    say(
        f"Uploaded to team {team}; choose it among the custom models of Serve Florence-2, or "
        "deploy it by this path:"
    )
    OUT.print(checkpoint, markup=False)

"""``florence2 upload``: what was labeled into a folder or bucket goes into a project."""

from __future__ import annotations

from typing import Annotated

import typer

from serve.console import say

Source = Annotated[
    str,
    typer.Argument(
        metavar="LABELED",
        help="What florence2 label wrote to: a folder of images, or a target of --ray.",
    ),
]
Project = Annotated[
    int,
    typer.Option(
        "--project",
        metavar="ID",
        min=1,
        help="A project of images on the platform of SERVER_ADDRESS and API_TOKEN.",
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Its dataset there, made where there is none. [default: the name of LABELED]",
    ),
]
Again = Annotated[bool, typer.Option("--again", help="Also what was uploaded before.")]


def register(app: typer.Typer) -> None:
    app.command("upload")(upload)


def upload(
    labeled: Source,
    project: Project,
    dataset: Dataset = None,
    again: Again = False,
) -> None:
    """Upload labeled images into a project of the platform; run again to go on."""
    raise typer.Exit(upload_labels(labeled, project, dataset, is_again=again))


def upload_labels(
    labeled: str, project: int, dataset: str | None = None, *, is_again: bool = False
) -> int:
    """Uploads and says how that went; the exit code."""
    from serve.cli.loading import platform_failures_told
    from serve.platform.team_files import api_of_environment
    from serve.scaling.upload import UploadJob, upload_labeled

    job = UploadJob(labeled, project, dataset, is_again)
    with platform_failures_told():
        report = upload_labeled(api_of_environment(), job)
    for line in report.lines(job):
        say(line)
    return report.exit_code

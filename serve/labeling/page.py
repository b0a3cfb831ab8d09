"""The page about the labels of a folder, made of its journal and of what lies in the project."""

from __future__ import annotations

import os
import shlex
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote

from florence2.budget import open_pixels
from florence2.errors import FlorenceError
from florence2.evaluation.html_report import Link
from florence2.images import open_image
from serve.labeling.files import Workspace
from serve.labeling.images import bytes_of, text_of
from serve.labeling.journal import Entry
from serve.labeling.previews import PREVIEWS_DIR, preview_path
from serve.labeling.project import GrowingProject
from serve.labeling.report import (
    FAILED_NAME,
    REPORT_NAME,
    Report,
    left_out_lines,
    not_renewed_lines,
)
from serve.labeling.undo import runs_in
from serve.provenance import Manifest
from serve.run_page.drawing import draw_label
from serve.run_page.figures import ImageOutcome, LowLabel, RunFigures, known_scores
from serve.run_page.page import PAGE_NAME, RunPage, here, original, render

_DRAW_FOR_S: Final = 6.0
"""What is not drawn by then is named only: the page may not keep anybody waiting."""
_SHOWN_RUNS: Final = 10
_SHOWN_FAILURES: Final = 20


def write_page(
    report: Report,
    entries: Iterable[Entry],
    manifest: Manifest,
    images: Path,
    project: GrowingProject,
    workspace: Workspace,
) -> None:
    """Writes ``report.html`` beside ``report.json``. OSError.

    ``entries`` has what became of each image, ``images`` is where they come from, and ``manifest``
    that of the run which has ended.
    """
    root = workspace.root
    links = _Links(root, images, project)
    figures = RunFigures()
    for entry in entries:
        if (outcome := _outcome(entry)) is not None:
            figures.add(outcome)
    _draw(figures.lowest, project)
    known = runs_in(root)
    # A run that had nothing to do is not noted; the page is about the one that did it all.
    shown = next((one for one in known if one.run == manifest.run), known[0] if known else manifest)
    page = RunPage(
        title=f"Labels of {text_of(images.resolve().name)}",
        manifest=shown,
        figures=figures,
        num_pending=report.pending,
        num_images=report.run.images,
        seconds=report.run.seconds,
        href_of=links.of,
        is_interrupted=report.run.interrupted,
        error=report.error,
        resume_command=report.resume_command,
        retry_command=report.retry_command if report.totals.failed else None,
        typed_in=here(),
        undo_commands=[
            shlex.join(["florence2", "undo", str(root), "--run", one.run])
            for one in known[:_SHOWN_RUNS]
            if one.counts.get("labels") and one.state != "undone"
        ],
        places=_places(report, images, root, links),
        remarks=_remarks(report, root),
    )
    workspace.write_text(root / PAGE_NAME, render(page))


class _Links:
    """Addresses beside the page: of what was labeled in the project, of what failed at its source.

    Names may be any bytes but a slash.
    """

    def __init__(self, root: Path, images: Path, project: GrowingProject) -> None:
        self._root = root
        self.project = self._to(project.folder)
        self._labeled = self._to(project.image_path("x"))[:-1]
        self._previews = self._to(preview_path(root / PREVIEWS_DIR, "x"))[: -len("x.jpg")]
        self._previews_dir = root / PREVIEWS_DIR
        self.source = self._to(images.parent if images.is_file() else images)

    def of(self, image: ImageOutcome) -> str:
        if image.state == "failed":
            return f"{self.source}/{quote(bytes_of(image.name))}" if self.source else ""
        if preview_path(self._previews_dir, image.key).exists():
            return f"{self._previews}{quote(image.key)}.jpg"
        return self._labeled + quote(image.key)

    def _to(self, path: Path) -> str:
        """Empty for a folder on another disk of Windows."""
        try:
            return quote(os.fsencode(os.path.relpath(path.absolute(), self._root.absolute())))
        except ValueError:
            return ""


def _outcome(entry: Entry) -> ImageOutcome | None:
    """None for an image that is as if it had never been looked at."""
    if entry.state == "undone":
        return None
    return ImageOutcome(
        name=entry.image,
        state=entry.state,
        key=entry.name,
        scores=known_scores(entry.scores, entry.objects),
        num_texts=len(entry.image_tags),
        is_truncated=entry.truncated > 0,
        notes=entry.notes,
        code=entry.code,
        message=entry.message,
    )


def _draw(lowest: Iterable[LowLabel], project: GrowingProject) -> None:
    """Draws labels as the project has them now; one that is there no more has no drawing."""
    until = time.monotonic() + _DRAW_FOR_S
    by_image: dict[str, list[LowLabel]] = defaultdict(list)
    for low in lowest:
        by_image[low.image.key].append(low)
    for name, labels in by_image.items():
        if time.monotonic() > until:
            return
        try:
            annotation = project.read_annotation(name)
            with open_image(project.image_path(name), room=open_pixels().hold) as picture:
                for low in labels:
                    draw_label(picture.image, annotation, low)
        # Whatever is in the way of a drawing: the label is named all the same.
        except (FlorenceError, OSError, ValueError):
            continue


def _places(report: Report, images: Path, root: Path, links: _Links) -> Mapping[str, Link]:
    places = {
        "images": Link(text_of(str(images.resolve())), links.source),
        "labels": Link(text_of(str(root.resolve())), links.project),
        "figures": Link(REPORT_NAME, REPORT_NAME),
        "this page": original(text_of(str(root.resolve() / PAGE_NAME))),
    }
    if report.totals.failed or report.not_renewed or report.findings.undone:
        places["all that was not labeled"] = Link(FAILED_NAME, FAILED_NAME)
    return places


def _remarks(report: Report, root: Path) -> list[str]:
    lines = [*not_renewed_lines(report)[:_SHOWN_FAILURES], *left_out_lines(report, root)]
    if report.changed:
        lines.append(
            f"{len(report.changed)} images changed since they were labeled; label them again with: "
            f"{report.relabel_command}"
        )
    return [line.strip() for line in lines]

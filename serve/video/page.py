"""The page about the labels of a video: its frames, what was found, the least sure boxes drawn."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Final
from urllib.parse import quote

from PIL import Image

from florence2.errors import FlorenceError
from florence2.evaluation.html_report import Link
from serve.labeling.files import Workspace
from serve.labeling.images import text_of
from serve.labeling.report import REPORT_NAME
from serve.naming import class_color
from serve.predict.annotations import object_tags
from serve.predict.geometry import rectangle_tlbr_from_box_xyxy
from serve.provenance import Manifest
from serve.run_page.drawing import draw_label
from serve.run_page.figures import ImageOutcome, LowLabel, RunFigures
from serve.run_page.page import PAGE_NAME, RunPage, here, original, render
from serve.sdk import sly
from serve.video.frames import Clip, Range, frame_at
from serve.video.journal import FrameJournal, Seen
from serve.video.report import VideoReport, remark_lines

_DRAW_FOR_S: Final = 6.0
"""What is not drawn by then is named only: finding a frame takes long in some files."""
_FAILED: Final = (
    "Frames that failed are not asked again: boxes of objects pass through them, between those of "
    "other frames. To ask all frames anew add --overwrite to the command."
)


def write_page(
    report: VideoReport, journal: FrameJournal, clip: Clip, wanted: Range, workspace: Workspace
) -> None:
    """Writes ``report.html`` beside ``report.json``. OSError."""
    figures = RunFigures()
    for seen in journal.seen():
        figures.add(_outcome(seen))
    _draw(figures.lowest, journal, clip)
    summary, settings = report.summary, dict(report.settings)
    told = {key: settings.pop(key, None) for key in ("task", "prompts", "model", "checkpoint")}
    num_wanted = wanted.count(summary.num_frames or clip.num_frames_said)
    page = RunPage(
        title=f"Labels of {text_of(clip.path.name)}",
        manifest=Manifest(
            run="",
            model={"name": told["model"], "checkpoint": told["checkpoint"]},
            task=str(told["task"]),
            prompts=told["prompts"] or (),
            settings=settings,
            run_tag=None,
            started="",
        ),
        figures=figures,
        num_pending=0 if report.is_complete else max(num_wanted - figures.num_images, 1),
        num_images=report.run.images,
        seconds=report.run.seconds,
        href_of=partial(_href, _address(clip, workspace)),
        is_interrupted=report.run.interrupted,
        error=report.error,
        resume_command=report.resume_command,
        advice=[_FAILED] if summary.failed else (),
        typed_in=here(),
        places=_places(report, clip, workspace),
        remarks=remark_lines(report),
        images="frames",
        further_counts={"objects": summary.objects, "boxes of objects": summary.figures},
    )
    workspace.write_text(workspace.root / PAGE_NAME, render(page))


def _outcome(seen: Seen) -> ImageOutcome:
    scores: dict[str, list[float | None]] = {}
    for one in seen.found:
        scores.setdefault(one.class_name, []).append(one.score)
    code, message = seen.failed or ("", "")
    return ImageOutcome(
        name=f"frame {seen.place.index} at {seen.place.time_s:.2f} s",
        state="failed" if seen.failed else "labeled" if seen.found else "empty",
        key=f"{seen.place.index}@{max(seen.place.time_s, 0.0):.2f}",
        scores=scores,
        is_truncated=seen.is_truncated,
        notes=seen.notes,
        code=code,
        message=message,
    )


def _draw(lowest: Iterable[LowLabel], journal: FrameJournal, clip: Clip) -> None:
    labels: dict[int, list[LowLabel]] = {}
    for low in lowest:
        labels.setdefault(int(low.image.key.partition("@")[0]), []).append(low)
    found = {seen.place.index: seen for seen in journal.seen() if seen.place.index in labels}
    until = time.monotonic() + _DRAW_FOR_S
    for index, of_frame in labels.items():
        if time.monotonic() > until:
            return
        try:
            pixels = frame_at(clip, found[index].place)
        # The file may be gone, or its disk; the frame is named all the same.
        except (FlorenceError, OSError):
            return
        if pixels is not None:
            for low in of_frame:
                draw_label(Image.fromarray(pixels), _annotation(found[index], clip), low)


def _annotation(seen: Seen, clip: Clip) -> sly.Annotation:
    width, height = clip.size_wh
    labels = [
        sly.Label(
            sly.Rectangle(*rectangle_tlbr_from_box_xyxy(one.box_xyxy, clip.size_wh)),
            sly.ObjClass(one.class_name, sly.Rectangle, class_color(one.class_name)),
            tags=object_tags(one.score, ()),
        )
        for one in seen.found
    ]
    return sly.Annotation((height, width), labels)


def _address(clip: Clip, workspace: Workspace) -> str:
    """Empty for a video on another disk of Windows."""
    try:
        path = os.path.relpath(clip.path.absolute(), workspace.root.absolute())
    except ValueError:
        return ""
    return quote(os.fsencode(path))


def _href(video: str, frame: ImageOutcome) -> str:
    """Browsers begin to play where a fragment says."""
    return f"{video}#t={frame.key.partition('@')[2]}" if video else ""


def _places(report: VideoReport, clip: Clip, workspace: Workspace) -> Mapping[str, Link]:
    project = os.path.relpath(report.project.absolute(), workspace.root.absolute())
    return {
        "video": Link(text_of(str(clip.path.absolute())), _address(clip, workspace)),
        "labels": Link(text_of(str(report.project.absolute())), quote(os.fsencode(project))),
        "figures": Link(REPORT_NAME, REPORT_NAME),
        "this page": original(text_of(str(workspace.root.absolute() / PAGE_NAME))),
    }

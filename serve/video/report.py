"""The end of a run over a video: what was labeled, what was not and why, and how to go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from serve.labeling.files import Workspace
from serve.labeling.report import REPORT_NAME, RunCounts
from serve.run_page.page import PAGE_NAME

SHOWN_NOTES: Final = 50
SHOWN_FAILURES: Final = 5


@dataclass(frozen=True, slots=True)
class Summary:
    """What is known of all frames so far, over all runs into one folder.

    ``num_frames`` are those of the video, ``last_frame`` is where the labels end, ``boxes_alone``
    belong to no object, ``damaged`` counts what could not be decoded, ``failed`` the frames without
    an answer, of which the first are named. ``frames_said`` is what the file's header promises
    where it promises more frames than there are.
    """

    num_frames: int = 0
    last_frame: int | None = None
    asked: int = 0
    empty: int = 0
    failed: int = 0
    failures: Mapping[str, str] | None = None
    failed_by_code: Mapping[str, int] | None = None
    objects: int = 0
    objects_by_class: Mapping[str, int] | None = None
    figures: int = 0
    boxes_alone: int = 0
    truncated: int = 0
    notes: Mapping[str, int] | None = None
    damaged: int = 0
    frames_said: int | None = None


@dataclass(frozen=True, slots=True)
class VideoReport:
    """The summary, and the counts of the run that just ended."""

    summary: Summary
    run: RunCounts
    is_complete: bool
    resume_command: str
    settings: Mapping[str, Any]
    project: Path
    error: str | None = None

    @property
    def exit_code(self) -> int:
        """0 all fine, 1 frames failed, are damaged or missing, 2 nothing done, 130 stopped."""
        if self.run.interrupted:
            return 130
        summary = self.summary
        if summary.asked == summary.failed:
            return 2
        is_cut = summary.frames_said is not None
        return 1 if summary.failed or summary.damaged or is_cut or self.error else 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self.summary) | {
            "complete": self.is_complete,
            "this_run": {
                "frames": self.run.images,
                "seconds": round(self.run.seconds, 3),
                "frames_per_second": round(self.run.images_per_second, 3),
                "interrupted": self.run.interrupted,
                "error": self.error,
            },
            "resume_command": None if self.is_complete else self.resume_command,
            "settings": dict(self.settings),
        }


def write_report(report: VideoReport, workspace: Workspace) -> None:
    text = json.dumps(report.to_dict(), ensure_ascii=False, indent=2) + "\n"
    workspace.write_text(workspace.root / REPORT_NAME, text)


def report_lines(report: VideoReport) -> list[str]:
    """The report as lines for a terminal."""
    summary, run = report.summary, report.run
    lines = [
        f"{summary.objects} objects with {summary.figures} boxes; {summary.asked} frames looked "
        f"at, {summary.empty} of them with nothing found, {summary.failed} failed; this run: "
        f"{run.images} frames, {run.images_per_second:.2f} frames/s.",
        f"Project: {report.project}",
        f"Report: {report.project.parent / PAGE_NAME}",
    ]
    if report.error:
        lines.insert(0, f"Stopped early: {report.error}")
    if summary.failed:
        lines.append("Frames without an answer, boxes of others pass through them:")
        lines += [f"  frame {index}: {text}" for index, text in (summary.failures or {}).items()]
        if summary.failed > SHOWN_FAILURES:
            lines.append(f"  ... and {summary.failed - SHOWN_FAILURES} more")
    lines += remark_lines(report)
    if summary.truncated:
        lines.append(
            f"{summary.truncated} frames have an answer cut at the token limit; raise it with "
            "--max-new-tokens."
        )
    if not report.is_complete:
        done = "nothing" if summary.last_frame is None else f"frames up to {summary.last_frame}"
        lines += [f"Done are {done} of {summary.num_frames}; go on with:", report.resume_command]
    return lines


def remark_lines(report: VideoReport) -> list[str]:
    """What is to be known of the video and of what is left out."""
    summary, lines = report.summary, list[str]()
    if summary.boxes_alone:
        lines.append(
            f"{summary.boxes_alone} boxes were seen in one frame only and are left out: an object "
            "is found in at least two of the frames that are looked at."
        )
    if summary.damaged:
        lines.append(
            f"{summary.damaged} parts of the video could not be decoded and count as no frames; "
            "the frames after them may have other numbers in a player."
        )
    if summary.frames_said is not None:
        lines.append(
            f"The file says that it has {summary.frames_said} frames and {summary.num_frames} "
            "could be decoded: it may be cut."
        )
    return lines

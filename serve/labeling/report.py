"""The end of a run: what was labeled, what was not and why, and what to do about it."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from serve.labeling.files import Workspace
from serve.labeling.images import Findings
from serve.labeling.journal import Entry, Totals
from serve.labeling.project import project_folder
from serve.run_page.page import PAGE_NAME

REPORT_NAME: Final = "report.json"
FAILED_NAME: Final = "failed.csv"
_SHOWN_FAILURES: Final = 5
_SHOWN_NOTES: Final = 50
# The full-width forms are formulas to spreadsheets in East Asian languages.
_FORMULA: Final = frozenset("=+-@＝＋－＠")
_CONTROLS: Final = frozenset("\t\r\n")
_PASSED_OVER: Final = " \t\r\n\v\f\0\ufeff\u00a0\"'"
_SHOWN_SUFFIXES: Final = 8


@dataclass(frozen=True, slots=True)
class Report:
    """Totals of the folder over all runs, and the counts of the run that just ended."""

    totals: Totals
    run: RunCounts
    pending: int
    gone: int
    changed: Sequence[str]
    not_renewed: Sequence[Entry]
    findings: Findings
    retry_command: str
    resume_command: str
    relabel_command: str
    settings: Mapping[str, Any]
    error: str | None = None

    @property
    def exit_code(self) -> int:
        """0 all fine, 1 some failed, 2 nothing could be done, 130 interrupted."""
        if self.run.interrupted:
            return 130
        if not self.totals.labeled + self.totals.empty:
            return 2
        return 1 if self.totals.failed or self.not_renewed or self.error else 0

    def to_dict(self) -> dict[str, Any]:
        totals = self.totals
        return {
            "images": totals.images,
            "labeled": totals.labeled,
            "empty": totals.empty,
            "failed": totals.failed,
            "pending": self.pending,
            "gone": self.gone,
            "changed": list(self.changed),
            "first_page_only": list(totals.first_of_many),
            "unsupported_files": self.findings.suffixes.total(),
            "unsupported_kinds": dict(self.findings.suffixes.most_common()),
            "unreadable_folders": [one.path for one in self.findings.unreadable],
            "folders_passed_over": {one.path: one.message for one in self.findings.passed_over},
            "subfolders_left_out": self.findings.subfolders,
            "objects": totals.objects,
            "truncated": totals.truncated,
            "with_notes": totals.noted,
            "notes": dict(totals.notes.most_common(_SHOWN_NOTES)),
            "failed_by_code": _by_code(totals),
            "this_run": {
                "images": self.run.images,
                "seconds": round(self.run.seconds, 3),
                "images_per_second": round(self.run.images_per_second, 3),
                "interrupted": self.run.interrupted,
                "error": self.error,
            },
            "retry_command": self.retry_command if totals.failed else None,
            "relabel_command": self.relabel_command if self.changed else None,
            "resume_command": self.resume_command if self.pending else None,
            "settings": dict(self.settings),
        }


def write_report(report: Report, workspace: Workspace) -> None:
    """``report.json``, and ``failed.csv`` while there is something that was not labeled."""
    text = json.dumps(report.to_dict(), ensure_ascii=False, indent=2) + "\n"
    # A path may hold bytes that are no text.
    text = text.encode("utf-8", "backslashreplace").decode()
    workspace.write_text(workspace.root / REPORT_NAME, text)
    failed = workspace.root / FAILED_NAME
    if rows := _failed_rows(report):
        workspace.write_text(failed, _failed_table(rows))
    else:
        failed.unlink(missing_ok=True)


def report_lines(report: Report, root: Path) -> list[str]:
    """The report as lines for a terminal."""
    totals, run = report.totals, report.run
    lines = [
        f"{totals.labeled} labeled ({totals.objects} objects), {totals.empty} with nothing found, "
        f"{totals.failed} failed; this run: {run.images} images, "
        f"{run.images_per_second:.2f} images/s.",
        f"Project: {project_folder(root)}",
        f"Report: {root / PAGE_NAME}",
    ]
    if report.error:
        lines.insert(0, f"Stopped early: {report.error}")
    lines += _failure_lines(report, root)
    if totals.truncated:
        lines.append(
            f"{totals.truncated} images have an answer cut at the token limit; "
            "raise it with --max-new-tokens."
        )
    if totals.noted:
        lines.append(
            f"Dropped or repaired parts of answers: {totals.noted} images, see {root / REPORT_NAME}"
        )
    lines += left_out_lines(report, root)
    if report.changed:
        lines += [
            f"{len(report.changed)} images changed since they were labeled "
            f"({named(report.changed)}); label them again with:",
            report.relabel_command,
        ]
    if report.pending:
        lines += [f"{report.pending} images are still to do; go on with:", report.resume_command]
    return lines


def left_out_lines(report: Report, root: Path) -> list[str]:
    """What is in the folder and not in the project, or only in part."""
    findings, lines = report.findings, []
    if several := report.totals.first_of_many:
        lines.append(
            f"{len(several)} files have several pages or frames, of which only the first was "
            f"labeled: {named(several)}"
        )
    if findings.suffixes:
        lines.append(
            f"{findings.suffixes.total()} files are of kinds that a project cannot hold "
            f"({count_suffixes(findings.suffixes)}), all of them in {root / FAILED_NAME}; convert "
            "images to JPEG or PNG."
        )
    others = [one for one in findings.files if one.code != "unsupported_kind"]
    lines += _first_of([f"{one.path}: {one.message}" for one in others], root / FAILED_NAME)
    lines += _first_of([one.message for one in findings.unreadable], root / FAILED_NAME)
    passed_over = [
        f"The folder {one.path!r} {one.message} and was not looked into."
        for one in findings.passed_over
    ]
    lines += _first_of(passed_over, root / REPORT_NAME)
    if findings.subfolders:
        lines.append(f"{findings.subfolders} subfolders were not looked into; add --recursive.")
    if report.gone:
        lines.append(
            f"{report.gone} images that were looked at are not in the folder any more; "
            "their labels stay."
        )
    return lines


def _first_of(lines: list[str], where: Path) -> list[str]:
    more = len(lines) - _SHOWN_FAILURES
    return [*lines[:_SHOWN_FAILURES], f"  ... and {more} more, see {where}"] if more > 0 else lines


def count_suffixes(suffixes: Counter[str]) -> str:
    """The commonest suffixes with their numbers."""
    shown = [f"{count} {suffix}" for suffix, count in suffixes.most_common(_SHOWN_SUFFIXES)]
    return ", ".join(shown if len(suffixes) <= len(shown) else [*shown, "..."])


def named(images: Sequence[str]) -> str:
    """The first images, and how many more there are."""
    shown = ", ".join(images[:_SHOWN_FAILURES])
    more = len(images) - _SHOWN_FAILURES
    return f"{shown} and {more} more" if more > 0 else shown


def _failure_lines(report: Report, root: Path) -> list[str]:
    failures = report.totals.failures
    lines = not_renewed_lines(report)
    if not failures:
        return lines
    counted = ", ".join(f"{count} {code}" for code, count in _by_code(report.totals).items())
    shown = list(failures.values())[:_SHOWN_FAILURES]
    lines.append(f"Failed: {counted}; all of them in {root / FAILED_NAME}")
    lines += [f"  {entry.image}: {entry.message}" for entry in shown]
    if len(failures) > len(shown):
        lines.append(f"  ... and {len(failures) - len(shown)} more")
    return [*lines, "Retry only these with:", report.retry_command]


def not_renewed_lines(report: Report) -> list[str]:
    """The images that were to be labeled again and have their earlier labels."""
    return [
        f"{entry.image}: changed and could not be labeled again, its earlier labels stay: "
        f"{entry.message}"
        for entry in report.not_renewed
    ]


def _by_code(totals: Totals) -> dict[str, int]:
    return dict(Counter(entry.code for entry in totals.failures.values()).most_common())


def _failed_rows(report: Report) -> list[tuple[str, str, str]]:
    entries = [*report.totals.failures.values(), *report.not_renewed]
    rows = [(entry.image, entry.code, entry.message) for entry in entries]
    return rows + [(one.path, one.code, one.message) for one in report.findings.undone]


def _failed_table(rows: Sequence[tuple[str, str, str]]) -> str:
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["image", "code", "message"])
    writer.writerows([_as_text(cell) for cell in row] for row in rows)
    return table.getvalue()


def _as_text(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula: names of images may be anybody's.

    Some pass over spaces and quotes before they look, so these do not hide what comes after.
    """
    first = cell.lstrip(_PASSED_OVER)[:1]
    return f"'{cell}" if first in _FORMULA or cell[:1] in _CONTROLS else cell


@dataclass(slots=True)
class RunCounts:
    """What this run did, beside the totals of the folder."""

    images: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds > 0 else 0.0

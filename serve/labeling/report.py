"""The end of a run: what was labeled, what was not and why, and what to do about it."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from serve.labeling.files import Workspace
from serve.labeling.journal import Totals
from serve.labeling.project import project_folder
from serve.labeling.run import RunCounts

REPORT_NAME: Final = "report.json"
FAILED_NAME: Final = "failed.csv"
_SHOWN_FAILURES: Final = 5
_SHOWN_NOTES: Final = 50
# The full-width forms are formulas to spreadsheets in East Asian languages.
_FORMULA: Final = frozenset("=+-@＝＋－＠")
_CONTROLS: Final = frozenset("\t\r\n")
_PASSED_OVER: Final = " \t\r\n\v\f\0\ufeff\u00a0\"'"


@dataclass(frozen=True, slots=True)
class Report:
    """Totals of the folder over all runs, and the counts of the run that just ended."""

    totals: Totals
    run: RunCounts
    pending: int
    unsupported: int
    unreadable: Sequence[str]
    retry_command: str
    resume_command: str
    settings: Mapping[str, Any]
    error: str | None = None

    @property
    def exit_code(self) -> int:
        """0 all fine, 1 some failed, 2 nothing could be done, 130 interrupted."""
        if self.run.interrupted:
            return 130
        if not self.totals.labeled + self.totals.empty:
            return 2
        return 1 if self.totals.failed or self.error else 0

    def to_dict(self) -> dict[str, Any]:
        totals = self.totals
        return {
            "images": totals.images,
            "labeled": totals.labeled,
            "empty": totals.empty,
            "failed": totals.failed,
            "pending": self.pending,
            "unsupported_files": self.unsupported,
            "unreadable_folders": list(self.unreadable),
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
            "resume_command": self.resume_command if self.pending else None,
            "settings": dict(self.settings),
        }


def write_report(report: Report, workspace: Workspace) -> None:
    """``report.json``, and ``failed.csv`` while there are failures."""
    text = json.dumps(report.to_dict(), ensure_ascii=False, indent=2) + "\n"
    workspace.write_text(workspace.root / REPORT_NAME, text)
    failed = workspace.root / FAILED_NAME
    if report.totals.failures:
        workspace.write_text(failed, _failed_table(report.totals))
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
    if report.unsupported:
        lines.append(
            f"{report.unsupported} files are images of a format a project cannot hold; "
            "convert them to JPEG or PNG."
        )
    if report.pending:
        lines += [f"{report.pending} images are still to do; go on with:", report.resume_command]
    return lines


def _failure_lines(report: Report, root: Path) -> list[str]:
    failures = report.totals.failures
    if not failures:
        return []
    counted = ", ".join(f"{count} {code}" for code, count in _by_code(report.totals).items())
    shown = list(failures.values())[:_SHOWN_FAILURES]
    lines = [f"Failed: {counted}; all of them in {root / FAILED_NAME}"]
    lines += [f"  {entry.image}: {entry.message}" for entry in shown]
    if len(failures) > len(shown):
        lines.append(f"  ... and {len(failures) - len(shown)} more")
    return [*lines, "Retry only these with:", report.retry_command]


def _by_code(totals: Totals) -> dict[str, int]:
    return dict(Counter(entry.code for entry in totals.failures.values()).most_common())


def _failed_table(totals: Totals) -> str:
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["image", "code", "message"])
    for entry in totals.failures.values():
        writer.writerow([_as_text(cell) for cell in (entry.image, entry.code, entry.message)])
    return table.getvalue()


def _as_text(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula: names of images may be anybody's.

    Some pass over spaces and quotes before they look, so these do not hide what comes after.
    """
    first = cell.lstrip(_PASSED_OVER)[:1]
    return f"'{cell}" if first in _FORMULA or cell[:1] in _CONTROLS else cell

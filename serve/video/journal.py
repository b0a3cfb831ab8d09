"""What was found in every frame that was asked about, one line each, so that a run can stop and go
on anywhere, and so that boxes are followed with all of it known.

The first line holds the settings; each batch of frames is one append that is on the disk before
the next one begins. A line that a kill cut short is dropped, and its frame is looked at again.
After the last frame a line says that the range was looked at to its end, and another one which
annotation was written of it all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from florence2.records import BoxXyxy
from serve.labeling.files import OutputError, Workspace
from serve.labeling.journal import check_same_settings
from serve.video.frames import Place

JOURNAL_NAME: Final = "frames.jsonl"
_FORMAT: Final = "video-1"
_FRAME: Final = "frame"
_END: Final = "end"
_WRITTEN: Final = "written"


@dataclass(frozen=True, slots=True)
class Detection:
    """A box in pixels of an upright frame, x2 and y2 past its last pixel; the score is 1 where the
    model gave none."""

    class_name: str
    box_xyxy: BoxXyxy
    score: float


@dataclass(frozen=True, slots=True)
class Seen:
    """A frame that was asked about. ``failed`` is why it has no answer, as code and sentence.

    ``times_s`` and ``damaged`` are those of ``AskedFrame``.
    """

    place: Place
    times_s: tuple[float, ...]
    damaged: int = 0
    found: tuple[Detection, ...] = ()
    failed: tuple[str, str] | None = None
    notes: tuple[str, ...] = ()
    is_truncated: bool = False


class FrameJournal:
    """The journal of one video, open for appending in the file ``path``. ``last`` is the place of
    its last frame.

    ``annotation_hash`` is that of the annotation which was written last, and ``summary`` what was
    said of it, None once frames came after it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: Place | None = None
        self.num_asked = 0
        self.is_complete = False
        self.annotation_hash = ""
        self.summary: dict[str, Any] | None = None
        whole = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines):
                entry = _read(line) if number else {}
                if entry is None or not line.endswith(b"\n"):
                    break
                whole += len(line)
                if number:
                    self._count(entry)
        self._whole = whole
        self._file = path.open("r+b", buffering=0)
        self._file.truncate(whole)
        self._file.seek(whole)

    def seen(self) -> Iterator[Seen]:
        """Every frame that was asked about, in order."""
        with self.path.open("rb") as lines:
            next(lines)
            for line in lines:
                entry = json.loads(line)
                if _FRAME in entry:
                    yield _seen(entry)

    def append(self, frames: Sequence[Seen]) -> None:
        """Counts frames once their lines are on the disk; OSError where that is full."""
        self._write([_entry(seen) for seen in frames])

    def end(self) -> None:
        """Says that no frame of the range is left."""
        self._write([{_END: True}])

    def wrote(self, annotation_hash: str) -> None:
        """Says whose the annotation is, before what stands beside it is whole."""
        self._write([{_WRITTEN: annotation_hash, "summary": None}])

    def written(self, annotation_hash: str, summary: Mapping[str, Any]) -> None:
        """Says which annotation was written of all frames so far."""
        self._write([{_WRITTEN: annotation_hash, "summary": dict(summary)}])

    def close(self) -> None:
        self._file.close()

    def _write(self, entries: Sequence[dict[str, Any]]) -> None:
        lines = [json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries]
        left = memoryview("".join(lines).encode())
        end = self._whole + len(left)
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError:
            # Half a line is none, also for who reads before the next run.
            self._file.truncate(self._whole)
            self._file.seek(self._whole)
            raise
        self._whole = end
        for entry in entries:
            self._count(entry)

    def _count(self, entry: Mapping[str, Any]) -> None:
        if _WRITTEN in entry:
            self.annotation_hash, self.summary = entry[_WRITTEN], entry["summary"]
            return
        self.summary = None
        if _END in entry:
            self.is_complete = True
        else:
            self.num_asked += 1
            self.last = _place(entry)


def begin_journal(folder: Path, lines: str = "") -> FrameJournal:
    """A journal in a folder that nobody else has, which goes on behind ``lines`` of another one."""
    path = folder / JOURNAL_NAME
    path.write_text(json.dumps({"format": _FORMAT, "settings": {}}) + "\n" + lines, "utf-8")
    return FrameJournal(path)


def open_frame_journal(workspace: Workspace, settings: Mapping[str, Any]) -> FrameJournal:
    """The journal for ``settings``, begun where there is none.

    Raises OutputError when the folder holds other work.
    """
    path = workspace.root / JOURNAL_NAME
    if is_begun(workspace.root):
        check_same_settings(workspace.root, _read_settings(path), settings)
    else:
        check_usable(workspace.root)
        header = json.dumps({"format": _FORMAT, "settings": dict(settings)}) + "\n"
        workspace.write_text(path, header)
        workspace.sync()
    return FrameJournal(path)


def is_begun(root: Path) -> bool:
    """False too for the journal of a run that never got to a frame: nothing is lost with it."""
    path = root / JOURNAL_NAME
    if not path.exists():
        return False
    with path.open("rb") as lines:
        next(lines, None)
        return _read(next(lines, b"")) is not None


def check_usable(root: Path) -> None:
    """Raises OutputError for a folder that holds something else than a run over a video."""
    if (root / JOURNAL_NAME).exists():
        _read_settings(root / JOURNAL_NAME)
        return
    others = [entry.name for entry in root.iterdir() if not entry.name.startswith(".")]
    if others:
        raise OutputError(
            f"A video begins in an empty folder and {str(root)!r} holds {sorted(others)[0]!r}; "
            "choose another --out."
        )


def _read_settings(path: Path) -> dict[str, Any]:
    with path.open("rb") as lines:
        header = _read(lines.readline())
    if header and header.get("format") == _FORMAT and isinstance(header.get("settings"), dict):
        return dict(header["settings"])
    raise OutputError(
        f"The journal of a video begins with its settings and {str(path)!r} does not; choose "
        "another --out."
    )


def _read(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _entry(seen: Seen) -> dict[str, Any]:
    entry = {
        _FRAME: seen.place.index,
        "pts": seen.place.pts,
        "times_s": seen.times_s,
        "damaged": seen.damaged,
        "found": [(one.class_name, one.box_xyxy, one.score) for one in seen.found],
        "failed": seen.failed,
        "notes": seen.notes,
        "truncated": seen.is_truncated,
    }
    always = (_FRAME, "pts", "times_s", "found")
    return {key: value for key, value in entry.items() if value or key in always}


def _place(entry: Mapping[str, Any]) -> Place:
    return Place(entry[_FRAME], entry["pts"], entry["times_s"][-1])


def _seen(entry: Mapping[str, Any]) -> Seen:
    failed = entry.get("failed")
    return Seen(
        _place(entry),
        tuple(entry["times_s"]),
        entry.get("damaged", 0),
        tuple(Detection(name, tuple(box), score) for name, box, score in entry["found"]),
        (failed[0], failed[1]) if failed else None,
        tuple(entry.get("notes", ())),
        entry.get("truncated", False),
    )

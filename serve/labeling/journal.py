"""What became of every image, one line each, so that a run can stop anywhere and go on.

The first line holds the settings; each batch is one append that is on the disk before the next
batch begins. A line that a kill cut short is dropped, and its image is looked at again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from serve.labeling.files import OutputError, Workspace

JOURNAL_NAME: Final = "journal.jsonl"
_FORMAT: Final = 1

State = Literal["labeled", "empty", "failed"]


@dataclass(frozen=True, slots=True)
class Entry:
    """``empty``: looked, found nothing. ``failed``: not looked at, for the reason given."""

    image: str
    name: str
    state: State
    objects: int = 0
    truncated: int = 0
    code: str = ""
    message: str = ""
    notes: Sequence[str] = ()


@dataclass(slots=True)
class Totals:
    """Counts over all runs into one folder; only failures are remembered one by one."""

    labeled: int = 0
    empty: int = 0
    objects: int = 0
    truncated: int = 0
    noted: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    failures: dict[str, Entry] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        return len(self.failures)

    @property
    def images(self) -> int:
        return self.labeled + self.empty + self.failed

    def add(self, entry: Entry) -> None:
        if entry.state == "failed":
            self.failures[entry.image] = entry
            return
        self.failures.pop(entry.image, None)
        self.labeled += entry.state == "labeled"
        self.empty += entry.state == "empty"
        self.objects += entry.objects
        self.truncated += entry.truncated > 0
        self.noted += bool(entry.notes)
        self.notes.update(entry.notes)


class Journal:
    """The journal of one output folder, open for appending."""

    def __init__(self, path: Path, is_kept: Callable[[Entry], bool]) -> None:
        self.totals = Totals()
        self._settled: set[bytes] = set()
        whole = _length_of_whole_lines(path)
        for entry in _entries(path):
            if not self.is_settled(entry.image) and (entry.state == "failed" or is_kept(entry)):
                self._take(entry)
        self._file = path.open("r+b")
        self._file.truncate(whole)
        self._file.seek(whole)

    def is_settled(self, image: str) -> bool:
        """Labeled, or looked at and found empty."""
        return _digest(image) in self._settled

    def is_known(self, image: str) -> bool:
        return self.is_settled(image) or self.has_failed(image)

    def has_failed(self, image: str) -> bool:
        return image in self.totals.failures

    def append(self, entries: Iterable[Entry]) -> None:
        lines = []
        for entry in entries:
            self._take(entry)
            lines.append(json.dumps(_compact(entry)) + "\n")
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _take(self, entry: Entry) -> None:
        self.totals.add(entry)
        if entry.state != "failed":
            self._settled.add(_digest(entry.image))


def open_journal(
    workspace: Workspace, settings: Mapping[str, Any], is_kept: Callable[[Entry], bool]
) -> Journal:
    """The journal for ``settings``; entries whose files are not ``is_kept`` count as never made.

    Raises OutputError when the folder holds other work.
    """
    path = workspace.root / JOURNAL_NAME
    if is_begun(workspace.root):
        _check_same_settings(workspace.root, read_settings(path), settings)
    else:
        if not path.exists():
            check_unused(workspace.root)
        else:
            read_settings(path)
        header = json.dumps({"format": _FORMAT, "settings": dict(settings)}) + "\n"
        workspace.write_text(path, header, durable=True)
    return Journal(path, is_kept)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings a journal was begun with. Raises OutputError for a file of another kind."""
    try:
        with path.open("rb") as lines:
            header = json.loads(lines.readline())
        if header["format"] == _FORMAT and isinstance(header["settings"], dict):
            return dict(header["settings"])
    except (ValueError, KeyError, TypeError):
        pass
    raise OutputError(
        f"A journal begins with its settings and {str(path)!r} does not; choose another --out."
    )


def is_begun(root: Path) -> bool:
    """False too for the journal of a run that never got to an image: nothing is lost with it."""
    path = root / JOURNAL_NAME
    return path.exists() and next(_entries(path), None) is not None


def check_unused(root: Path) -> None:
    """Raises OutputError for a folder that holds something else than a run."""
    others = [entry.name for entry in root.iterdir() if not entry.name.startswith(".")]
    if others:
        raise OutputError(
            f"A run begins in an empty folder and {str(root)!r} holds {sorted(others)[0]!r}; "
            "choose another --out."
        )


def _check_same_settings(root: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(dict(new)))
    for key in [*now, *old]:
        is_unknown = key == "checkpoint" and None in (old.get(key), now.get(key))
        if old.get(key) != now.get(key) and not is_unknown:
            raise OutputError(
                f"One folder holds one kind of labels and {str(root)!r} was begun with "
                f"{key} {_shown(old.get(key))}, not {_shown(now.get(key))}; choose another --out, "
                "or --overwrite to set the old labels aside."
            )


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _entries(path: Path) -> Iterator[Entry]:
    with path.open("rb") as lines:
        next(lines, None)
        for line in lines:
            try:
                yield Entry(**json.loads(line))
            except (ValueError, TypeError):
                continue


def _length_of_whole_lines(path: Path) -> int:
    length = 0
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                length += len(line)
    return length


def _compact(entry: Entry) -> dict[str, Any]:
    return {key: value for key, value in asdict(entry).items() if value not in (0, "", ())}


def _digest(image: str) -> bytes:
    return hashlib.blake2b(image.encode("utf-8", "backslashreplace"), digest_size=12).digest()

"""What became of every image, one line each, so that a run can stop anywhere and go on.

The first line holds the settings; each batch is one append that is on the disk before the next
batch begins, and after everything that it is about. A line that a kill cut short is dropped, and
its image is looked at again. Of several lines about one image the last one holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from serve.labeling.files import OutputError, Stamp, Workspace

JOURNAL_NAME: Final = "journal.jsonl"
# In a folder that earlier labels are being moved to, until their journal is there.
OUTPUT_MARKER: Final = ".florence2-output"
_FORMAT: Final = 1
# A power cut takes what was written last, so that is looked at closely.
_CHECKED_CLOSELY: Final = 64

State = Literal["labeled", "empty", "failed", "undone"]


@dataclass(frozen=True, slots=True)
class Entry:
    """``empty``: looked, found nothing. ``failed``: not looked at, for the reason given.
    ``undone``: as if it had never been looked at.

    ``size_bytes``, ``mtime_ns`` and ``hash`` are the image file's when it was labeled, the
    ``labels_`` ones those of the annotation that was written. ``run`` is the id of the run that
    wrote it, ``labels`` and ``image_tags`` the digests of what it wrote, ``scores`` those of the
    labels by class, in their order there, None for a label without one. Journals of earlier
    versions lack them.
    """

    image: str
    name: str
    state: State
    objects: int = 0
    truncated: int = 0
    code: str = ""
    message: str = ""
    notes: Sequence[str] = ()
    is_first_of_many: bool = False
    size_bytes: int = 0
    mtime_ns: int = 0
    hash: str = ""
    labels_bytes: int = 0
    labels_hash: str = ""
    run: str = ""
    labels: Sequence[str] = ()
    image_tags: Sequence[str] = ()
    scores: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """What the journal knows of an image file that was labeled, and of its labels as written."""

    stamp: Stamp
    hash: str
    labels_hash: str


IsKept = Callable[[Entry, bool], bool]
"""Whether what was written for an entry is still there and whole; looks closely if told to."""


@dataclass(slots=True)
class Totals:
    """Counts over all runs into one folder; only failures are remembered one by one."""

    labeled: int = 0
    empty: int = 0
    objects: int = 0
    truncated: int = 0
    noted: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    first_of_many: list[str] = field(default_factory=list)
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
        if entry.is_first_of_many:
            self.first_of_many.append(entry.image)


class Journal:
    """The journal of one output folder, open for appending.

    ``lost`` are images whose files are not kept, and which so count as never labeled.
    ``not_renewed`` are images of this run that failed when they were labeled again; their earlier
    labels hold.
    """

    def __init__(self, path: Path, is_kept: IsKept) -> None:
        self.totals = Totals()
        self.lost: list[str] = []
        self.renewed: set[str] = set()
        self.not_renewed: dict[str, Entry] = {}
        self._path = path
        self._settled: dict[bytes, bytes] = {}
        whole = _length_of_whole_lines(path)
        self._read(is_kept)
        self._file = path.open("r+b")
        self._file.truncate(whole)
        self._file.seek(whole)

    def source_of(self, image: str) -> Source | None:
        """None for an image that is not settled, or was by a version that did not remember."""
        packed = self._settled.get(_digest(image))
        return _unpacked(packed) if packed else None

    def recount(self) -> None:
        """Totals without the lines that later ones took the place of."""
        self.totals = Totals()
        for entry in self.entries():
            self.totals.add(entry)

    def entries(self) -> Iterator[Entry]:
        """What holds of each image that was labeled, found empty or failed, one at a time."""
        for _, entry in _last_entries(self._path):
            if entry.state == "undone":
                continue
            if entry.state == "failed" or self.is_settled(entry.image):
                yield entry

    def is_settled(self, image: str) -> bool:
        """Labeled, or looked at and found empty."""
        return _digest(image) in self._settled

    def is_known(self, image: str) -> bool:
        return self.is_settled(image) or self.has_failed(image)

    def has_failed(self, image: str) -> bool:
        return image in self.totals.failures

    def append(self, entries: Iterable[Entry]) -> None:
        """Counts entries once their lines are on the disk; OSError where that is full."""
        settled = [entry for entry in entries if not self._fails_again(entry)]
        lines = [json.dumps(_compact(entry)) + "\n" for entry in settled]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        for entry in settled:
            if self.is_settled(entry.image):
                self.renewed.add(entry.image)
            self._take(entry)

    def _fails_again(self, entry: Entry) -> bool:
        if entry.state != "failed" or not self.is_settled(entry.image):
            return False
        self.not_renewed[entry.image] = entry
        return True

    def close(self) -> None:
        """What could not be appended is tried once more and then given up: its run has said so."""
        with suppress(OSError):
            self._file.close()

    def _read(self, is_kept: IsKept) -> None:
        for from_end, entry in _last_entries(self._path):
            if entry.state == "undone":
                continue
            if entry.state == "failed" or is_kept(entry, from_end <= _CHECKED_CLOSELY):
                self._take(entry)
            else:
                self.lost.append(entry.image)

    def _take(self, entry: Entry) -> None:
        self.totals.add(entry)
        if entry.state != "failed":
            self._settled[_digest(entry.image)] = _packed(entry)


def open_journal(workspace: Workspace, settings: Mapping[str, Any], is_kept: IsKept) -> Journal:
    """The journal for ``settings``; entries whose files are not ``is_kept`` count as never made.

    Raises OutputError when the folder holds other work.
    """
    path = workspace.root / JOURNAL_NAME
    if is_begun(workspace.root):
        check_same_settings(workspace.root, read_settings(path), settings)
    else:
        check_usable(workspace.root)
        header = json.dumps({"format": _FORMAT, "settings": dict(settings)}) + "\n"
        workspace.write_text(path, header)
        workspace.sync()
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


def is_output(folder: Path) -> bool:
    """Whether a folder holds what a run wrote: its journal says so, whatever the folder's name.

    False for a folder that cannot be looked into.
    """
    path = folder / JOURNAL_NAME
    try:
        if not path.is_file():
            return (folder / OUTPUT_MARKER).exists()
    except OSError:
        return False
    try:
        read_settings(path)
    except OutputError:
        return False
    except OSError:
        # There is a journal, and nobody may read it.
        return True
    return True


def output_around(folder: Path) -> Path | None:
    """The output folder of a run that ``folder`` is or lies in."""
    return next((one for one in (folder, *folder.parents) if is_output(one)), None)


def is_begun(root: Path) -> bool:
    """False too for the journal of a run that never got to an image: nothing is lost with it."""
    path = root / JOURNAL_NAME
    return path.exists() and next(_entries(path), None) is not None


def check_usable(root: Path) -> None:
    """Raises OutputError for a folder that holds something else than a run."""
    path = root / JOURNAL_NAME
    if path.exists():
        read_settings(path)
        return
    others = [entry.name for entry in root.iterdir() if not entry.name.startswith(".")]
    if others:
        raise OutputError(
            f"A run begins in an empty folder and {str(root)!r} holds {sorted(others)[0]!r}; "
            "choose another --out."
        )


def check_same_settings(root: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises OutputError where a folder was begun with other settings than these."""
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


def _last_entries(path: Path) -> Iterator[tuple[int, Entry]]:
    """The last line about each image, with its place from the end, which is 1 for the last."""
    last: dict[bytes, int] = {}
    number = 0
    for number, entry in enumerate(_entries(path)):
        last[_digest(entry.image)] = number
    for place, entry in enumerate(_entries(path)):
        if last[_digest(entry.image)] == place:
            yield number - place + 1, entry


def entries_of_run(path: Path, run_id: str) -> Iterator[Entry]:
    """What holds of a run: entries that no later line took the place of."""
    for _, entry in _last_entries(path):
        if entry.run == run_id and entry.state != "undone":
            yield entry


def settled_entries(path: Path) -> Iterator[Entry]:
    """What holds of each image that was labeled or found empty."""
    for _, entry in _last_entries(path):
        if entry.state in ("labeled", "empty"):
            yield entry


def append_entries(path: Path, entries: Iterable[Entry]) -> None:
    """Lines behind a journal that nobody has open, on the disk when this returns."""
    whole = _length_of_whole_lines(path)
    with path.open("r+b") as file:
        file.truncate(whole)
        file.seek(whole)
        file.write("".join(json.dumps(_compact(entry)) + "\n" for entry in entries).encode())
        file.flush()
        os.fsync(file.fileno())


def _length_of_whole_lines(path: Path) -> int:
    length = 0
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                length += len(line)
    return length


def _compact(entry: Entry) -> dict[str, Any]:
    return {key: value for key, value in asdict(entry).items() if value not in (0, "", (), {})}


# Size, time and the two hashes, for as many images as a folder may have.
_SOURCE: Final = struct.Struct("<qq16s16s")


def _packed(entry: Entry) -> bytes:
    if not entry.hash:
        return b""
    hashes = bytes.fromhex(entry.hash), bytes.fromhex(entry.labels_hash)
    return _SOURCE.pack(entry.size_bytes, entry.mtime_ns, *hashes)


def _unpacked(packed: bytes) -> Source:
    size_bytes, mtime_ns, content, labels = _SOURCE.unpack(packed)
    return Source(Stamp(size_bytes, mtime_ns), content.hex(), labels.hex())


def _digest(image: str) -> bytes:
    return hashlib.blake2b(image.encode("utf-8", "backslashreplace"), digest_size=12).digest()

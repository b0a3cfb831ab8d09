"""What lies in a folder of images: the images, and by name whatever is not taken for one."""

from __future__ import annotations

import os
import stat
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from serve.labeling.journal import is_output, output_around

# What the SDK reads back from a project; other formats would vanish from it without a word.
EXTENSIONS: Final = (
    ".jpg", ".jpeg", ".jfif", ".mpo", ".bmp", ".png", ".webp", ".tif", ".tiff",
)  # fmt: skip
# What lies beside images and is none: labels, lists and notes. Every other file is named.
SIDECARS: Final = frozenset((
    ".txt", ".json", ".jsonl", ".ndjson", ".geojson", ".xml", ".csv", ".tsv", ".yaml", ".yml",
    ".toml", ".ini", ".cfg", ".conf", ".md", ".rst", ".log", ".html", ".htm", ".js", ".css", ".py",
    ".ipynb", ".sh", ".bat", ".db", ".lnk", ".url", ".aae", ".xmp", ".exif", ".iptc", ".names",
    ".data", ".cache", ".md5", ".sha1", ".sha256", ".sha512",
    # World files and projections of maps.
    ".tfw", ".tifw", ".jgw", ".jpgw", ".pgw", ".pngw", ".bpw", ".wld", ".prj", ".ovr",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that was not labeled; ``path`` is the one below the images folder."""

    path: str
    code: str
    message: str


@dataclass(slots=True)
class Findings:
    """What a walk came by beside images.

    ``files`` were not labeled and perhaps should have been; ``kinds`` counts those that no project
    can hold, by suffix. ``unreadable`` folders could not be looked into, those ``passed_over`` did
    not have to be, and ``subfolders`` counts those of a walk that is not recursive.
    """

    files: list[LeftOut] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    unreadable: list[LeftOut] = field(default_factory=list)
    passed_over: list[LeftOut] = field(default_factory=list)
    subfolders: int = 0

    @property
    def undone(self) -> list[LeftOut]:
        """Everything that somebody has to look at."""
        return [*self.files, *self.unreadable]

    def file(self, path: str, code: str, message: str) -> None:
        self.files.append(LeftOut(path, code, message))

    def kind(self, path: str, suffix: str) -> None:
        self.kinds[suffix or "no suffix"] += 1
        self.file(
            path,
            "unsupported_kind",
            f"A project holds {', '.join(EXTENSIONS)}, and this file has "
            f"{suffix or 'no suffix'}; convert it, or name it after what it is.",
        )


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def walk_images(
    folder: Path, *, recursive: bool, skip: Path, findings: Findings | None = None
) -> Iterator[tuple[str, Path]]:
    """Key and path of every image below ``folder`` in a stable order; ``findings`` has the rest.

    Names that begin with a dot are passed over, and ``skip``, which is the run's own output. A
    linked folder is walked after everything that is no link, unless it was walked already or holds
    one that is: so links may form loops. A link to an image is an image, also where it leads
    nowhere, which the reader says.
    """
    yield from _Walk(folder, recursive, skip, findings or Findings()).run()


class _Walk:
    def __init__(self, root: Path, recursive: bool, skip: Path, findings: Findings) -> None:
        self._root = root
        self._recursive = recursive
        self._skip = skip
        self._findings = findings
        self._walked: dict[tuple[int, int], str] = {}
        self._links: deque[tuple[str, Path]] = deque()

    def run(self) -> Iterator[tuple[str, Path]]:
        yield from self._folder(self._root, "")
        while self._links:
            key, link = self._links.popleft()
            target = link.resolve()
            if target.is_relative_to(self._skip):
                continue
            if self._recursive and self._root.resolve().is_relative_to(target):
                self._pass_over(key, "linked_folder", "leads to a folder that holds this one")
            elif output_around(target) is not None:
                self._pass_over(key, "earlier_output", "leads into the output of an earlier run")
            else:
                yield from self._below(link, key)

    def _folder(self, folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
        entries = self._entries(folder, prefix)
        for entry in entries:
            key = prefix + text_of(entry.name)
            if entry.is_dir(follow_symlinks=False):
                yield from self._below(Path(entry.path), key)
            elif entry.is_symlink():
                yield from self._link(entry, key)
            elif entry.is_file(follow_symlinks=False):
                yield from self._file(entry, key)
            else:
                self._no_file(entry, key)

    def _entries(self, folder: Path, prefix: str) -> list[os.DirEntry[str]]:
        try:
            stats = os.stat(folder)
            self._walked[stats.st_dev, stats.st_ino] = prefix.rstrip("/")
            with os.scandir(folder) as listed:
                seen = [entry for entry in listed if not entry.name.startswith(".")]
        except OSError as error:
            if not prefix:
                raise
            reason = error.strerror or str(error)
            key = prefix.rstrip("/")
            message = f"The folder {key!r} cannot be read ({reason}); its images are left out."
            self._findings.unreadable.append(LeftOut(key, "unreadable_folder", message))
            return []
        return sorted(seen, key=lambda entry: entry.name)

    def _below(self, folder: Path, key: str) -> Iterator[tuple[str, Path]]:
        if folder.resolve() == self._skip:
            return
        if is_output(folder):
            self._pass_over(key, "earlier_output", "is the output of an earlier run")
        elif not self._recursive:
            self._findings.subfolders += 1
        elif (walked := self._walked_as(folder)) is not None:
            self._pass_over(key, "linked_folder", f"is the same folder as {walked or '.'!r}")
        else:
            yield from self._folder(folder, f"{key}/")

    def _walked_as(self, folder: Path) -> str | None:
        try:
            stats = os.stat(folder)
        except OSError:
            return None
        return self._walked.get((stats.st_dev, stats.st_ino))

    def _link(self, entry: os.DirEntry[str], key: str) -> Iterator[tuple[str, Path]]:
        try:
            mode = os.stat(entry.path).st_mode
        except OSError:
            if is_image(entry.name):
                yield key, Path(entry.path)
            elif not _is_sidecar(entry.name):
                message = f"The link leads to {_target(entry.path)}, where nothing is; mend it."
                self._findings.file(key, "broken_link", message)
            return
        if stat.S_ISDIR(mode):
            self._links.append((key, Path(entry.path)))
        elif stat.S_ISREG(mode):
            yield from self._file(entry, key)
        else:
            self._no_file(entry, key)

    def _file(self, entry: os.DirEntry[str], key: str) -> Iterator[tuple[str, Path]]:
        if is_image(entry.name):
            yield key, Path(entry.path)
        elif not _is_sidecar(entry.name):
            self._findings.kind(key, os.path.splitext(entry.name)[1].lower())

    def _no_file(self, entry: os.DirEntry[str], key: str) -> None:
        if is_image(entry.name):
            self._findings.file(key, "no_file", "An image is a file, and this is none; remove it.")

    def _pass_over(self, key: str, code: str, reason: str) -> None:
        self._findings.passed_over.append(LeftOut(key, code, reason))


def broken_link(path: Path) -> str | None:
    """A sentence about a link that leads to no file; None for everything else."""
    if not path.is_symlink() or path.exists():
        return None
    return f"The link leads to {_target(path)}, where no file is; mend it and use --retry-failed."


def text_of(name: str) -> str:
    """``name`` with bytes that are not text written out, so that it can be stored and shown."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _target(link: str | Path) -> str:
    try:
        return repr(text_of(os.readlink(link)))
    except OSError:
        return "somewhere"


def _is_sidecar(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SIDECARS

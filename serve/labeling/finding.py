"""What lies in a folder of images: the images, and by name whatever is not taken for one."""

from __future__ import annotations

import os
import re
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
# Pillow's names of what may lie in such files: the SDK reads no other one, whatever its name.
FORMATS: Final = frozenset(("JPEG", "MPO", "BMP", "PNG", "WEBP", "TIFF"))
# What lies beside images and is none: labels, lists and notes. Every other file is named.
SIDECARS: Final = frozenset((
    ".txt", ".json", ".jsonl", ".ndjson", ".geojson", ".xml", ".csv", ".tsv", ".yaml", ".yml",
    ".toml", ".ini", ".cfg", ".conf", ".md", ".rst", ".log", ".html", ".htm", ".js", ".css", ".py",
    ".ipynb", ".sh", ".bat", ".db", ".lnk", ".url", ".aae", ".xmp", ".exif", ".iptc", ".names",
    ".data", ".cache", ".md5", ".sha1", ".sha256", ".sha512",
    # World files and projections of maps.
    ".tfw", ".tifw", ".jgw", ".jpgw", ".pgw", ".pngw", ".bpw", ".wld", ".prj", ".ovr",
))  # fmt: skip
# What ``text_of`` writes for a byte that is not text.
_WRITTEN_BYTE: Final = re.compile(rb"\\(?=x[0-9a-f]{2})")


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
        self._skip_id = _id_of(skip)
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
            elif self._is_to_walk(link, key):
                yield from self._folder(link, f"{key}/")

    def _folder(self, folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
        """Folders may lie deeper in each other than calls can."""
        listed = [self._listed(folder, prefix)]
        while listed:
            found = next(listed[-1], None)
            if found is None:
                listed.pop()
                continue
            entry, key = found
            if entry.is_dir(follow_symlinks=False):
                if self._is_to_walk(Path(entry.path), key):
                    listed.append(self._listed(Path(entry.path), f"{key}/"))
            elif entry.is_symlink():
                yield from self._link(entry, key)
            elif entry.is_file(follow_symlinks=False):
                yield from self._file(entry, key)
            else:
                self._no_file(entry, key)

    def _listed(self, folder: Path, prefix: str) -> Iterator[tuple[os.DirEntry[str], str]]:
        for entry in self._entries(folder, prefix):
            yield entry, prefix + text_of(entry.name)

    def _entries(self, folder: Path, prefix: str) -> list[os.DirEntry[str]]:
        try:
            if (found := _id_of(folder)) is not None:
                self._walked[found] = prefix.rstrip("/")
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

    def _is_to_walk(self, folder: Path, key: str) -> bool:
        # Resolving a path looks at each folder above it again.
        if self._skip_id is not None and _id_of(folder) == self._skip_id:
            return False
        if is_output(folder):
            self._pass_over(key, "earlier_output", "is the output of an earlier run")
        elif not self._recursive:
            self._findings.subfolders += 1
        elif (walked := self._walked_as(folder)) is not None:
            self._pass_over(key, "linked_folder", f"is the same folder as {walked or '.'!r}")
        else:
            return True
        return False

    def _walked_as(self, folder: Path) -> str | None:
        found = _id_of(folder)
        return None if found is None else self._walked.get(found)

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


def _id_of(folder: Path) -> tuple[int, int] | None:
    """What two paths to one folder share; None where no folder can be seen."""
    try:
        stats = os.stat(folder)
    except OSError:
        return None
    return stats.st_dev, stats.st_ino


def broken_link(path: Path) -> str | None:
    """A sentence about a link that leads to no file; None for everything else."""
    if not os.path.islink(path) or os.path.exists(path):
        return None
    return f"The link leads to {_target(path)}, where no file is; mend it and use --retry-failed."


def text_of(name: str) -> str:
    """``name`` with bytes that are not text written out, so that it can be stored and shown.

    No two names are written alike: where one has such writing itself, its backslash is written out.
    """
    return _WRITTEN_BYTE.sub(rb"\\x5c", os.fsencode(name)).decode("utf-8", "backslashreplace")


def _target(link: str | Path) -> str:
    try:
        return repr(text_of(os.readlink(link)))
    except OSError:
        return "somewhere"


def _is_sidecar(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SIDECARS

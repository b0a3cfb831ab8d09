"""Files that are whole or absent, and a folder that one run at a time writes into."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from florence2.errors import FlorenceError, ImageError

LOCK_NAME: Final = ".lock"
EDITED_DIR: Final = "edited"
_PART_NAME: Final = ".part"
_BLOCK_BYTES: Final = 1 << 20
_SYNC_THREADS: Final = 8
# Network file systems that keep no folder in memory say so by one of these.
_NO_FOLDER_SYNC: Final = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


class OutputError(FlorenceError):
    """The output folder cannot be used for this run."""

    code = "bad_output"


class FolderInUseError(OutputError):
    """Another run writes into it."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells cheaply that a file may have changed."""

    size_bytes: int
    mtime_ns: int


def stamp_of(path: Path) -> Stamp:
    """Raises OSError for a file that is not there."""
    stats = path.stat()
    return Stamp(stats.st_size, stats.st_mtime_ns)


def hash_of(path: Path) -> str:
    """32 hex digits that are equal for equal content."""
    digest = _new_hash()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def hash_of_text(text: str) -> str:
    """``hash_of`` a file with this text."""
    digest = _new_hash()
    digest.update(text.encode("utf-8"))
    return digest.hexdigest()


def _new_hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


class Workspace:
    """The output folder. Files appear in it by renaming, so a killed run leaves none half written.

    A machine that loses its power may still lose what was renamed, or leave it empty: ``sync``
    brings all that was written since the last one to the disk.

    The part file lies in the root, outside the project: there the SDK takes folders for datasets.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._part = root / _PART_NAME
        self._unsynced: list[Path] = []

    def write_text(self, path: Path, text: str) -> None:
        with self.writing(path) as file:
            file.write(text)

    @contextmanager
    def writing(self, path: Path) -> Iterator[TextIO]:
        """A file that takes the place of ``path`` once it is whole."""
        with self._part.open("w", encoding="utf-8", newline="") as file:
            yield file
        self._part.replace(path)
        self._unsynced.append(path)

    def bring(self, source: Path, path: Path, *, link: bool) -> str:
        """Copies ``source`` to ``path``, or links it where the file system can; its ``hash_of``.

        Raises ImageError when it is the source that cannot be read any more.
        """
        self._part.unlink(missing_ok=True)
        try:
            is_linked = link and self._linked(source)
            found = hash_of(source) if is_linked else self._copy(source)
        except OSError as error:
            if _is_readable(source):
                raise
            raise ImageError(
                f"The image was read and then could not be copied ({error.strerror}); "
                "put it back and use --retry-failed."
            ) from error
        self._part.replace(path)
        # Renaming one name of a file onto another name of the same file leaves both in place.
        self._part.unlink(missing_ok=True)
        self._unsynced.append(path)
        return found

    def set_aside(self, path: Path) -> Path:
        """Moves a file that somebody edited to where no run writes; where it is now."""
        folder = self.root / EDITED_DIR
        folder.mkdir(exist_ok=True)
        number = 0
        while (target := folder / f"{path.stem}.{number}.json").exists():
            number += 1
        path.rename(target)
        return target

    def sync(self) -> None:
        """Returns once everything written so far, names included, is on the disk.

        The files are synced side by side, which a disk does for all of them at once.
        """
        written = dict.fromkeys(path for path in self._unsynced if path.is_file())
        above = (folder for path in self._unsynced for folder in path.parents)
        folders = dict.fromkeys(one for one in above if one.is_relative_to(self.root))
        with ThreadPoolExecutor(_SYNC_THREADS, thread_name_prefix="sync") as pool:
            list(pool.map(_sync_file, written))
            list(pool.map(sync_folder, folders))
        self._unsynced.clear()

    def _copy(self, source: Path) -> str:
        digest = _new_hash()
        with source.open("rb") as read, self._part.open("wb") as part:
            while block := read.read(_BLOCK_BYTES):
                digest.update(block)
                part.write(block)
        return digest.hexdigest()

    def _linked(self, source: Path) -> bool:
        try:
            os.link(source.resolve(), self._part)
        except OSError:
            return False
        return True


def _sync_file(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Brings the names in a folder to the disk, where the system has a way to."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(folder)


def _is_readable(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError:
        return False
    return True


@contextmanager
def opened_workspace(root: Path) -> Iterator[Workspace]:
    """``root``, created where needed and locked against a second run.

    Raises OutputError when it cannot be written or another run holds it.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(
            f"The output folder must be writable and {str(root)!r} is not "
            f"({error.strerror}); choose another --out."
        ) from error
    try:
        if not _locked(lock):
            raise FolderInUseError(
                f"One run at a time writes into a folder and {str(root)!r} is in use by another; "
                "wait for it, or choose another --out."
            )
        yield Workspace(root)
    finally:
        os.close(lock)


def _locked(descriptor: int) -> bool:
    """Locks the open file for this process; the system lets go when the process ends."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

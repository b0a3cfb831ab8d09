"""Files that are whole or absent, and a folder that one run at a time writes into."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from florence2.errors import FlorenceError, ImageError

LOCK_NAME: Final = ".lock"
_PART_NAME: Final = ".part"


class OutputError(FlorenceError):
    """The output folder cannot be used for this run."""

    code = "bad_output"


class Workspace:
    """The output folder. Files appear in it by renaming, so a killed run leaves none half written.

    The part file lies in the root, outside the project: there the SDK takes folders for datasets.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._part = root / _PART_NAME

    def write_text(self, path: Path, text: str, *, durable: bool = False) -> None:
        with self._part.open("w", encoding="utf-8") as part:
            part.write(text)
            if durable:
                part.flush()
                os.fsync(part.fileno())
        self._part.replace(path)

    def bring(self, source: Path, path: Path, *, link: bool) -> None:
        """Copies ``source`` to ``path``, or links it where the file system can.

        Raises ImageError when it is the source that cannot be read any more.
        """
        self._part.unlink(missing_ok=True)
        if not (link and self._linked(source)):
            self._copy(source)
        self._part.replace(path)
        # Renaming one name of a file onto another name of the same file leaves both in place.
        self._part.unlink(missing_ok=True)

    def _copy(self, source: Path) -> None:
        try:
            shutil.copyfile(source, self._part)
        except OSError as error:
            if _is_readable(source):
                raise
            raise ImageError(
                f"The image was read and then could not be copied ({error.strerror}); "
                "put it back and use --retry-failed."
            ) from error

    def _linked(self, source: Path) -> bool:
        try:
            os.link(source.resolve(), self._part)
        except OSError:
            return False
        return True


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
            raise OutputError(
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

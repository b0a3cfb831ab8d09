"""The images of a folder: finding, naming and reading them, a few ahead of their use."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from florence2.budget import Budget, Hold, NoRoomError
from florence2.errors import ImageError
from florence2.images import LoadedImage, check_header, open_image
from serve.labeling.journal import JOURNAL_NAME

# What the SDK reads back from a project; other formats would vanish from it without a word.
EXTENSIONS: Final = (
    ".jpg", ".jpeg", ".jfif", ".mpo", ".bmp", ".png", ".webp", ".tif", ".tiff",
)  # fmt: skip
_OTHER_IMAGES: Final = (".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".dng", ".cr2", ".nef")
_JOIN: Final = "__"
_MAX_NAME_BYTES: Final = 200
# 64 megapixels are 192 MB as RGB.
MAX_PIXELS_IN_FLIGHT: Final = 64_000_000


@dataclass(frozen=True, slots=True)
class ImageFile:
    """``key`` is the path below the images folder; ``name`` is unique in the project."""

    path: Path
    key: str
    name: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A file with its pixels, or with the reason why it has none."""

    file: ImageFile
    picture: LoadedImage | None
    problem: ImageError | None = None

    @property
    def pixels(self) -> int:
        return math.prod(self.picture.size_wh) if self.picture is not None else 0

    def close(self) -> None:
        """Gives the pixels up, so that others have room."""
        if self.picture is not None:
            self.picture.close()


def find_images(source: Path, *, recursive: bool, skip: Path) -> Iterator[ImageFile]:
    """The images under ``source`` in a stable order, without ``skip`` and other runs' outputs."""
    if source.is_file():
        if is_image(source.name):
            yield ImageFile(source, _text(source.name), project_name(source.name, recursive=False))
        return
    for key, path in _walk(source, "", recursive=recursive, skip=skip):
        if is_image(path.name):
            yield ImageFile(path, key, project_name(key, recursive=recursive))


def count_unsupported(source: Path, *, recursive: bool, skip: Path) -> int:
    """How many files look like images of formats that a project cannot hold."""
    if source.is_file():
        return int(source.name.lower().endswith(_OTHER_IMAGES))
    walked = _walk(source, "", recursive=recursive, skip=skip)
    return sum(path.name.lower().endswith(_OTHER_IMAGES) for _, path in walked)


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def project_name(key: str, *, recursive: bool) -> str:
    """The name in the project: the file's own, with its folders before it in a recursive run.

    ``a/b/1.jpg`` becomes ``a__b__1.jpg``. Where that could also be the name of another path, or is
    too long or not text, a digest of the path is added, so no two paths ever share a name.
    """
    parts = key.split("/")
    name = _JOIN.join(parts)
    is_ambiguous = recursive and any(
        _JOIN in part or (len(parts) > 1 and (part[0] == "_" or part[-1] == "_")) for part in parts
    )
    if not is_ambiguous and len(name.encode("utf-8", "replace")) <= _MAX_NAME_BYTES:
        return name
    stem, extension = os.path.splitext(name)
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    short = stem.encode()[: _MAX_NAME_BYTES - 40].decode("utf-8", "ignore")
    return f"{short}-{digest}{extension}"


def unreadable_folders(source: Path, *, recursive: bool, skip: Path) -> list[tuple[str, str]]:
    """The folders below ``source`` whose images cannot be found, each with the reason."""
    failed: list[tuple[str, str]] = []
    if not source.is_file():
        for _ in _walk(source, "", recursive=recursive, skip=skip, failed=failed):
            pass
    return failed


def _walk(
    folder: Path,
    prefix: str,
    *,
    recursive: bool,
    skip: Path,
    failed: list[tuple[str, str]] | None = None,
) -> Iterator[tuple[str, Path]]:
    try:
        with os.scandir(folder) as listed:
            entries = sorted(
                (entry for entry in listed if not entry.name.startswith(".")),
                key=lambda entry: entry.name,
            )
    except OSError as error:
        if not prefix:
            raise
        if failed is not None:
            failed.append((prefix.rstrip("/"), error.strerror or str(error)))
        return
    for entry in entries:
        key = prefix + _text(entry.name)
        if os.path.isfile(entry.path):
            yield key, Path(entry.path)
        elif recursive and entry.is_dir(follow_symlinks=False):
            below = Path(entry.path)
            if below.resolve() != skip and not os.path.exists(below / JOURNAL_NAME):
                yield from _walk(below, f"{key}/", recursive=True, skip=skip, failed=failed)


def _text(name: str) -> str:
    """``name`` with bytes that are not text written out, so that it can be stored and shown."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_ahead(
    files: Iterable[ImageFile], *, threads: int, ahead: int, budget: Budget
) -> Generator[Loaded | None]:
    """The files in order with their pixels, and None where those taken before must be closed.

    Of those not yet taken, at most ``ahead`` and about 64 megapixels are in memory at once, or a
    single larger one. All that are not closed share ``budget``: None says that the next one has no
    room in it beside those that were taken.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        waiting: deque[tuple[Future[Loaded], Hold]] = deque()
        try:
            for file in files:
                size = _pixels_in_header(file.path)
                while waiting and (len(waiting) >= ahead or _in_flight(waiting, size)):
                    yield waiting.popleft()[0].result()
                while (hold := _room_now(budget, size)) is None and waiting:
                    yield waiting.popleft()[0].result()
                if hold is None:
                    yield None
                    hold = budget.hold(size)
                waiting.append((pool.submit(_load, file, hold), hold))
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            for pending, hold in waiting:
                pending.cancel()
                hold.release()


def _in_flight(waiting: Iterable[tuple[Future[Loaded], Hold]], size: int) -> bool:
    return sum(hold.amount for _, hold in waiting) + size > MAX_PIXELS_IN_FLIGHT


def _room_now(budget: Budget, size: int) -> Hold | None:
    try:
        return budget.hold(size, wait_s=0)
    except NoRoomError:
        return None


def _pixels_in_header(path: Path) -> int:
    """What a file will take once decoded; 0 for one that cannot be opened and so takes nothing."""
    try:
        with warnings.catch_warnings(action="ignore"), path.open("rb") as file:
            return math.prod(check_header(file))
    # The reader says later what is wrong with the file.
    except (OSError, ImageError):
        return 0


def _load(file: ImageFile, hold: Hold) -> Loaded:
    def room(pixels: int) -> Hold:
        hold.resize(pixels)
        return hold

    try:
        return Loaded(file, open_image(file.path, room=room))
    except ImageError as problem:
        return Loaded(file, None, problem)

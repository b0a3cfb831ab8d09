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

from florence2.budget import Budget, Hold
from florence2.errors import ImageError, NoRoomError
from florence2.images import LoadedImage, check_header, file_format, has_more_frames, open_image
from serve.labeling.files import Stamp, stamp_of
from serve.labeling.finding import FORMATS, Findings, broken_link, is_image, text_of, walk_images

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
    """A file with its pixels, or with the reason why it has none.

    ``stamp`` is the file's before it was read. ``is_first_of_many`` says that there are further
    pages or frames.
    """

    file: ImageFile
    picture: LoadedImage | None
    problem: ImageError | None = None
    stamp: Stamp | None = None
    is_first_of_many: bool = False

    @property
    def pixels(self) -> int:
        return math.prod(self.picture.size_wh) if self.picture is not None else 0

    def close(self) -> None:
        """Gives the pixels up, so that others have room."""
        if self.picture is not None:
            self.picture.close()


def find_images(
    source: Path, *, recursive: bool, skip: Path, findings: Findings | None = None
) -> Iterator[ImageFile]:
    """The images under ``source`` in a stable order, without ``skip`` and other runs' outputs.

    ``findings`` is told what else is there.
    """
    if source.is_file():
        if is_image(source.name):
            yield ImageFile(
                source, text_of(source.name), project_name(source.name, recursive=False)
            )
        return
    for key, path in walk_images(source, recursive=recursive, skip=skip, findings=findings):
        yield ImageFile(path, key, project_name(key, recursive=recursive))


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
        stamp = stamp_of(file.path)
        _check_kind(file.path)
        picture = open_image(file.path, room=room)
        return Loaded(file, picture, None, stamp, has_more_frames(file.path))
    except ImageError as problem:
        hold.release()
        return Loaded(file, None, problem)
    except OSError as error:
        hold.release()
        reason = broken_link(file.path) or f"The image cannot be read: {error.strerror or error}."
        return Loaded(file, None, ImageError(reason))


class UnsupportedKindError(ImageError):
    """A file that can be opened, and that no project can hold."""

    code = "unsupported_kind"


def _check_kind(path: Path) -> None:
    """Raises UnsupportedKindError; what is wrong with a file that is no image is not said here."""
    found = file_format(path)
    if found is not None and found not in FORMATS:
        raise UnsupportedKindError(
            f"A project holds JPEG, PNG, BMP, WebP and TIFF images, and this file is {found} "
            "whatever its name says; convert it and use --retry-failed."
        )

"""The images of a folder: finding, naming and reading them, a few ahead of their use."""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, TypeVar

from florence2.budget import Budget, Hold
from florence2.errors import ImageError, NoRoomError
from florence2.images import LoadedImage, check_header, file_format, has_more_frames, open_image
from serve.labeling.files import Stamp, stamp_of
from serve.labeling.journal import is_output, output_around

# What the SDK reads back from a project; other formats would vanish from it without a word.
EXTENSIONS: Final = (
    ".jpg", ".jpeg", ".jfif", ".mpo", ".bmp", ".png", ".webp", ".tif", ".tiff",
)  # fmt: skip
# Pillow's names of what may lie in such files: the SDK reads no other one, whatever its name.
FORMATS: Final = frozenset(("JPEG", "MPO", "BMP", "PNG", "WEBP", "TIFF"))
_WITH_FRAMES: Final = frozenset(("PNG", "WEBP", "TIFF"))
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
_BYTE_IN_TEXT: Final = re.compile(rb"\\x([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that was not labeled; ``path`` is the one below the images folder."""

    path: str
    code: str
    message: str


@dataclass(slots=True)
class Findings:
    """What a walk came by beside images.

    ``files`` were not labeled and perhaps should have been; ``suffixes`` counts those that no
    project can hold. ``unreadable`` folders could not be looked into, those ``passed_over`` did
    not have to be, and ``subfolders`` counts those of a walk that is not recursive.
    """

    files: list[LeftOut] = field(default_factory=list)
    suffixes: Counter[str] = field(default_factory=Counter)
    unreadable: list[LeftOut] = field(default_factory=list)
    passed_over: list[LeftOut] = field(default_factory=list)
    subfolders: int = 0
    repeated: int = 0

    @property
    def undone(self) -> list[LeftOut]:
        """Everything that somebody has to look at."""
        return [*self.files, *self.unreadable]

    def file(self, path: str, code: str, message: str) -> None:
        self.files.append(LeftOut(path, code, message))

    def unsupported(self, path: str, suffix: str) -> None:
        self.suffixes[suffix or "no suffix"] += 1
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
        self._walked: dict[tuple[int, int] | None, str] = {}
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
        listed = [iter(self._entries(folder, prefix))]
        while listed:
            found = next(listed[-1], None)
            if found is None:
                listed.pop()
                continue
            entry, key = found
            if entry.is_dir(follow_symlinks=False):
                if self._is_to_walk(Path(entry.path), key):
                    listed.append(iter(self._entries(Path(entry.path), f"{key}/")))
            elif entry.is_symlink():
                yield from self._link(entry, key)
            elif entry.is_file(follow_symlinks=False):
                yield from self._file(entry, key)
            else:
                self._no_file(entry, key)

    def _entries(self, folder: Path, prefix: str) -> list[tuple[os.DirEntry[str], str]]:
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
        return [(one, prefix + text_of(one.name)) for one in sorted(seen, key=lambda one: one.name)]

    def _is_to_walk(self, folder: Path, key: str) -> bool:
        # Resolving a path looks at each folder above it again.
        if self._skip_id is not None and _id_of(folder) == self._skip_id:
            return False
        if is_output(folder):
            self._pass_over(key, "earlier_output", "is the output of an earlier run")
        elif not self._recursive:
            self._findings.subfolders += 1
        elif (walked := self._walked.get(_id_of(folder))) is not None:
            self._pass_over(key, "linked_folder", f"is the same folder as {walked or '.'!r}")
        else:
            return True
        return False

    def _link(self, entry: os.DirEntry[str], key: str) -> Iterator[tuple[str, Path]]:
        try:
            mode = os.stat(entry.path).st_mode
        except OSError:
            if is_image(entry.name):
                yield key, Path(entry.path)
            elif not is_sidecar(entry.name):
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
        elif not is_sidecar(entry.name):
            self._findings.unsupported(key, os.path.splitext(entry.name)[1].lower())

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


def bytes_of(text: str) -> bytes:
    """The bytes of the name that ``text_of`` wrote so."""
    return _BYTE_IN_TEXT.sub(lambda found: bytes.fromhex(found[1].decode()), text.encode("utf-8"))


def _target(link: str | Path) -> str:
    try:
        return repr(text_of(os.readlink(link)))
    except OSError:
        return "somewhere"


def is_sidecar(name: str) -> bool:
    """Whether a file belongs beside images: nobody asks why it was not labeled."""
    return os.path.splitext(name)[1].lower() in SIDECARS


_JOIN: Final = "__"
_MAX_NAME_BYTES: Final = 200
# 64 megapixels are 192 MB as RGB.
MAX_PIXELS_IN_FLIGHT: Final = 64_000_000
# Batches that are being written give their room up; a slow disk may take its time.
_WAIT_FOR_ROOM_S: Final = 600.0


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
        # Folders of a store may have no name.
        _JOIN in part or (len(parts) > 1 and (not part or part[0] == "_" or part[-1] == "_"))
        for part in parts
    )
    if not is_ambiguous and len(name.encode("utf-8", "replace")) <= _MAX_NAME_BYTES:
        return name
    stem, extension = os.path.splitext(name)
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    short = stem.encode()[: _MAX_NAME_BYTES - 40].decode("utf-8", "ignore")
    return f"{short}-{digest}{extension}"


class Held(Protocol):
    """What was made of a file, and how much memory it takes."""

    @property
    def held_pixels(self) -> int: ...


Item = TypeVar("Item", bound=Held)


def read_ahead(
    files: Iterable[ImageFile],
    make_ready: Callable[[Loaded], Item],
    *,
    threads: int,
    ahead: int,
    budget: Budget,
) -> Generator[Item | None]:
    """What ``make_ready`` makes of each opened file, in order, on the thread that read it.

    Of those not yet taken, at most ``ahead`` and about 64 megapixels are in memory at once, or a
    single larger one. All that are not closed share ``budget``: None says that the next one has no
    room in it beside those that were taken, and that these must be used.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        waiting: deque[tuple[Future[Item], Hold]] = deque()
        try:
            for file in files:
                size = _pixels_in_header(file.path)
                while waiting and (len(waiting) >= ahead or _in_flight(waiting, size)):
                    yield waiting.popleft()[0].result()
                while (hold := _room_now(budget, size)) is None and waiting:
                    yield waiting.popleft()[0].result()
                if hold is None:
                    yield None
                    hold = budget.hold(size, wait_s=_WAIT_FOR_ROOM_S)
                waiting.append((pool.submit(_ready, file, make_ready, hold), hold))
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            for pending, hold in waiting:
                pending.cancel()
                hold.release()


def _ready(file: ImageFile, make_ready: Callable[[Loaded], Item], hold: Hold) -> Item:
    item = make_ready(_load(file, hold))
    if hold.amount:
        hold.resize(item.held_pixels)
    return item


def _in_flight(waiting: Iterable[tuple[Future[Item], Hold]], size: int) -> bool:
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
        kind = _checked_kind(file.path)
        picture = open_image(file.path, room=room)
        has_more = kind in _WITH_FRAMES and has_more_frames(file.path)
        return Loaded(file, picture, None, stamp, has_more)
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


def _checked_kind(path: Path) -> str | None:
    """Raises UnsupportedKindError; what is wrong with a file that is no image is not said here."""
    found = file_format(path)
    if found is not None and found not in FORMATS:
        raise UnsupportedKindError(
            f"A project holds JPEG, PNG, BMP, WebP and TIFF images, and this file is {found} "
            "whatever its name says; convert it and use --retry-failed."
        )
    return found

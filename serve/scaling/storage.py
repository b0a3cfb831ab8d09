"""Files wherever an address leads: a folder that all machines share, or object storage.

Whatever fsspec reads; who may is said by the variables of a store's own client, such as
``AWS_ACCESS_KEY_ID`` and ``AWS_ENDPOINT_URL``, on every machine.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import fsspec
from fsspec.core import url_to_fs

from florence2.errors import FlorenceError, RequestError
from serve.labeling.files import sync_folder
from serve.labeling.images import text_of

_PART: Final = ".part-"
_PART_NAME: Final = re.compile(rf"{re.escape(_PART)}[0-9a-f]{{12}}$")
_PAGE: Final = 1000
_READERS: Final = 64
_PASSWORD: Final = re.compile(r"://[^/]*:[^/]*@")
# In these fsspec sees a pattern, also where it deletes.
_PATTERN: Final = re.compile(r"[*?\[\]]")


PLATFORM: Final = "supervisely"
fsspec.register_implementation(PLATFORM, "serve.scaling.platform_source.PlatformFiles")


class StorageError(FlorenceError):
    """A store that cannot be reached, or does not let us in."""

    code = "storage"


def is_remote(address: str) -> bool:
    """Whether an address names its store: ``s3://…``, and not a path of this machine."""
    return "://" in address


class Storage:
    """A folder of a store; names are below it, with slashes. It can be sent to another process."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/") if is_remote(address) else str(Path(address).resolve())
        self._fs, self._root = opened(self.address)

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.address,)

    @property
    def local(self) -> Path | None:
        """The folder where it is one of this machine."""
        return Path(self._root) if _is_local(self._fs) else None

    def read(self, name: str) -> bytes | None:
        """None where there is nothing."""
        with told(self.address):
            try:
                found: bytes = self._fs.cat_file(self._path(name))
            except FileNotFoundError:
                return None
            return found

    def read_many(self, names: Iterable[str]) -> Iterator[bytes]:
        """In order, many at once; all of them are there."""
        # Of several paths fsspec makes patterns, and a folder may be called by one.
        with ThreadPoolExecutor(_READERS, thread_name_prefix="note") as pool:
            for group in _groups(names, _PAGE):
                with told(self.address):
                    found = list(pool.map(self._fs.cat_file, map(self._path, group)))
                yield from found

    def write(self, name: str, content: bytes) -> None:
        """In place of what is there: whole or not at all."""
        path = self._path(name)
        with told(self.address):
            if not _is_local(self._fs):
                self._fs.pipe_file(path, content)
                return
            os.replace(_part_beside(path, content), path)

    def create(self, name: str, content: bytes) -> bool:
        """Whole or not at all, and only where nothing is; False where something is already.

        Of several who create one name at the same time, a store that knows conditional writes (S3,
        Google's, a file system) lets one succeed. Elsewhere the last one's content stays, so who
        depends on it reads it back.
        """
        path = self._path(name)
        with told(self.address):
            if _is_local(self._fs):
                part = _part_beside(path, content)
                try:
                    os.link(part, path)
                except FileExistsError:
                    return False
                finally:
                    os.unlink(part)
                sync_folder(Path(path).parent)
                return True
            try:
                self._fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if _is_refused_condition(error):
                    return False
                raise
            return True

    def names(self, folder: str, depth: int = 1) -> list[str]:
        """What lies in a folder, sorted; with a depth of 2 also what lies in its folders."""
        with told(self.address):
            try:
                found = self._fs.find(self._path(folder), maxdepth=depth, withdirs=True)
            except FileNotFoundError:
                return []
        top = self._path(folder)
        below = (path.removeprefix(top).strip("/") for path in found)
        return sorted(name for name in below if name and not _PART_NAME.search(name))

    def is_empty(self, but: Collection[str] = ()) -> bool:
        """Whether there is nothing, ``but`` these names and those that begin with a dot."""
        with told(self.address):
            try:
                listed = self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                return True
        names = (str(path).rstrip("/").rsplit("/", 1)[-1] for path in listed)
        return all(name.startswith(".") or name in but for name in names)

    def upload(self, folder: Path, name: str) -> None:
        """All files below a folder of this machine, under ``name``; on a disk when it returns.

        Names in the folder itself that begin with a dot are left out.
        """
        found = (path for path in folder.rglob("*") if path.is_file())
        files = sorted(path for path in found if path.parent != folder or path.name[:1] != ".")
        targets = [f"{self._path(name)}/{path.relative_to(folder).as_posix()}" for path in files]
        with told(self.address):
            if not _is_local(self._fs):
                self._fs.put([str(path) for path in files], targets)
                return
            for source, target in zip(files, targets, strict=True):
                os.makedirs(os.path.dirname(target), exist_ok=True)
                shutil.copyfile(source, target)
                with open(target, "r+b") as file:
                    os.fsync(file.fileno())
            for parent in {parent for target in targets for parent in Path(target).parents}:
                if parent.is_relative_to(self._root):
                    sync_folder(parent)

    def download(self, name: str, folder: Path) -> None:
        """All files below ``name``, into a folder of this machine."""
        files = [path for path in self._files(name) if not _PART_NAME.search(path)]
        top = self._path(name)
        targets = [folder / path.removeprefix(top).strip("/") for path in files]
        for parent in {target.parent for target in targets}:
            parent.mkdir(parents=True, exist_ok=True)
        with told(self.address), ThreadPoolExecutor(_READERS, thread_name_prefix="file") as pool:
            list(pool.map(self._fs.get_file, files, map(str, targets)))

    def _files(self, name: str) -> list[str]:
        with told(self.address):
            return [str(path) for path in self._fs.find(self._path(name))]

    def delete(self, name: str) -> None:
        """A file, or a folder with all in it; nothing where there is nothing."""
        with told(self.address), suppress(FileNotFoundError):
            self._fs.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root


def opened(address: str) -> tuple[Any, str]:
    """The file system of an address and the path in it; RequestError where there is no such one."""
    if _PASSWORD.search(address):
        raise RequestError(
            f"Addresses are noted and shown, and {_PASSWORD.sub('://...@', address)!r} has a "
            "password in it; leave it out, and set the variables of the store's own client."
        )
    try:
        # What others write is to be seen at once.
        fs, path = url_to_fs(address, use_listings_cache=False)
    except ImportError as error:
        raise RequestError(
            f"{address!r} is read with a library that is not installed ({error}); install it on "
            "every machine."
        ) from error
    except ValueError as error:
        schemes = ", ".join(("file", "s3", "gs"))
        raise RequestError(
            f"An address begins with the name of its store ({schemes}, …) and {address!r} begins "
            f"with none that is known ({error}); correct it."
        ) from error
    return fs, str(path).rstrip("/")


def check_target(address: str) -> None:
    """RequestError for a folder of a store that could not be deleted from without harm, and for a
    project of the platform, which takes no files."""
    if address.startswith(f"{PLATFORM}://"):
        raise RequestError(
            f"Labels go into a folder of a disk or a store, and {address!r} is a project; choose "
            "another --out, and name the project they are to go to with --upload-to."
        )
    if is_remote(address) and _PATTERN.search(address):
        raise RequestError(
            f"Labels go into a folder of a store whose address has none of * ? [ ] and got "
            f"{address!r}; choose another --out."
        )


def _is_local(fs: Any) -> bool:  # noqa: ANN401 - whatever fsspec knows
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _part_beside(path: str, content: bytes) -> str:
    """The content on the disk, under a name that nobody reads."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f"{path}{_PART}{secrets.token_hex(6)}"
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return part


def _is_refused_condition(error: BaseException | None) -> bool:
    """What S3 says where the name is taken (412), or is being taken by another (409)."""
    while error is not None:
        code = getattr(error, "response", {}).get("Error", {}).get("Code")
        if code in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
            return True
        error = error.__cause__
    return False


# Mistakes of a program, which no store makes.
_OURS: Final = (TypeError, AttributeError, LookupError, NotImplementedError)


class told:  # noqa: N801 - reads as a sentence where it is used
    """What a store fails with becomes a StorageError, but for a file that is not there."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, place: object) -> None:
        if error is None or isinstance(error, FlorenceError | FileNotFoundError | FileExistsError):
            return
        if not isinstance(error, Exception) or isinstance(error, _OURS):
            return
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise StorageError(
            f"{self._address!r} cannot be used ({type(error).__name__}: {reason[:300]}); look at "
            "the address, the network and who may read and write there."
        ) from error


def read_address(address: str) -> bytes:
    """The content of one file. Raises FileNotFoundError and StorageError."""
    fs, path = opened(address)
    with told(address):
        content: bytes = fs.cat_file(path)
    return content


def listed(
    storage: Storage, *, recursive: bool, skip: str | None, after: str | None
) -> Iterator[tuple[str, str]]:
    """Key and address of every file below a folder of a store, in the order of its keys.

    ``skip`` is an address whose files are not listed. With ``after`` only what comes behind that
    key. S3 is listed page by page, so that nobody holds a whole bucket; of others one folder is in
    memory at a time.
    """
    fs, root = opened(storage.address)
    scheme = storage.address.split("://", 1)[0]
    passed = None
    if skip is not None and is_remote(skip) and skip.split("://", 1)[0] == scheme:
        passed = opened(skip)[1] + "/"
    walk = _s3_paths if hasattr(fs, "call_s3") else _paths
    with told(storage.address):
        for path in walk(fs, root, recursive, None if after is None else f"{root}/{after}"):
            if passed is not None and path.startswith(passed):
                continue
            key = text_of(path.removeprefix(root).lstrip("/") or path.rsplit("/", 1)[-1])
            if not any(part.startswith(".") for part in key.split("/")):
                # Some stores have no host in their paths.
                yield key, storage.address + path.removeprefix(root)


def _s3_paths(fs: Any, root: str, recursive: bool, after: str | None) -> Iterator[str]:  # noqa: ANN401
    bucket, _, prefix = root.partition("/")
    asked: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
    if not recursive:
        asked["Delimiter"] = "/"
    if after is not None:
        asked["StartAfter"] = after.partition("/")[2]
    while True:
        page = fs.call_s3("list_objects_v2", **asked)
        for found in page.get("Contents", ()):
            if not found["Key"].endswith("/"):
                yield f"{bucket}/{found['Key']}"
        if not page.get("IsTruncated"):
            return
        asked["ContinuationToken"] = page["NextContinuationToken"]


def _paths(fs: Any, root: str, recursive: bool, after: str | None) -> Iterator[str]:  # noqa: ANN401
    """Sorted as strings sort, folders with a slash behind them: as S3 sorts its keys."""
    entries = fs.ls(root, detail=True)
    folders = {one["name"].rstrip("/") + "/" for one in entries if one["type"] == "directory"}
    files = {one["name"] for one in entries if one["type"] == "file"}
    for path in sorted(files | folders):
        if path in folders:
            is_behind = after is None or path > after or after.startswith(path)
            if recursive and is_behind and path.rstrip("/") != root:
                yield from _paths(fs, path.rstrip("/"), recursive, after)
        elif after is None or path > after:
            yield path


def _groups(names: Iterable[str], size: int) -> Iterator[list[str]]:
    group: list[str] = []
    for name in names:
        group.append(name)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group

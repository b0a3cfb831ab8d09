"""Which images are in which shard: noted beside the labels before any of them is looked at.

A plan is written part by part while the source is listed, and the first shards are labeled
meanwhile. A part is created once and never changes, so whoever goes on with a plan, after a kill or
beside another, has the same shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from florence2.errors import RequestError
from serve.labeling.files import OutputError
from serve.labeling.images import (
    EXTENSIONS,
    Findings,
    LeftOut,
    find_images,
    is_image,
    is_sidecar,
    project_name,
)
from serve.labeling.run import check_images
from serve.scaling.platform_source import check_project, is_project, project_images
from serve.scaling.storage import Storage, is_remote, listed, opened, told

COLUMN: Final = "image"
_TABLES: Final = (".parquet", ".csv")
_SHARDS_IN_PART: Final = 20
PLAN: Final = "plan"
_COMPLETE: Final = f"{PLAN}/complete.json"
_ROWS: Final = 10_000

_Lines = list[dict[str, Any]]
"""Of a part, a shard each."""


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """``key`` is what reports call it, ``name`` what a project does."""

    key: str
    address: str
    name: str


@dataclass(frozen=True, slots=True)
class Shard:
    """Images that are committed together; ``is_again``: all of them failed in earlier shards."""

    number: int
    images: tuple[PlannedImage, ...]
    is_again: bool = False

    @property
    def title(self) -> str:
        return f"{self.number:06}"


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source held beside its images, known once all of it was listed."""

    num_shards: int = 0
    num_images: int = 0
    num_repeated: int = 0
    subfolders: int = 0
    passed_over: Mapping[str, str] = field(default_factory=dict)
    unreadable: Sequence[Sequence[str]] = ()
    left_out: Sequence[Sequence[str]] = ()


class Source:
    """Images by their addresses: a folder of a disk or a store, a table with a column ``image``, or
    a project of the platform.

    ``skip`` is the address of the labels, which may lie in the folder.
    """

    def __init__(self, address: str, *, recursive: bool, skip: str) -> None:
        self.address = address
        self.is_project = is_project(address)
        self.is_table = not self.is_project and address.lower().endswith(_TABLES)
        self._recursive = recursive
        self._skip = skip

    def check(self) -> None:
        """RequestError for a source that is not there, or that holds nothing to label."""
        if self.is_project:
            check_project(self.address)
            return
        if not self.is_table and not is_remote(self.address):
            check_images(Path(self.address), Path(self._skip), recursive=self._recursive)
            return
        try:
            # Whether a table names one again is known only once all of it was read.
            found = _addresses(self.address) if self.is_table else self.images(Findings())
            first = next(iter(found), None)
        except FileNotFoundError as error:
            raise RequestError(
                f"Images are read from {self.address!r}, which is not there."
            ) from error
        if first is None:
            what = "A table to label names images" if self.is_table else "A folder holds images"
            hint = "" if self.is_table or self._recursive else "; add --recursive to look deeper"
            raise RequestError(
                f"{what} ({', '.join(EXTENSIONS)}) and none was found in {self.address!r}{hint}."
            )

    def images(self, findings: Findings, after: str | None = None) -> Iterator[PlannedImage]:
        """In an order that stays; ``findings`` is told what else is there.

        ``after`` is the key of the image behind which to begin. OutputError where it is gone.
        """
        if self.is_table:
            yield from _behind(self._rows(findings), after, self.address, findings)
        elif self.is_project:
            of_project = (PlannedImage(*one) for one in project_images(self.address, findings))
            yield from _behind(of_project, after, self.address, findings)
        elif is_remote(self.address):
            yield from self._stored(findings, after)
        else:
            found = find_images(
                Path(self.address),
                recursive=self._recursive,
                skip=Path(self._skip),
                findings=findings,
            )
            of_disk = (PlannedImage(one.key, str(one.path.absolute()), one.name) for one in found)
            yield from _behind(of_disk, after, self.address, findings)

    def _stored(self, findings: Findings, after: str | None) -> Iterator[PlannedImage]:
        storage = Storage(self.address)
        for key, address in listed(
            storage, recursive=self._recursive, skip=self._skip, after=after
        ):
            if _is_wanted(key, findings):
                yield PlannedImage(key, address, project_name(key, recursive=self._recursive))

    def _rows(self, findings: Findings) -> Iterator[PlannedImage]:
        """Each address once: eight bytes of each are in memory, and of no row more."""
        absolute = (_beside(self.address, one) for one in _addresses(self.address))
        digests = array("Q", map(_digest, absolute))
        values, counts = np.unique(np.frombuffer(digests, np.uint64), return_counts=True)
        repeated = {int(value) for value in values[counts > 1]}
        seen: set[str] = set()
        first_kind = None
        for key in _addresses(self.address):
            address = _beside(self.address, key)
            if _digest(address) in repeated:
                if address in seen:
                    findings.repeated += 1
                    continue
                seen.add(address)
            if _is_wanted(key, findings):
                kind, path = _kind_and_path(key)
                first_kind = kind if first_kind is None else first_kind
                name = project_name(path, recursive=True)
                # ``a/1.png`` is another image than ``/a/1.png`` or ``s3://a/1.png``.
                yield PlannedImage(
                    key, address, name if kind == first_kind else _with_digest(name, address)
                )


def _behind(
    images: Iterator[PlannedImage], after: str | None, address: str, findings: Findings
) -> Iterator[PlannedImage]:
    if after is not None and all(image.key != after for image in images):
        raise OutputError(
            f"{address!r} was listed as far as {after!r}, which is not there any more; put it back "
            "or choose another --out."
        )
    if after is not None:
        # They were noted when their part was.
        findings.files.clear()
    yield from images


def _is_wanted(key: str, findings: Findings) -> bool:
    if is_image(key):
        return True
    if not is_sidecar(key):
        findings.unsupported(key, Path(key).suffix.lower())
    return False


def _digest(address: str) -> int:
    return int.from_bytes(hashlib.blake2b(address.encode(), digest_size=8).digest())


def _beside(table: str, address: str) -> str:
    """A relative address is one beside the table."""
    if is_remote(address) or address.startswith("/"):
        return address
    if is_remote(table):
        return f"{table.rpartition('/')[0]}/{posixpath.normpath(address)}"
    return posixpath.normpath(f"{Path(table).resolve().parent}/{address}")


def _kind_and_path(address: str) -> tuple[str, str]:
    """Its store, ``/`` or nothing, and the path behind it."""
    if is_remote(address):
        store, _, path = address.partition("://")
        return store, path.lstrip("/")
    kind = "/" if address.startswith("/") else ""
    return kind, posixpath.normpath(address).lstrip("/")


def _with_digest(name: str, address: str) -> str:
    stem, extension = os.path.splitext(name)
    return f"{stem}-{_digest(address):016x}{extension}"


def _addresses(table: str) -> Iterator[str]:
    """The column ``image``, a few thousand rows in memory at a time. Raises RequestError."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    fs, path = opened(table)
    with told(table):
        try:
            with fs.open(path, "rb") as file:
                if table.lower().endswith(".csv"):
                    as_text = csv.ConvertOptions(column_types={COLUMN: pa.string()})
                    reader = csv.open_csv(file, convert_options=as_text)
                    _check_column(table, reader.schema)
                    batches = iter(reader)
                else:
                    rows = parquet.ParquetFile(file)
                    _check_column(table, rows.schema_arrow)
                    batches = rows.iter_batches(_ROWS, columns=[COLUMN])
                for batch in batches:
                    column = batch.column(batch.schema.get_field_index(COLUMN))
                    yield from (str(one) for one in column.to_pylist() if one)
        except FileNotFoundError as error:
            raise RequestError(
                f"Images are named by a table and {table!r} does not exist."
            ) from error
        except pa.ArrowException as error:
            raise RequestError(
                f"A table is Parquet, or CSV with a header, and {table!r} cannot be read as one "
                f"({str(error)[:200]}); correct it."
            ) from error


def _check_column(table: str, schema: Any) -> None:  # noqa: ANN401 - a pyarrow.Schema
    import pyarrow as pa

    names = schema.names
    if names.count(COLUMN) != 1:
        raise RequestError(
            f"A table of images has their addresses in a column {COLUMN!r} and {table!r} has "
            f"{', '.join(map(repr, names[:10]))}; rename one."
        )
    kind = schema.field(COLUMN).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise RequestError(
            f"The column {COLUMN!r} of a table has addresses as text and in {table!r} it is "
            f"{str(kind)[:100]}; write the images into files, and their addresses into the table."
        )


class Plan:
    """The shards of a source, beside the labels in ``target``."""

    def __init__(self, target: Storage, source: Source, shard_size: int) -> None:
        self._target = target
        self._source = source
        self._shard_size = shard_size

    def shards(self) -> Iterator[Shard]:
        """All of them, in order; what is not planned yet is, and noted before it is given."""
        number, last = 0, _Position()
        while True:
            while (lines := self._part(number)) is not None:
                number, last = number + 1, _Position.of(lines[-1])
                yield from map(_shard_of, lines)
            if self.listing() is not None:
                return
            for lines in self._planned(number, last):
                number, last = number + 1, _Position.of(lines[-1])
                yield from map(_shard_of, lines)

    def listing(self) -> Listing | None:
        """None as long as the source was not listed to its end."""
        stored = self._target.read(_COMPLETE)
        return None if stored is None else Listing(**json.loads(stored))

    def num_planned(self) -> int:
        """Images in the parts there are."""
        return self._end().planned

    def num_shards(self) -> int:
        """Shards in the parts there are."""
        return self._end().shard + 1

    def _end(self) -> _Position:
        names = self._names()
        lines = self._part(int(names[-1].removesuffix(".jsonl"))) if names else None
        return _Position.of(lines[-1]) if lines else _Position()

    def _names(self) -> list[str]:
        return [name for name in self._target.names(PLAN) if name.endswith(".jsonl")]

    def left_out(self) -> Iterator[LeftOut]:
        """Files that were listed and are no images that a project can hold."""
        number = 0
        while (lines := self._part(number)) is not None:
            for line in lines:
                yield from (LeftOut(*one) for one in line.get("left_out", ()))
            number += 1
        listing = self.listing() or Listing()
        yield from (LeftOut(*one) for one in (*listing.left_out, *listing.unreadable))

    def waiting_again(self, done: Collection[int], first: int) -> set[str]:
        """Keys in shards from ``first`` on that were planned again and are not done."""
        number = len(self._names()) - 1
        waiting: set[str] = set()
        while number >= 0 and (lines := self._part(number)) and lines[-1]["shard"] >= first:
            for shard in map(_shard_of, lines):
                if shard.is_again and shard.number not in done:
                    waiting.update(image.key for image in shard.images)
            number -= 1
        return waiting

    def again(self, images: Iterable[PlannedImage]) -> None:
        """Adds shards with images that are planned already: they failed, and are tried again.

        For a plan that is complete.
        """
        number, last = 0, _Position()
        while (lines := self._part(number)) is not None:
            last = _Position.of(lines[-1])
            number += 1
        parts = _Parts(self._shard_size, last)
        for image in images:
            parts.add(image, [])
        parts.end_shard([])
        # They are counted already.
        self._create(
            number, [{**one, "planned": last.planned, "again": True} for one in parts.take()]
        )

    def _planned(self, number: int, last: _Position) -> Iterator[_Lines]:
        """The parts behind ``last``, as they are noted. Ends early where another one plans too:
        what is noted by then has to be read."""
        findings = Findings()
        parts = _Parts(self._shard_size, last)
        for image in self._source.images(findings, last.key):
            parts.add(image, findings.files)
            if len(parts.lines) == _SHARDS_IN_PART:
                lines = parts.take()
                if not self._create(number, lines):
                    return
                number += 1
                yield lines
        parts.end_shard(findings.files)
        if parts.lines:
            lines = parts.take()
            if not self._create(number, lines):
                return
            number += 1
            yield lines
        if self._part(number) is None:
            self._complete(parts.last, findings, parts.untold(findings.files))

    def _complete(self, last: _Position, findings: Findings, left_out: Sequence[LeftOut]) -> None:
        listing = {
            "num_shards": last.shard + 1,
            "num_images": last.planned,
            "num_repeated": findings.repeated,
            "subfolders": findings.subfolders,
            "passed_over": {one.path: one.message for one in findings.passed_over},
            "unreadable": [[one.path, one.code, one.message] for one in findings.unreadable],
            "left_out": [[one.path, one.code, one.message] for one in left_out],
        }
        self._target.create(_COMPLETE, json.dumps(listing).encode())

    def _create(self, number: int, lines: _Lines) -> bool:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        return self._target.create(_part_name(number), text.encode())

    def _part(self, number: int) -> _Lines | None:
        stored = self._target.read(_part_name(number))
        return None if stored is None else [json.loads(line) for line in stored.splitlines()]


def _part_name(number: int) -> str:
    return f"{PLAN}/{number:06}.jsonl"


def _shard_of(line: Mapping[str, Any]) -> Shard:
    images = tuple(PlannedImage(*image) for image in line["images"])
    return Shard(line["shard"], images, line.get("again", False))


@dataclass(frozen=True, slots=True)
class _Position:
    """How far a plan has come: the last shard, the last key, and how many images there are."""

    shard: int = -1
    key: str | None = None
    planned: int = 0

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> _Position:
        return cls(line["shard"], line["last_key"], line["planned"])


class _Parts:
    """Lines of a plan in the making."""

    def __init__(self, shard_size: int, last: _Position) -> None:
        self._shard_size = shard_size
        self.last = last
        self._images: list[PlannedImage] = []
        self._num_told = 0
        self.lines: _Lines = []

    def add(self, image: PlannedImage, left_out: Sequence[LeftOut]) -> None:
        self._images.append(image)
        if len(self._images) == self._shard_size:
            self.end_shard(left_out)

    def end_shard(self, left_out: Sequence[LeftOut]) -> None:
        if not self._images:
            return
        line = {
            "shard": self.last.shard + 1,
            "images": [[one.key, one.address, one.name] for one in self._images],
            "last_key": self._images[-1].key,
            "planned": self.last.planned + len(self._images),
        }
        if untold := self.untold(left_out):
            line["left_out"] = [[one.path, one.code, one.message] for one in untold]
        self.last = _Position.of(line)
        self._images = []
        self.lines.append(line)

    def untold(self, left_out: Sequence[LeftOut]) -> Sequence[LeftOut]:
        """Those that no line has yet."""
        untold = left_out[self._num_told :]
        self._num_told = len(left_out)
        return untold

    def take(self) -> _Lines:
        """The whole shards so far."""
        lines, self.lines = self.lines, []
        return lines

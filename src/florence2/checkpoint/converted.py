"""A converted network on disk: a folder, its manifest, and whether it is whole and the right one.

Written by ``florence2.conversion``. The folder also holds the checkpoint's small files, so it is a
checkpoint by itself wherever it is copied to.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from florence2.checkpoint.files import CONVERTED_NAME, FileRecord, fault_of
from florence2.errors import CheckpointError

FORMAT: Final = 1
"""Of the models' inputs and outputs; a folder of another one must be converted again."""

_READ_BYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Converted:
    """What a converted folder says of itself.

    ``source`` is the checkpoint's name, ``source_sha256`` the hash of its weights and config, see
    ``source_hash``. ``error``: relative errors of the visual ``features`` and of ``logits`` against
    float32, as measured when it was converted. ``calibration``: what int8 was calibrated on.
    """

    source: str
    revision: str | None
    source_sha256: str
    precision: str
    size_wh: tuple[int, int]
    versions: dict[str, str]
    error: dict[str, float]
    files: tuple[FileRecord, ...]
    calibration: str | None = None
    notes: tuple[str, ...] = field(default=())

    def write(self, folder: Path) -> None:
        """Writes the manifest: it comes last, so a folder without it is not whole."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"
        (folder / CONVERTED_NAME).write_text(text, encoding="utf-8")


def is_converted(folder: Path) -> bool:
    """Whether a folder says that it holds a converted network."""
    return (folder / CONVERTED_NAME).is_file()


def read_converted(folder: Path) -> Converted:
    """The manifest of a converted folder, whose files are whole; CheckpointError otherwise."""
    path = folder / CONVERTED_NAME
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = content.pop("format")
        files = tuple(FileRecord(**entry) for entry in content.pop("files"))
        size_wh = tuple(content.pop("size_wh"))
        notes = tuple(content.pop("notes"))
        converted = Converted(**content, files=files, size_wh=size_wh, notes=notes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not the manifest of a converted checkpoint ({type(error).__name__}); "
            "convert the checkpoint again (florence2 convert)."
        ) from error
    if found != FORMAT:
        raise CheckpointError(
            f"{folder} was converted in format {found}, and this version reads format {FORMAT}; "
            "convert the checkpoint again (florence2 convert)."
        )
    for record in files:
        fault = fault_of(folder / record.name, record, with_hash=True)
        if fault is not None:
            fault = fault.replace("the published hash", "the hash in the manifest")
            raise CheckpointError(
                f"The converted checkpoint {folder} is damaged: {record.name} {fault}; convert the "
                "checkpoint again (florence2 convert), or copy the whole folder again."
            )
    return converted


def record_of(path: Path) -> FileRecord:
    """A file's record, with its hash."""
    return FileRecord(path.name, path.stat().st_size, sha256=file_sha256(path))


def file_sha256(path: Path) -> str:
    """Hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def source_hash(folder: Path, names: tuple[str, ...]) -> str:
    """One hash of a checkpoint's files by name."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name} {file_sha256(folder / name)}\n".encode())
    return digest.hexdigest()

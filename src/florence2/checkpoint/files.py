"""Which files make a checkpoint, and whether the ones in a folder are whole."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from florence2.errors import CheckpointError
from florence2.placeholders import HEAD_BYTES, Placeholder, find_placeholder

_log = logging.getLogger(__name__)

MANIFEST_NAME: Final = "florence2-manifest.json"
CONFIG: Final = "config.json"
ADAPTER_CONFIG: Final = "adapter_config.json"
CONVERTED_NAME: Final = "florence2-openvino.json"
"""The manifest of a converted network, which stands for weights where there are none."""
SAFETENSORS: Final = "model.safetensors"
PICKLED: Final = "pytorch_model.bin"

_TOKENIZERS: Final = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_SMALL_FILES: Final = (
    CONFIG,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    # Beside full weights it is a trace of their making, and only for the note that it is unused.
    ADAPTER_CONFIG,
)
ADAPTER_WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin")
"""An adapter's weights, in the order in which they are looked for."""

# The order in which weights are looked for: a format's one file, then its index with parts.
_WEIGHTS: Final = tuple(
    (re.compile(pattern), stem, ending)
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin"))
    for pattern in (
        rf"{stem}(?:\.(?P<variant>\w+))?\.{ending}",
        rf"{stem}\.{ending}\.index(?:\.(?P<variant>\w+))?\.json",
    )
)
_VARIANTS: Final = (None, "fp32", "fp16", "bf16")

_MANIFEST_FORMAT: Final = 1
_READ_BYTES: Final = 4 * 1024 * 1024
_MAX_HEADER_BYTES: Final = 100 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file as its source describes it: size in bytes and one of the two hashes in hex."""

    name: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a complete folder holds; written when all of it is there and verified."""

    repository: str
    revision: str
    files: tuple[FileRecord, ...]

    def write(self, path: Path) -> None:
        """Writes the manifest so that a kill leaves the old file or the new one."""
        content = {"format": _MANIFEST_FORMAT, **asdict(self)}
        write_whole(path, json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """Where a checkpoint's files are. ``revision`` is the commit they came from, if known.

    ``source`` is "hub", "hub cache" (the hub client's own cache, offline), "folder" or "demo".
    ``base``: of an adapter, the checkpoint that it is merged into.
    """

    name: str
    folder: Path
    revision: str | None
    files: tuple[str, ...]
    source: str
    base: CheckpointFiles | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether the weights are an adapter's alone."""
        return not set(ADAPTER_WEIGHTS).isdisjoint(self.files)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that a kill leaves the old file or the new one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.new")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_manifest(path: Path) -> Manifest | None:
    """The manifest in a file; None when there is none or it cannot be read as one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = tuple(FileRecord(**entry) for entry in content["files"])
        manifest = Manifest(content["repository"], content["revision"], files)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("The manifest %s cannot be read and is left aside: %s", path, error)
        return None
    return manifest if content.get("format") == _MANIFEST_FORMAT else None


def read_json(
    path: Path, what: str = "checkpoint file", advice: str = "put a whole copy in its place"
) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError naming the file when it holds none.

    ``what`` the file is, and what to do about it, for people.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _log.info("Reading %s: %s", path, error)
        raise CheckpointError(f"The {what} {path} cannot be read as JSON; {advice}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"The {what} {path} must hold a JSON object, got a {type(content).__name__}; {advice}."
        )
    return content


def choose_files(names: Iterable[str], source: str) -> tuple[str, ...]:
    """The files of a repository or a folder that loading needs: small ones first, weights last.

    One format of weights, see ``weight_files``; where there are none, a converted network or an
    adapter. Raises CheckpointError if a file that is always needed is missing.
    """
    present = set(names)
    weights = weight_files(present)
    if not weights and CONVERTED_NAME in present:
        weights = (CONVERTED_NAME,)
    if not weights and not present.isdisjoint((ADAPTER_CONFIG, *ADAPTER_WEIGHTS)):
        return _adapter_files(present, source)
    if CONFIG not in present:
        raise CheckpointError(f"{source} holds no {CONFIG}; a checkpoint needs it, so add it.")
    if not any(present.issuperset(tokenizer) for tokenizer in _TOKENIZERS):
        raise CheckpointError(
            f"{source} holds neither tokenizer.json nor vocab.json with merges.txt; add one of "
            "them from the published model."
        )
    if not weights:
        raise CheckpointError(_no_weights(present, source))
    return tuple(name for name in _SMALL_FILES if name in present) + weights


def _adapter_files(present: set[str], source: str) -> tuple[str, ...]:
    weights = next((name for name in ADAPTER_WEIGHTS if name in present), None)
    if weights is None:
        raise CheckpointError(
            f"{source} holds {ADAPTER_CONFIG} and neither full weights nor {ADAPTER_WEIGHTS[0]}; "
            "add the adapter's weights."
        )
    if ADAPTER_CONFIG not in present:
        raise CheckpointError(
            f"{source} holds {weights} without {ADAPTER_CONFIG}, which says how strongly an "
            "adapter counts and what it belongs to; add that file."
        )
    return (*(name for name in _SMALL_FILES if name in present), weights)


def small_files(folder: Path) -> tuple[str, ...]:
    """A checkpoint's files beside its weights that are there."""
    return tuple(name for name in _SMALL_FILES if (folder / name).is_file())


def weight_files(names: Iterable[str]) -> tuple[str, ...]:
    """Which of these files hold the weights: one file, or an index and its parts; () for none.

    The first of ``model.safetensors``, its index, ``pytorch_model.bin`` and its index; then the
    same with a variant in the name, such as ``model.fp16.safetensors``.
    """
    present = sorted(names)
    found = [
        (_rank(match["variant"]), order, match, stem, ending)
        for order, (pattern, stem, ending) in enumerate(_WEIGHTS)
        for match in map(pattern.fullmatch, present)
        if match
    ]
    if not found:
        return ()
    _, _, match, stem, ending = min(found, key=lambda candidate: candidate[:2])
    name = match.group()
    if not name.endswith(".json"):
        return (name,)
    number, variant = r"-\d{5}-of-\d{5}", match["variant"]
    middle = rf"(?:\.{variant}{number}|{number}\.{variant})" if variant else number
    part = re.compile(rf"{stem}{middle}\.{ending}")
    return (name, *filter(part.fullmatch, present))


def _rank(variant: str | None) -> tuple[int, str]:
    known = _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS)
    return known, variant or ""


def _no_weights(present: set[str], source: str) -> str:
    odd = sorted(name for name in present if name.endswith(".safetensors"))
    rule = f"{source} holds no weights ({SAFETENSORS} or {PICKLED}, or an index with its parts)"
    if odd:
        return f"{rule}, only {odd[0]}; if that is all of the weights, name it {SAFETENSORS}."
    return f"{rule}; add them."


def check_folder(folder: Path) -> tuple[str, ...]:
    """The files of a complete checkpoint folder, by what the files themselves say.

    Raises CheckpointError naming the file that is missing, cut, unreadable or another's stand-in.
    """
    present = [path.name for path in folder.iterdir() if path.is_file()]
    _check_links(folder, present)
    names = choose_files(present, str(folder))
    for name in names:
        _check_is_itself(folder / name)
    read_json(folder / (CONFIG if CONFIG in names else ADAPTER_CONFIG))
    for name in names:
        if name.endswith(".safetensors"):
            _check_safetensors(folder / name)
        elif name.endswith(".bin"):
            _check_pickled(folder / name)
    weights = weight_files(names)
    if weights and weights[0].endswith(".json"):
        _check_shards(folder, weights[0], names)
    return names


def _check_links(folder: Path, present: Iterable[str]) -> None:
    """CheckpointError where a file that loading would take is a link to nothing."""
    broken = [path.name for path in folder.iterdir() if path.is_symlink() and not path.exists()]
    weights = () if weight_files(present) else (*weight_files(broken), *ADAPTER_WEIGHTS)
    for name in sorted({*_SMALL_FILES, *weights}.intersection(broken)):
        raise CheckpointError(
            f"The checkpoint file {folder / name} is a link to {os.readlink(folder / name)}, which "
            "is not there; copy the file itself (cp -L), or bring what it links to."
        )


def _placeholder_at(path: Path) -> Placeholder | None:
    with path.open("rb") as stream:
        return find_placeholder(stream.read(HEAD_BYTES))


def _check_is_itself(path: Path) -> None:
    """CheckpointError for a file that only stands in for the one it is named as."""
    found = _placeholder_at(path)
    if found is not None:
        raise CheckpointError(
            f"The checkpoint file {path} ({path.stat().st_size} bytes) {found.is_what}; "
            f"{found.remedy}."
        )


def _check_shards(folder: Path, index: str, names: tuple[str, ...]) -> None:
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / index} lists no weights; put a whole copy in its place.")
    for shard in sorted(set(map(str, weight_map.values()))):
        if shard not in names:
            raise CheckpointError(f"{folder} lacks {shard}, which {index} lists; add that file.")


def _check_safetensors(path: Path) -> None:
    size = path.stat().st_size
    if size == 0:
        raise _empty(path)
    with path.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_size > min(size - 8, _MAX_HEADER_BYTES):
            raise _cut(path, size, "is not a whole safetensors file")
        header = stream.read(header_size)
    try:
        entries = json.loads(header).items()
        end = max(
            (int(entry["data_offsets"][1]) for key, entry in entries if key != "__metadata__"),
            default=0,
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _cut(path, size, "has an unreadable safetensors header") from error
    expected = 8 + header_size + end
    if size != expected:
        raise _cut(path, size, f"must have {expected} bytes by its own header")


def _check_pickled(path: Path) -> None:
    if path.stat().st_size == 0:
        raise _empty(path)
    with path.open("rb") as stream:
        start = stream.read(2)
    # An archive, or a pickle as torch wrote it before 1.6.
    if not zipfile.is_zipfile(path) if start == b"PK" else start[:1] != b"\x80":
        raise _cut(path, path.stat().st_size, "is not a whole PyTorch file")


def _empty(path: Path) -> CheckpointError:
    return CheckpointError(f"The checkpoint file {path} is empty (0 bytes); fetch it again.")


def _cut(path: Path, size: int, rule: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint file {path} {rule}, and it has {size} bytes; "
        "it was cut or damaged in a copy, so fetch it again."
    )


def fault_of(path: Path, record: FileRecord, with_hash: bool) -> str | None:
    """What is wrong with a file against its record, as a clause of a sentence; None if nothing."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    if size != record.size:
        found = _placeholder_at(path)
        what = f" and {found.is_what}" if found else ""
        return f"has {size} bytes instead of {record.size}{what}"
    if with_hash and not _hash_agrees(path, record):
        return "does not have the published hash"
    return None


def _hash_agrees(path: Path, record: FileRecord) -> bool:
    if record.sha256 is not None:
        digest, published = hashlib.sha256(), record.sha256.lower()
    elif record.git_sha1 is not None:
        # The hub names small files by git's blob hash: SHA-1 over a header and the content.
        header = f"blob {record.size}\0".encode()
        digest, published = hashlib.sha1(header, usedforsecurity=False), record.git_sha1
    else:
        return False
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest() == published


def first_fault(folder: Path, manifest: Manifest, with_hash: bool) -> tuple[str, str] | None:
    """The first file of a manifest that is missing or differs: its name and what is wrong."""
    for record in manifest.files:
        fault = fault_of(folder / record.name, record, with_hash)
        if fault is not None:
            return record.name, fault
    return None

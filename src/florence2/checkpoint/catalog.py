"""From a name to a folder with a whole checkpoint: known names, hub repositories, local folders."""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from florence2.checkpoint.files import (
    CONFIG,
    MANIFEST_NAME,
    SAFETENSORS,
    CheckpointFiles,
    FileRecord,
    Manifest,
    check_folder,
    fault_of,
    first_fault,
    read_json,
    read_manifest,
    write_whole,
)
from florence2.checkpoint.hub import (
    PLAN_NAME,
    ProgressCallback,
    cannot_write,
    download,
    hub_endpoint,
    is_offline,
    list_checkpoint,
)
from florence2.errors import CheckpointError, HubUnreachableError, unknown_name

_log = logging.getLogger(__name__)


DEMO: Final = "demo"


@dataclass(frozen=True, slots=True)
class KnownCheckpoint:
    """One published checkpoint; ``weights_bytes`` and ``weights_sha256`` guard copies by hand."""

    name: str
    repository: str
    revision: str
    weights_bytes: int
    weights_sha256: str
    native_repository: str


KNOWN_CHECKPOINTS: Final[tuple[KnownCheckpoint, ...]] = (
    KnownCheckpoint(
        "Florence-2-base",
        "microsoft/Florence-2-base",
        "5ca5edf5bd017b9919c05d08aebef5e4c7ac3bac",
        463_221_266,
        "03075d2d2d2bbd3e180b9ba0afae4aa8563226e2d32911656966e05b2f2ee060",
        "florence-community/Florence-2-base@00921df66db728a9ceb750f5eca43e5c203a2051",
    ),
    KnownCheckpoint(
        "Florence-2-large",
        "microsoft/Florence-2-large",
        "21a599d414c4d928c9032694c424fb94458e3594",
        1_553_563_458,
        "4f38ce741c6b71188fe2b3419a55e11917a8a7b321ae2e63c61da0191b0ebad7",
        "florence-community/Florence-2-large@4271c66b88cdbc05735372ec13b2360108de5317",
    ),
    KnownCheckpoint(
        "Florence-2-base-ft",
        "microsoft/Florence-2-base-ft",
        "f6c1a25888ffc1d945ee8a1a77ac833c7303d46e",
        463_221_266,
        "58757d657ff44051314c8030b68e04cb1bb618ca9a4885418f111f6fb708185a",
        "florence-community/Florence-2-base-ft@0b03b6f15a4a211370fb204aee4e7dd48887ea37",
    ),
    KnownCheckpoint(
        "Florence-2-large-ft",
        "microsoft/Florence-2-large-ft",
        "4a12a2b54b7016a48a22037fbd62da90cd566f2a",
        1_540_980_506,
        "8b4e610c952eef90a836c56cda0f398a672a3a6ca7b4d96b0e09a86dee42e2c3",
        "florence-community/Florence-2-large-ft@26b734a54fdfbf9c398351eedfabb7f27fc470b7",
    ),
)

KNOWN_BY_NAME: Final = {known.name: known for known in KNOWN_CHECKPOINTS}
CHECKPOINT_NAMES: Final[tuple[str, ...]] = (*KNOWN_BY_NAME, DEMO)


Verify = Literal["size", "full"]


CACHE_VARIABLE: Final = "FLORENCE2_CACHE"


DEMO_VARIABLE: Final = "FLORENCE2_DEMO"


_DEMO_FOLDER: Final = Path("demo", "checkpoint")


_PACKAGE: Final = Path(__file__).resolve().parents[1]


_PROJECT_ROOT: Final = _PACKAGE.parents[1]


_DEMO_IN_WHEEL: Final = "demo_checkpoint"


_REPOSITORY: Final = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


_PINS: Final = "pins.json"


def default_cache_dir() -> Path:
    """``FLORENCE2_CACHE``, else ``florence2`` in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return _expanded(named)
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else _expanded("~/.cache")) / "florence2"


def resolve(
    name: str | Path,
    *,
    cache_dir: str | Path | None = None,
    offline: bool | None = None,
    progress: ProgressCallback | None = None,
    verify: Verify = "size",
    refresh: bool = False,
) -> CheckpointFiles:
    """The whole, verified files of a checkpoint; downloads what is missing.

    ``name``: one of ``CHECKPOINT_NAMES``, a local folder, or ``owner/name[@revision]`` on the
    hub. ``offline=None`` follows ``HF_HUB_OFFLINE``. ``verify="full"`` hashes every file that
    has a manifest, "size" compares lengths; a download is always hashed. ``refresh`` hashes them
    all and asks the hub which commit an unpinned repository is at now; without a connection it
    keeps what is here. Raises CheckpointError.
    """
    verify = "full" if refresh else verify
    text = str(name)
    if text == DEMO:
        return _from_folder(DEMO, _demo_folder(), verify, "demo")
    known = KNOWN_BY_NAME.get(text)
    if known is not None:
        wanted = _Wanted(text, known.repository, known.revision, known, refresh)
        return _from_hub(wanted, _as_cache(cache_dir), is_offline(offline), progress, verify)
    folder = _expanded(text)
    if _is_folder(folder):
        return _from_folder(text, folder, verify, "folder")
    match = _REPOSITORY.fullmatch(text)
    if isinstance(name, Path) or match is None or text.startswith(".") or ".." in text:
        raise _no_such(text)
    wanted = _Wanted(text, match[1], match[2] or constants.DEFAULT_REVISION, None, refresh)
    return _from_hub(wanted, _as_cache(cache_dir), is_offline(offline), progress, verify)


def _expanded(path: str | Path) -> Path:
    """The path with ``~`` and ``~user`` as folders; CheckpointError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise CheckpointError(
            f"A path with ~ names the home of a user of this machine, and {str(path)!r} names none "
            f"that is known here; write the whole path, or name the cache in {CACHE_VARIABLE}."
        ) from error


def _is_folder(path: Path) -> bool:
    """Also for text that no file system takes for a path."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _as_cache(cache_dir: str | Path | None) -> Path:
    return default_cache_dir() if cache_dir is None else _expanded(cache_dir)


def _no_such(name: str) -> CheckpointError:
    name = name if len(name) <= 1000 else f"{name[:150]}...{name[-150:]}"
    if os.sep in name or "/" in name:
        return CheckpointError(
            f"The checkpoint folder {name} does not exist; name a folder that does, a hub "
            f"repository as owner/name, or one of {', '.join(CHECKPOINT_NAMES)}."
        )
    return CheckpointError(unknown_name("checkpoint", name, CHECKPOINT_NAMES))


def _demo_folder() -> Path:
    named = os.environ.get(DEMO_VARIABLE)
    if named:
        return _expanded(named)
    here = (_PACKAGE / _DEMO_IN_WHEEL, _PROJECT_ROOT / _DEMO_FOLDER, Path.cwd() / _DEMO_FOLDER)
    for folder in here:
        if folder.is_dir():
            return folder
    raise CheckpointError(
        f"The demo checkpoint is not in {_PROJECT_ROOT / _DEMO_FOLDER}; copy the folder "
        f"{_DEMO_FOLDER} of the project's repository there, or name its place in {DEMO_VARIABLE}."
    )


def _from_folder(name: str, folder: Path, verify: Verify, source: str) -> CheckpointFiles:
    if not folder.is_dir():
        raise _no_such(str(folder))
    manifest = read_manifest(folder / MANIFEST_NAME)
    if manifest is not None:
        fault = first_fault(folder, manifest, with_hash=verify == "full")
        if fault is not None:
            raise CheckpointError(
                f"The checkpoint file {folder / fault[0]} {fault[1]}; copy it again from where "
                f"the folder came from ({manifest.repository}@{manifest.revision})."
            )
    revision = None if manifest is None else manifest.revision
    return CheckpointFiles(name, folder, revision, check_folder(folder), source)


@dataclass(frozen=True, slots=True)
class _Wanted:
    name: str
    repository: str
    revision: str
    known: KnownCheckpoint | None
    refresh: bool = False

    @property
    def may_have_moved(self) -> bool:
        """Whether the hub is to say again which commit the revision stands for."""
        return self.refresh and _COMMIT.fullmatch(self.revision) is None

    def home(self, cache: Path) -> Path:
        return cache / self.repository.replace("/", "--")

    def commit(self, cache: Path) -> str | None:
        """The commit that the revision stands for on this machine, or None."""
        if _COMMIT.fullmatch(self.revision):
            return self.revision
        pins = self.home(cache) / _PINS
        pinned = read_json(pins).get(self.revision) if pins.is_file() else None
        return pinned if isinstance(pinned, str) and _COMMIT.fullmatch(pinned) else None


def _from_hub(
    wanted: _Wanted, cache: Path, offline: bool, progress: ProgressCallback | None, verify: Verify
) -> CheckpointFiles:
    found = _complete(wanted, cache, verify)
    if found is not None and (offline or not wanted.may_have_moved):
        return found
    if offline:
        return _without_hub(wanted, cache, "the hub is switched off (HF_HUB_OFFLINE)")
    try:
        return _online(wanted, cache, progress, verify)
    except HubUnreachableError as error:
        _log.warning("%s", error)
        if found is not None:
            return found
        return _without_hub(wanted, cache, f"the hub at {hub_endpoint()} cannot be reached", error)


def _complete(wanted: _Wanted, cache: Path, verify: Verify) -> CheckpointFiles | None:
    commit = wanted.commit(cache)
    folder = wanted.home(cache) / (commit or "")
    manifest = read_manifest(folder / MANIFEST_NAME) if commit else None
    if manifest is None:
        return None
    fault = first_fault(folder, manifest, with_hash=verify == "full")
    if fault is not None:
        _log.warning("%s in %s %s", fault[0], folder, fault[1])
        return None
    return _result(wanted, folder, manifest)


def _result(wanted: _Wanted, folder: Path, manifest: Manifest) -> CheckpointFiles:
    # Sizes and hashes agree with the source, yet the source itself may hold a broken checkpoint.
    names = check_folder(folder)
    return CheckpointFiles(wanted.name, folder, manifest.revision, names, "hub")


def _online(
    wanted: _Wanted, cache: Path, progress: ProgressCallback | None, verify: Verify
) -> CheckpointFiles:
    home = wanted.home(cache)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(home / ".lock"):
            found = None if wanted.may_have_moved else _complete(wanted, cache, verify)
            if found is not None:
                return found
            pinned = None if wanted.may_have_moved else wanted.commit(cache)
            commit = pinned or wanted.revision
            manifest = list_checkpoint(wanted.repository, commit)
            _check_published(wanted.known, manifest)
            folder = home / manifest.revision
            download(manifest, folder, progress)
            _pin(wanted, home, manifest.revision)
    except OSError as error:
        raise cannot_write(home, error) from error
    return _result(wanted, folder, manifest)


def _check_published(known: KnownCheckpoint | None, manifest: Manifest) -> None:
    if known is None:
        return
    offered = [record for record in manifest.files if record.name == SAFETENSORS]
    if not offered or offered[0].sha256 != known.weights_sha256:
        raise CheckpointError(
            f"The hub at {hub_endpoint()} offers other weights for {known.name} than the "
            "published ones, so they are not used; name a trusted hub in HF_ENDPOINT."
        )


def _pin(wanted: _Wanted, home: Path, commit: str) -> None:
    if wanted.revision == commit:
        return
    pins = read_json(home / _PINS) if (home / _PINS).is_file() else {}
    write_whole(home / _PINS, json.dumps({**pins, wanted.revision: commit}, indent=2) + "\n")


def _without_hub(
    wanted: _Wanted, cache: Path, why: str, cause: HubUnreachableError | None = None
) -> CheckpointFiles:
    """What this machine holds, where no manifest says that it is complete: it must prove so."""
    commit = wanted.commit(cache)
    folder = wanted.home(cache) / (commit or wanted.revision)
    if folder.is_dir():
        return _placed_by_hand(wanted, folder, commit, why)
    snapshot = _client_snapshot(wanted.repository, wanted.revision)
    if snapshot is not None:
        return _placed_by_hand(wanted, snapshot, snapshot.name, why, "hub cache")
    raise CheckpointError(
        f"{wanted.name} is not on this machine and {why}; connect once, or copy its files by "
        f"hand into {folder}, or give a folder with them as the name."
    ) from cause


def _client_snapshot(repository: str, revision: str) -> Path | None:
    cached = try_to_load_from_cache(repository, CONFIG, revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def _placed_by_hand(
    wanted: _Wanted, folder: Path, commit: str | None, why: str, source: str = "hub"
) -> CheckpointFiles:
    plan = read_manifest(folder / PLAN_NAME) or read_manifest(folder / MANIFEST_NAME)
    fault = first_fault(folder, plan, with_hash=True) if plan else None
    if fault is not None:
        raise CheckpointError(
            f"{wanted.name} is incomplete: {fault[0]} {fault[1]} in {folder}, and {why}; connect "
            "to finish the download, or copy that file there by hand."
        )
    names = check_folder(folder)
    if wanted.known is not None and plan is None:
        _check_weights(wanted.known, folder)
    return CheckpointFiles(wanted.name, folder, commit, names, source)


def _check_weights(known: KnownCheckpoint, folder: Path) -> None:
    record = FileRecord(SAFETENSORS, known.weights_bytes, sha256=known.weights_sha256)
    fault = fault_of(folder / SAFETENSORS, record, with_hash=True)
    if fault is not None:
        raise CheckpointError(
            f"{folder / SAFETENSORS} {fault}, so it is not the published {known.name}; copy it "
            "again, or name the folder itself to use other weights."
        )

"""From a name to a folder with a whole checkpoint: known names, hub repositories, local folders."""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from florence2.checkpoint.files import (
    ADAPTER_CONFIG,
    CONFIG,
    CONVERTED_NAME,
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
    Download,
    ProgressCallback,
    cannot_write,
    hub_endpoint,
    is_offline,
    list_checkpoint,
)
from florence2.errors import CheckpointError, HubUnreachableError, shown, unknown_name

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


KNOWN_CHECKPOINTS: Final[tuple[KnownCheckpoint, ...]] = (
    KnownCheckpoint(
        "Florence-2-base",
        "microsoft/Florence-2-base",
        "5ca5edf5bd017b9919c05d08aebef5e4c7ac3bac",
        463_221_266,
        "03075d2d2d2bbd3e180b9ba0afae4aa8563226e2d32911656966e05b2f2ee060",
    ),
    KnownCheckpoint(
        "Florence-2-large",
        "microsoft/Florence-2-large",
        "21a599d414c4d928c9032694c424fb94458e3594",
        1_553_563_458,
        "4f38ce741c6b71188fe2b3419a55e11917a8a7b321ae2e63c61da0191b0ebad7",
    ),
    KnownCheckpoint(
        "Florence-2-base-ft",
        "microsoft/Florence-2-base-ft",
        "f6c1a25888ffc1d945ee8a1a77ac833c7303d46e",
        463_221_266,
        "58757d657ff44051314c8030b68e04cb1bb618ca9a4885418f111f6fb708185a",
    ),
    KnownCheckpoint(
        "Florence-2-large-ft",
        "microsoft/Florence-2-large-ft",
        "4a12a2b54b7016a48a22037fbd62da90cd566f2a",
        1_540_980_506,
        "8b4e610c952eef90a836c56cda0f398a672a3a6ca7b4d96b0e09a86dee42e2c3",
    ),
)

KNOWN_BY_NAME: Final = {known.name: known for known in KNOWN_CHECKPOINTS}
CHECKPOINT_NAMES: Final[tuple[str, ...]] = (*KNOWN_BY_NAME, DEMO)


Verify = Literal["size", "full"]

CACHE_VARIABLE: Final = "FLORENCE2_CACHE"
DEMO_VARIABLE: Final = "FLORENCE2_DEMO"

_PACKAGE: Final = Path(__file__).resolve().parents[1]
PROJECT_ROOT: Final = _PACKAGE.parents[1]
_DEMO_FOLDER: Final = Path("demo", "checkpoint")
_DEMO_IN_WHEEL: Final = "demo_checkpoint"

BASE_FOLDER: Final = "base"
"""Inside an adapter's folder, or beside it: the checkpoint that it is merged into."""

_PUBLISHERS: Final = ("microsoft", "florence-community")
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
    hub. An adapter comes with its ``base``, which is found or downloaded too. ``offline=None``
    follows ``HF_HUB_OFFLINE``. ``verify="full"`` hashes every file that has a manifest, "size"
    compares lengths; a download is always hashed. ``refresh`` hashes them all and asks the hub
    which commit an unpinned repository is at now; without a connection it keeps what is here.
    Raises CheckpointError.
    """
    wanted = _Wanted(cache_dir, offline, progress, "full" if refresh else verify, refresh)
    files = wanted.find(name)
    return replace(files, base=_base_of(files, wanted)) if files.is_adapter else files


def resolve_adapter(
    name: str | Path,
    *,
    cache_dir: str | Path | None = None,
    offline: bool | None = None,
    progress: ProgressCallback | None = None,
) -> CheckpointFiles:
    """As ``resolve``, of an adapter whose base is at hand; CheckpointError for what is none."""
    files = _Wanted(cache_dir, offline, progress, "size", False).find(name)
    if not files.is_adapter:
        raise CheckpointError(
            f"An adapter is a folder with {ADAPTER_CONFIG} and the adapter's weights, and "
            f"{files.folder} holds a whole checkpoint; load that as the model."
        )
    return files


@dataclass(frozen=True, slots=True)
class _Wanted:
    """How files are to be found and verified; as the arguments of ``resolve``."""

    cache_dir: str | Path | None
    offline: bool | None
    progress: ProgressCallback | None
    verify: Verify
    refresh: bool

    def find(self, name: str | Path) -> CheckpointFiles:
        """The files that go by a name, an adapter's without its base."""
        text = str(name)
        if text == DEMO:
            return _from_folder(DEMO, _demo_folder(), self.verify, "demo")
        known = KNOWN_BY_NAME.get(text)
        if known is not None:
            repository, revision = known.repository, known.revision
        elif _is_folder(folder := _expanded(text)):
            return _from_folder(text, folder, self.verify, "folder")
        else:
            match = _REPOSITORY.fullmatch(text)
            if isinstance(name, Path) or match is None or text.startswith(".") or ".." in text:
                raise _no_such(text)
            repository, revision = match[1], match[2] or constants.DEFAULT_REVISION
        return _HubCheckpoint(
            text,
            repository,
            revision,
            known,
            default_cache_dir() if self.cache_dir is None else _expanded(self.cache_dir),
            self.verify,
            may_have_moved=self.refresh and _COMMIT.fullmatch(revision) is None,
        ).find(is_offline(self.offline), self.progress)


def _base_of(adapter: CheckpointFiles, wanted: _Wanted) -> CheckpointFiles:
    """The checkpoint that an adapter is merged into: the first of ``base_names`` that is there."""
    inside = adapter.folder / BASE_FOLDER
    faults: list[tuple[str, CheckpointError]] = []
    for name in base_names(adapter.folder):
        try:
            base = wanted.find(name)
            break
        except CheckpointError as error:
            faults.append((name, error))
    else:
        name, fault = faults[0]
        raise CheckpointError(
            f"{adapter.folder} holds an adapter of {name}, which cannot be had "
            f"({str(fault).rstrip('.')}); put the base checkpoint into {inside}."
        ) from fault
    if base.is_adapter or CONVERTED_NAME in base.files:
        what = "an adapter itself" if base.is_adapter else "converted for OpenVINO"
        raise CheckpointError(
            f"An adapter is merged into full weights, and {base.folder}, the base of the one in "
            f"{adapter.folder}, is {what}; put its full weights into {inside}."
        )
    return base


def base_names(folder: Path) -> tuple[str, ...]:
    """Where the base of the adapter in ``folder`` may be, the place that counts first first.

    In ``base`` in its folder alone; else what its config names, and where that cannot be had in
    ``base`` beside it. Raises CheckpointError where there is no such place.
    """
    inside, beside = folder / BASE_FOLDER, folder.parent / BASE_FOLDER
    if (inside / CONFIG).is_file():
        return (str(inside),)
    config = folder / ADAPTER_CONFIG
    settings = read_json(config)
    named, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    is_named = isinstance(named, str) and named.strip()
    found = [base_name(str(named), revision)] if is_named else []
    if (beside / CONFIG).is_file():
        found.append(str(beside))
    if not found:
        raise CheckpointError(
            f"base_model_name_or_path in {config} must name the adapter's base, and is "
            f"{shown(named)}; put the base checkpoint into {inside}."
        )
    return tuple(found)


def base_name(named: str, revision: object = None) -> str:
    """The name of the base that an adapter's config names, with the revision it names if any.

    The repository of one of the four names is that name, without a revision or at the pinned one.
    """
    if named == DEMO or (named not in KNOWN_BY_NAME and _is_folder(_expanded(named))):
        return named
    repository = KNOWN_BY_NAME[named].repository if named in KNOWN_BY_NAME else named
    for known in KNOWN_CHECKPOINTS:
        if known.repository == repository and revision in (None, known.revision):
            return known.name
    is_repository = _REPOSITORY.fullmatch(repository) is not None
    return f"{repository}@{revision}" if revision and is_repository else repository


def published_name(name: str) -> str | None:
    """Which of the four published checkpoints a name or repository is, in either layout."""
    owner, _, own = name.partition("@")[0].rpartition("/")
    return own if own in KNOWN_BY_NAME and owner in ("", *_PUBLISHERS) else None


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
    here = (_PACKAGE / _DEMO_IN_WHEEL, PROJECT_ROOT / _DEMO_FOLDER, Path.cwd() / _DEMO_FOLDER)
    for folder in here:
        if folder.is_dir():
            return folder
    raise CheckpointError(
        f"The demo checkpoint is not in {PROJECT_ROOT / _DEMO_FOLDER}; copy the folder "
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
class _HubCheckpoint:
    """A checkpoint of the hub: what of it is on this machine, and how to bring the rest.

    ``known`` is its entry where it is one of the table; ``may_have_moved``: the hub is to say
    again which commit ``revision`` stands for.
    """

    name: str
    repository: str
    revision: str
    known: KnownCheckpoint | None
    cache: Path
    verify: Verify
    may_have_moved: bool

    @property
    def home(self) -> Path:
        """The folder of all its commits."""
        return self.cache / self.repository.replace("/", "--")

    def find(self, offline: bool, progress: ProgressCallback | None) -> CheckpointFiles:
        """Its whole files, downloaded where they are not here; CheckpointError."""
        found = self._complete()
        if found is not None and (offline or not self.may_have_moved):
            return found
        if offline:
            return self._without_hub("the hub is switched off (HF_HUB_OFFLINE)")
        try:
            return self._online(progress)
        except HubUnreachableError as error:
            _log.warning("%s", error)
            if found is not None:
                return found
            return self._without_hub(f"the hub at {hub_endpoint()} cannot be reached", error)

    def _commit(self) -> str | None:
        """The commit that the revision stands for on this machine, or None."""
        if _COMMIT.fullmatch(self.revision):
            return self.revision
        pinned = self._pins().get(self.revision)
        return pinned if isinstance(pinned, str) and _COMMIT.fullmatch(pinned) else None

    def _pins(self) -> dict[str, Any]:
        path = self.home / _PINS
        return read_json(path) if path.is_file() else {}

    def _complete(self) -> CheckpointFiles | None:
        commit = self._commit()
        folder = self.home / (commit or "")
        manifest = read_manifest(folder / MANIFEST_NAME) if commit else None
        if manifest is None:
            return None
        fault = first_fault(folder, manifest, with_hash=self.verify == "full")
        if fault is not None:
            _log.warning("%s in %s %s", fault[0], folder, fault[1])
            return None
        return self._files(folder, manifest.revision)

    def _files(self, folder: Path, commit: str | None, source: str = "hub") -> CheckpointFiles:
        # Even where sizes and hashes agree with the source: it may hold a broken checkpoint itself.
        return CheckpointFiles(self.name, folder, commit, check_folder(folder), source)

    def _online(self, progress: ProgressCallback | None) -> CheckpointFiles:
        home = self.home
        try:
            home.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(home / ".lock"):
                # Another process may have brought it meanwhile.
                found = None if self.may_have_moved else self._complete()
                if found is not None:
                    return found
                pinned = None if self.may_have_moved else self._commit()
                manifest = list_checkpoint(self.repository, pinned or self.revision)
                self._check_published(manifest)
                folder = home / manifest.revision
                Download(manifest, folder, progress).run()
                if self.revision != manifest.revision:
                    pins = {**self._pins(), self.revision: manifest.revision}
                    write_whole(home / _PINS, json.dumps(pins, indent=2) + "\n")
        except OSError as error:
            raise cannot_write(home, error) from error
        return self._files(folder, manifest.revision)

    def _check_published(self, manifest: Manifest) -> None:
        offered = [record.sha256 for record in manifest.files if record.name == SAFETENSORS]
        if self.known is not None and offered != [self.known.weights_sha256]:
            raise CheckpointError(
                f"The hub at {hub_endpoint()} offers other weights for {self.known.name} than the "
                "published ones, so they are not used; name a trusted hub in HF_ENDPOINT."
            )

    def _without_hub(self, why: str, cause: HubUnreachableError | None = None) -> CheckpointFiles:
        """What this machine holds, where no manifest says that it is complete: it must prove so."""
        commit = self._commit()
        folder = self.home / (commit or self.revision)
        if folder.is_dir():
            return self._placed_by_hand(folder, commit, why)
        for config in (CONFIG, ADAPTER_CONFIG):
            cached = try_to_load_from_cache(self.repository, config, revision=self.revision)
            if isinstance(cached, str):
                snapshot = Path(cached).parent
                return self._placed_by_hand(snapshot, snapshot.name, why, "hub cache")
        raise CheckpointError(
            f"{self.name} is not on this machine and {why}; connect once, or copy its files by "
            f"hand into {folder}, or give a folder with them as the name."
        ) from cause

    def _placed_by_hand(
        self, folder: Path, commit: str | None, why: str, source: str = "hub"
    ) -> CheckpointFiles:
        plan = read_manifest(folder / PLAN_NAME) or read_manifest(folder / MANIFEST_NAME)
        fault = first_fault(folder, plan, with_hash=True) if plan else None
        if fault is not None:
            raise CheckpointError(
                f"{self.name} is incomplete: {fault[0]} {fault[1]} in {folder}, and {why}; "
                "connect to finish the download, or copy that file there by hand."
            )
        files = self._files(folder, commit, source)
        if self.known is not None and plan is None:
            weights = FileRecord(
                SAFETENSORS, self.known.weights_bytes, sha256=self.known.weights_sha256
            )
            wrong = fault_of(folder / SAFETENSORS, weights, with_hash=True)
            if wrong is not None:
                raise CheckpointError(
                    f"{folder / SAFETENSORS} {wrong}, so it is not the published "
                    f"{self.known.name}; copy it again, or name the folder itself to use other "
                    "weights."
                )
        return files

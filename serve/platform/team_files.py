"""Fine-tunes in the team files of the platform: listed, fetched and verified, uploaded."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeVar

import requests
from dotenv import load_dotenv

from florence2.checkpoint.converted import file_sha256
from florence2.checkpoint.files import FileRecord, fault_of
from florence2.checkpoint.hub import ProgressCallback, ProgressUpdate, cannot_write
from florence2.errors import CheckpointError, FlorenceError, RequestError, shown
from serve.platform.experiments import (
    CHECKPOINTS,
    EXPERIMENTS,
    FRAMEWORK,
    INFO_NAME,
    Experiment,
    experiment_of,
    read_training,
)
from serve.platform.failures import NotFoundError, platform_failure
from serve.platform.patience import status_of
from serve.sdk import sly

# isort: split
from supervisely.api.file_api import FileInfo

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

# The SDK tries a call again by itself; these are for what broke off on its way.
_WAITS_S: Final = (0.2, 1.0)
_READ_BYTES: Final = 1024 * 1024
_MAX_JSON_BYTES: Final = 32 * 1024 * 1024
_LISTING_THREADS: Final = 8
_PART: Final = ".part"
_SHOWN_HASH: Final = 12
_VERSION: Final = re.compile(rf"[0-9a-f]{{{_SHOWN_HASH}}}")

Result = TypeVar("Result")


class TransferError(CheckpointError):
    """A file came out of a transfer as another than it went in."""


def find_experiments(api: sly.Api, team_id: int) -> list[Experiment]:
    """Our experiments in the team files; one that cannot be read is passed over, and logged.

    Raises what the SDK raises where the platform does not answer.
    """
    listed = api.file.list(team_id, EXPERIMENTS, recursive=True, return_type="fileinfo")
    paths = [info.path for info in listed if _is_ours(info.path)]

    def read(path: str) -> Experiment | None:
        try:
            found = _tried(partial(_read_experiment, api, team_id, path))
        except (FlorenceError, requests.RequestException) as error:
            logger.warning("%s is not listed: %s", path, error)
            return None
        # Folders are copied and renamed.
        found.info.artifacts_dir = f"{PurePosixPath(path).parent}/"
        return found

    with ThreadPoolExecutor(_LISTING_THREADS) as threads:
        return [found for found in threads.map(read, paths) if found is not None]


def listed_in_time(api: sly.Api, team_id: int, timeout_s: float) -> list[Experiment] | None:
    """``find_experiments`` for a page; None where the platform fails or says nothing."""
    found: list[list[Experiment] | None] = []

    def find() -> None:
        try:
            found.append(_tried(partial(find_experiments, asked_once(api), team_id)))
        except Exception as error:  # noqa: BLE001 - the SDK and its transport raise what they like
            logger.warning(
                "The platform did not list the team's fine-tunes (%s: %s); they are missing on the "
                "page until it is asked again.",
                type(error).__name__,
                error,
            )
            found.append(None)

    # The SDK has no limit of time to a try; nobody waits for this thread to end.
    asking = threading.Thread(target=find, name="list-experiments", daemon=True)
    asking.start()
    asking.join(timeout_s)
    if not found:
        logger.warning(
            "The platform did not list the team's fine-tunes within %.0f s; they are missing on "
            "the page until it is asked again.",
            timeout_s,
        )
        return None
    return found[0]


def _is_ours(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    return name == INFO_NAME and folder.endswith(FRAMEWORK)


def _read_experiment(api: sly.Api, team_id: int, path: str) -> Experiment:
    return experiment_of(_json_at(api, team_id, path), path)


def _json_at(api: sly.Api, team_id: int, path: str) -> Any:  # noqa: ANN401 - whatever is there
    """The JSON of a small file; CheckpointError where it holds none."""
    answer = api.post("file-storage.download", {"teamId": team_id, "path": path}, stream=True)
    with answer:
        content = b""
        for block in answer.iter_content(_READ_BYTES):
            content += block
            if len(content) > _MAX_JSON_BYTES:
                raise CheckpointError(f"{path} is larger than any experiment; choose another.")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is no JSON; upload it again.") from error


@dataclass(frozen=True, slots=True)
class Fetched:
    """A fine-tune on this machine: ``folder`` is what to load, ``model_meta`` its classes and tags.

    ``artifacts_dir`` is where it is in the team files now, whatever the experiment says, and
    ``checkpoint_url`` where the platform shows its file.
    """

    experiment: Experiment
    folder: Path
    model_meta: sly.ProjectMeta
    artifacts_dir: str
    checkpoint_url: str

    @property
    def model_info(self) -> dict[str, Any]:
        """What the SDK is told of the model: the experiment, with its classes inside."""
        info: dict[str, Any] = self.experiment.info.to_json()
        return {
            **info,
            "artifacts_dir": self.artifacts_dir,
            "model_meta": self.model_meta.to_json(),
        }


def fetch(
    api: sly.Api,
    team_id: int,
    checkpoint: object,
    home: Path,
    progress: ProgressCallback | None = None,
) -> Fetched:
    """Brings the fine-tune that a checkpoint's path stands for into ``home``, whole and verified.

    Every version of it has a folder of its own, and what is there already, by its hash, is not
    downloaded again. Raises CheckpointError for an experiment that is cut, damaged or another
    framework's, NotFoundError for one that is not there, and what the SDK raises where the platform
    fails.
    """
    artifacts = _artifacts_of(checkpoint)
    name, info_path = PurePosixPath(str(checkpoint)).name, str(artifacts / INFO_NAME)
    infos = _infos_in(api, team_id, artifacts)
    for path in (info_path, str(checkpoint)):
        if path not in infos:
            raise NotFoundError(f"There is no {path} in the team files; choose another model.")
    experiment = _tried(partial(_read_experiment, api, team_id, info_path))
    if name != experiment.info.best_checkpoint:
        raise CheckpointError(
            f"{info_path} lists the files of {shown(experiment.info.best_checkpoint)}, and {name} "
            "was asked for; deploy that one."
        )
    meta = _meta_of(api, team_id, artifacts, experiment.info.model_meta)
    records = {
        str(artifacts / record.name): _known(record, infos, artifacts)
        for record in experiment.files
    }
    version = hashlib.sha256(repr(sorted(records.items())).encode()).hexdigest()[:_SHOWN_HASH]
    folder = home.joinpath(str(team_id), *artifacts.parts[1:], version, PurePosixPath(name).stem)
    total, done = sum(record.size for record in records.values()), 0
    for path, record in records.items():
        target = folder / PurePosixPath(record.name).relative_to(experiment.root)

        def tell(count: int, file: str = target.name, before: int = done) -> None:
            if progress is not None:
                progress(ProgressUpdate(file, before + count, total))

        try:
            _bring(api, team_id, path, record, target, tell)
        except OSError as error:
            # What the transport raises is an OSError too.
            if platform_failure(error) is not None:
                raise
            raise cannot_write(folder, error) from error
        done += record.size
    url = api.file.get_url(infos[str(checkpoint)].id)
    return Fetched(experiment, folder, meta, f"{artifacts}/", url)


def _artifacts_of(checkpoint: object) -> PurePosixPath:
    """The folder of the experiment that a checkpoint's path in team files is in."""
    path = PurePosixPath(checkpoint) if isinstance(checkpoint, str) else PurePosixPath()
    parts = path.parts
    if not path.is_absolute() or len(parts) < 4 or parts[-2] != CHECKPOINTS or ".." in parts:
        raise RequestError(
            "A custom model is named by its checkpoint in team files, such as "
            f"{EXPERIMENTS}/street/1_{FRAMEWORK}/{CHECKPOINTS}/best.pt, and {shown(checkpoint)} "
            "was received; choose it from the list."
        )
    return path.parent.parent


def _infos_in(api: sly.Api, team_id: int, folder: PurePosixPath) -> dict[str, FileInfo]:
    """What the platform knows of the files below a folder, by path."""
    listed = api.file.list(team_id, f"{folder}/", recursive=True, return_type="fileinfo")
    return {info.path: info for info in listed}


def _meta_of(
    api: sly.Api, team_id: int, artifacts: PurePosixPath, named: object
) -> sly.ProjectMeta:
    """The classes of an experiment, which stand in it or in a file beside it."""
    path = str(artifacts / str(named))
    if not isinstance(named, dict):
        named = _tried(partial(_json_at, api, team_id, path))
    try:
        return sly.ProjectMeta.from_json(named)
    except Exception as error:
        raise CheckpointError(
            f"The classes of the experiment in {path} cannot be read "
            f"({type(error).__name__}: {error}); upload it again."
        ) from error


def _known(
    record: FileRecord, infos: Mapping[str, FileInfo], artifacts: PurePosixPath
) -> FileRecord:
    """A file's record with what the platform knows of it; CheckpointError where they differ."""
    path = str(artifacts / record.name)
    if path not in infos:
        raise CheckpointError(f"{path} is missing in the team files; upload it again.")
    size = infos[path].sizeb or 0
    if record.size not in (-1, size):
        raise CheckpointError(
            f"{path} has {size} bytes in the team files instead of {record.size}; upload it again."
        )
    stored = _hex_of(infos[path].hash)
    if None not in (record.sha256, stored) and record.sha256 != stored:
        raise CheckpointError(
            f"{path} was changed in the team files since it was uploaded; upload it again."
        )
    return FileRecord(record.name, size, sha256=record.sha256 or stored)


def _hex_of(platform_hash: object) -> str | None:
    """The platform's hash of a file, base64 of SHA-256, in hex; None where it is none."""
    try:
        digest = base64.b64decode(str(platform_hash), validate=True)
    except ValueError:
        return None
    return digest.hex() if len(digest) == hashlib.sha256().digest_size else None


def _bring(
    api: sly.Api,
    team_id: int,
    path: str,
    record: FileRecord,
    target: Path,
    tell: Callable[[int], None],
) -> None:
    """One file, unless it is there already; a kill leaves the whole file or none."""
    if record.sha256 and target.is_file() and fault_of(target, record, with_hash=True) is None:
        tell(record.size)
        return

    def once(part: Path) -> None:
        done = 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            tell(done)

        api.file.download(team_id, path, str(part), progress_cb=count)
        fault = fault_of(part, record, with_hash=record.sha256 is not None)
        if fault is not None:
            raise TransferError(f"{path} {fault} when it is downloaded; upload it again.")

    with _part_of(target) as part:
        _tried(partial(once, part))
        os.replace(part, target)


@contextmanager
def _part_of(target: Path) -> Iterator[Path]:
    """A file to download into, locked for so long: one that is not was left by a killed process."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Two requests may ask for the same model at once.
    part = target.with_name(f"{target.name}.{os.getpid()}-{threading.get_ident()}{_PART}")
    try:
        if sys.platform == "win32":
            # An open file can neither be moved nor removed there.
            yield part
        else:
            with part.open("wb") as stream:
                _locked(stream.fileno())
                yield part
    finally:
        part.unlink(missing_ok=True)


def _locked(descriptor: int) -> bool:
    """Locks an open file, where nobody else has; the system lets go when the process ends."""
    if sys.platform != "win32":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def remove_superseded(fetched: Fetched, home: Path) -> None:
    """Removes the earlier versions of a fine-tune that answers now, and what downloads left.

    What is being downloaded stays, also by another process. A disk that fails is logged.
    """
    version = fetched.folder.parent
    try:
        for earlier in list(version.parent.iterdir()):
            is_version = (
                _VERSION.fullmatch(earlier.name) and (earlier / fetched.folder.name).is_dir()
            )
            if not is_version or earlier == version:
                continue
            if not any(map(_is_written, earlier.rglob(f"*{_PART}"))):
                logger.info("%s is removed: a newer version of it is deployed", earlier)
                shutil.rmtree(earlier)
        for part in list(home.rglob(f"*{_PART}")):
            if not _is_written(part):
                part.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("What %s takes the place of is not removed: %s", version, error)


def _is_written(part: Path) -> bool:
    try:
        with part.open("rb") as stream:
            return not _locked(stream.fileno())
    except OSError:
        # Done meanwhile, or nobody's to read.
        return True


def asked_once(api: sly.Api) -> sly.Api:
    """The same platform for calls that are tried again here."""
    return sly.Api(api.server_address, api.token, retry_count=1, retry_sleep_sec=0)


def _tried(work: Callable[[], Result]) -> Result:
    """Once more, and once more, after a failure of the platform or a transfer that is not whole."""
    for wait_s in _WAITS_S:
        try:
            return work()
        except Exception as error:
            if platform_failure(error) is None and not isinstance(error, TransferError):
                raise
            logger.warning("%s Trying again in %g s.", error, wait_s)
            time.sleep(wait_s)
    return work()


def write_text(api: sly.Api, team_id: int, path: str, text: str) -> None:
    """A file of the team with this text; raises what the SDK raises where the platform fails."""
    once = asked_once(api)
    with TemporaryDirectory() as folder:
        local = Path(folder) / PurePosixPath(path).name
        local.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
        _tried(partial(once.file.upload, team_id, str(local), path))


def read_text(api: sly.Api, team_id: int, path: str) -> str | None:
    """The text of one file of the team, None where there is none; otherwise as ``write_text``."""
    once = asked_once(api)

    def read() -> str | None:
        try:
            answer = once.post("file-storage.download", {"teamId": team_id, "path": path})
        except requests.HTTPError as error:
            # Neither status is of missing files alone: as for the SDK, its list says what is there.
            is_refused = status_of(error) in (400, 404)
            if is_refused and not once.file.exists(team_id, path):
                return None
            raise
        content: bytes = answer.content
        return content.decode("utf-8", "replace")

    return _tried(read)


def read_texts(api: sly.Api, team_id: int, folder: str, beginning: str = "") -> dict[str, str]:
    """The text of every file of JSON, or JSON lines, below a folder whose name has this
    ``beginning``, by path, in their order."""
    listed = api.file.list(team_id, f"{folder}/", recursive=True, return_type="fileinfo")
    paths = sorted(
        info.path
        for info in listed
        if info.path.endswith((".json", ".jsonl"))
        and info.path.rpartition("/")[2].startswith(beginning)
    )
    return read_files(api, team_id, paths)


def read_files(api: sly.Api, team_id: int, paths: Sequence[str]) -> dict[str, str]:
    """The text of each of these files, by path; all of them are there."""

    def read(path: str) -> str:
        answer = api.post("file-storage.download", {"teamId": team_id, "path": path})
        content: bytes = answer.content
        return content.decode("utf-8", "replace")

    with ThreadPoolExecutor(_LISTING_THREADS) as threads:
        texts = threads.map(lambda path: _tried(partial(read, path)), paths)
        return dict(zip(paths, texts, strict=True))


def api_of_environment() -> sly.Api:
    """The platform of the environment or ``~/supervisely.env``; RequestError."""
    _load_environment()
    if not (os.environ.get("SERVER_ADDRESS") and os.environ.get("API_TOKEN")):
        raise RequestError(
            "A project of the platform needs its address and a token, and SERVER_ADDRESS or "
            "API_TOKEN is not set; set them in the environment or in ~/supervisely.env."
        )
    return sly.Api.from_env()


def platform_of_environment(team_id: int | None = None) -> tuple[sly.Api, int]:
    """The platform and the team of the environment or ``~/supervisely.env``; RequestError."""
    _load_environment()
    team_id = team_id or sly.env.team_id(raise_not_found=False)
    if not (os.environ.get("SERVER_ADDRESS") and os.environ.get("API_TOKEN") and team_id):
        raise RequestError(
            "Uploading needs a platform and a team, and SERVER_ADDRESS, API_TOKEN or TEAM_ID is "
            "not set; set them in the environment or in ~/supervisely.env."
        )
    return sly.Api.from_env(), team_id


def _load_environment() -> None:
    if os.path.isfile(env := os.path.expanduser("~/supervisely.env")):
        load_dotenv(env)


def upload_experiment(
    api: sly.Api, team_id: int, folder: Path, progress: ProgressCallback | None = None
) -> str:
    """Uploads what ``write_experiment`` wrote; returns the path of its checkpoint in team files.

    What is there already, by its hash, is not uploaded again, so an upload that broke off goes on.
    ``experiment_info.json`` comes last: only a whole experiment is listed. Raises CheckpointError
    where a file is not there as it is here, and what the SDK raises where the platform fails.
    """
    experiment = experiment_of(read_training(folder / INFO_NAME), str(folder / INFO_NAME))
    artifacts = PurePosixPath(experiment.info.artifacts_dir)
    # Where the SDK tries again, it sends what is left of the body, nothing, and waits for ever.
    once = asked_once(api)
    infos = _tried(partial(_infos_in, once, team_id, artifacts))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files.sort(key=lambda path: path.name == INFO_NAME)
    total, done = sum(path.stat().st_size for path in files), 0
    for path in files:
        inner = path.relative_to(folder).as_posix()
        record = FileRecord(inner, path.stat().st_size, sha256=file_sha256(path))
        known = infos.get(str(artifacts / inner))
        if known is None or not _agrees(known, record):

            def tell(count: int, file: str = inner, before: int = done) -> None:
                if progress is not None:
                    progress(ProgressUpdate(file, before + count, total))

            _tried(partial(_send, once, team_id, path, str(artifacts / inner), record, tell))
        done += record.size
        if progress is not None:
            progress(ProgressUpdate(inner, done, total))
    return str(artifacts / experiment.info.checkpoints[0])


def _send(
    api: sly.Api,
    team_id: int,
    path: Path,
    remote: str,
    record: FileRecord,
    tell: Callable[[int], None],
) -> None:
    done = 0

    def count(size: int) -> None:
        nonlocal done
        # The form around the file counts too.
        done = min(done + size, record.size)
        tell(done)

    info = api.file.upload(team_id, str(path), remote, progress_cb=count)
    if not _agrees(info, record):
        raise TransferError(
            f"{remote} arrived with {info.sizeb} bytes or another hash, and {path} has "
            f"{record.size}; upload it again."
        )


def _agrees(info: FileInfo, record: FileRecord) -> bool:
    """Whether the platform has this very file, by its hash, or by its size where it has none."""
    found = _hex_of(info.hash)
    return info.sizeb == record.size if found is None else found == record.sha256

"""Files from a model hub: listed, resumed where a transfer broke off, verified before use.

What the hub's refusals mean for the person who asked is said here too, one sentence each.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from florence2.checkpoint.files import (
    CONFIG,
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    choose_files,
    fault_of,
)
from florence2.errors import CheckpointError, HubUnreachableError

_log = logging.getLogger(__name__)


PLAN_NAME: Final = f"{MANIFEST_NAME}.part"

STALL_WAIT_S: Final = 1.0
_MAX_STALLS: Final = 3
_PASSING_STATUSES: Final = (408, 429, 500, 502, 503, 504)
_BLOCK_BYTES: Final = 1024 * 1024
_BYTES_PER_MB: Final = 1_000_000
_FULL_DISK: Final = (errno.ENOSPC, errno.EDQUOT)
_TRUE: Final = ("1", "on", "yes", "true")


def megabytes(size: int) -> str:
    """A size in bytes as people read it: ``"3.4 MB"``, and ``"200 bytes"`` of a small one."""
    return f"{size / _BYTES_PER_MB:.1f} MB" if size >= _BYTES_PER_MB // 10 else f"{size} bytes"


@dataclass(frozen=True, slots=True)
class ProgressUpdate:
    """How far a download is. The two counts are bytes over all files of the checkpoint."""

    file: str
    done_bytes: int
    total_bytes: int


ProgressCallback = Callable[[ProgressUpdate], None]


def hub_endpoint() -> str:
    """The hub's address: ``HF_ENDPOINT`` as it is now, else the client's default."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def is_offline(offline: bool | None) -> bool:
    """Whether the hub must not be asked: the argument, else ``HF_HUB_OFFLINE``."""
    if offline is not None:
        return offline
    return constants.is_offline_mode() or os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE


def list_checkpoint(repository: str, revision: str) -> Manifest:
    """The files of a checkpoint in a repository, with the commit, sizes and hashes.

    Raises HubUnreachableError without an answer; CheckpointError if the hub refuses or the
    repository is not a checkpoint with full weights.
    """
    endpoint = hub_endpoint()
    try:
        info = HfApi(endpoint=endpoint).model_info(
            repository,
            revision=revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
    except HfHubHTTPError as error:
        raise _refused(error, repository, revision) from error
    # The last three are what the client makes of an answer that is not a hub's.
    except (
        httpx2.HTTPError,
        httpx2.InvalidURL,
        OfflineModeIsEnabled,
        ValueError,
        KeyError,
        TypeError,
    ) as error:
        _log.info("No usable answer from %s for %s: %r", endpoint, repository, error)
        raise HubUnreachableError(
            f"The hub at {endpoint} cannot be reached for {repository}; check the connection, or "
            "the address in HF_ENDPOINT."
        ) from error
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    names = choose_files(siblings, f"The repository {repository}@{revision}")
    records = tuple(_as_record(siblings[name]) for name in names)
    unknown = [r.name for r in records if r.size < 0 or not (r.sha256 or r.git_sha1)]
    if info.sha is None or unknown:
        raise CheckpointError(
            f"The hub at {endpoint} gives no commit, size or hash for {unknown or [CONFIG]} of "
            f"{repository}, so nothing can be verified; use another address in HF_ENDPOINT."
        )
    return Manifest(repository, info.sha, records)


def _as_record(sibling: RepoSibling) -> FileRecord:
    if sibling.lfs is not None:
        return FileRecord(sibling.rfilename, sibling.lfs.size, sha256=sibling.lfs.sha256)
    size = -1 if sibling.size is None else sibling.size
    return FileRecord(sibling.rfilename, size, git_sha1=sibling.blob_id)


def _refused(error: HfHubHTTPError, repository: str, revision: str) -> CheckpointError:
    """The hub answered a request with an error status."""
    endpoint, status = hub_endpoint(), error.response.status_code
    _log.info("%s refused %s@%s: HTTP %s: %s", endpoint, repository, revision, status, error)
    if status >= 500:
        return HubUnreachableError(
            f"The hub at {endpoint} answers {repository} with HTTP {status}, a fault of its own; "
            "try again later."
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(
            f"{repository} has no revision {revision!r} at {endpoint}; name a branch, tag or "
            "commit that it has."
        )
    if isinstance(error, GatedRepoError):
        return CheckpointError(
            f"{repository} at {endpoint} is gated (HTTP {status}); accept its terms on its page "
            "and set HF_TOKEN to a token of that account."
        )
    if status in (401, 403):
        return CheckpointError(
            f"The hub at {endpoint} refuses access to {repository} (HTTP {status}), which is "
            "private or does not exist; check the name, or set HF_TOKEN to a token that may read "
            "it."
        )
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return CheckpointError(
            f"{repository} at revision {revision} is not found at {endpoint} (HTTP {status}); "
            "check the name, or set HF_TOKEN if it is private."
        )
    return CheckpointError(
        f"The hub at {endpoint} refuses {repository} with HTTP {status}; try again later, or "
        "place the files by hand."
    )


def cannot_write(folder: Path, error: OSError) -> CheckpointError:
    """The machine's own fault: a full disk, a folder without the right to write."""
    _log.info("Writing in %s: %r", folder, error)
    if error.errno in _FULL_DISK:
        return CheckpointError(
            f"The disk of {folder} is full; make room and run the same command again, and the "
            "download goes on where it stopped."
        )
    return CheckpointError(
        f"The checkpoint cannot be stored in {folder} ({error.strerror or error}); make that "
        "folder writable, or name another cache folder."
    )


class Download:
    """Makes ``folder`` hold a manifest's files, fetching only what is not there and whole.

    ``progress`` is called with growing counts that end at the total, and never go back though a
    damaged file is fetched again; what it raises ends the download, to be resumed later.
    """

    def __init__(
        self, manifest: Manifest, folder: Path, progress: ProgressCallback | None = None
    ) -> None:
        self._manifest = manifest
        self._folder = folder
        self._progress = progress
        self._total_bytes = sum(record.size for record in manifest.files)
        self._done_by_file: dict[str, int] = {}
        self._reported_bytes = -1

    def run(self) -> None:
        """Returns once all is there; the manifest appears last, so a folder with one is complete.

        Raises CheckpointError: connection, refusal, full disk, a file that arrives damaged twice.
        """
        folder = self._folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
            self._manifest.write(folder / PLAN_NAME)
            missing = [record for record in self._manifest.files if not self._is_there(record)]
            needed = sum(record.size - _size_of(self._part(record)) for record in missing)
            free = shutil.disk_usage(folder).free
            if needed > free:
                raise CheckpointError(
                    f"The download needs {megabytes(needed)} in {folder} and {megabytes(free)} "
                    "are free; make room, or name another cache folder."
                )
            for record in missing:
                self._fetch_verified(record)
            os.replace(folder / PLAN_NAME, folder / MANIFEST_NAME)
        except OSError as error:
            raise cannot_write(folder, error) from error

    def _part(self, record: FileRecord) -> Path:
        return self._folder / f"{record.name}.part"

    def _report(self, file: str, done_bytes: int) -> None:
        self._done_by_file[file] = done_bytes
        done = min(sum(self._done_by_file.values()), self._total_bytes)
        if self._progress is not None and done > self._reported_bytes:
            self._reported_bytes = done
            self._progress(ProgressUpdate(file, done, self._total_bytes))

    def _is_there(self, record: FileRecord) -> bool:
        if fault_of(self._folder / record.name, record, with_hash=True) is not None:
            return False
        self._report(record.name, record.size)
        return True

    def _fetch_verified(self, record: FileRecord) -> None:
        part, repository = self._part(record), self._manifest.repository
        fault: str | None = None
        for attempt in range(2):
            if attempt > 0 or not self._take_from_client_cache(record, part):
                self._transfer(record, part)
            fault = fault_of(part, record, with_hash=True)
            if fault is None:
                os.replace(part, self._folder / record.name)
                self._report(record.name, record.size)
                return
            _log.warning("%s from %s %s; removed", record.name, repository, fault)
            part.unlink(missing_ok=True)
        raise CheckpointError(
            f"{record.name} of {repository} {fault} after two downloads from {hub_endpoint()}; "
            "check the connection or proxy in between, or use another address in HF_ENDPOINT."
        )

    def _take_from_client_cache(self, record: FileRecord, part: Path) -> bool:
        """Uses the file that another program had the client fetch; it is verified all the same."""
        manifest = self._manifest
        cached = try_to_load_from_cache(
            manifest.repository, record.name, revision=manifest.revision
        )
        if not isinstance(cached, str) or _size_of(Path(cached)) != record.size:
            return False
        part.unlink(missing_ok=True)
        try:
            os.link(Path(cached).resolve(), part)
        except OSError:
            shutil.copyfile(cached, part)
        return True

    def _transfer(self, record: FileRecord, part: Path) -> None:
        """Receives the rest of one file; breaks are survived as long as new bytes arrive."""
        repository, revision = self._manifest.repository, self._manifest.revision
        part.touch()
        stalls = 0
        while (have := _size_of(part)) != record.size:
            try:
                self._receive(record, part)
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status == httpx2.codes.RANGE_NOT_SATISFIABLE:
                    part.unlink(missing_ok=True)
                elif status not in _PASSING_STATUSES:
                    raise _refused(error, repository, revision) from error
            except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
                _log.warning("%s of %s broke off: %r", record.name, repository, error)
            now = _size_of(part)
            if now > record.size:
                return
            stalls = 0 if now > have else stalls + 1
            if stalls == _MAX_STALLS:
                raise CheckpointError(
                    f"The download of {record.name} from {repository} keeps breaking off at "
                    f"{megabytes(now)} of {megabytes(record.size)}; run the same command again, "
                    "and it goes on from there."
                )
            if now != record.size:
                time.sleep(STALL_WAIT_S)

    def _receive(self, record: FileRecord, part: Path) -> None:
        have = _size_of(part)
        if have > record.size:
            part.unlink()
            have = 0
        # Compressed transfer would make the byte counts of a resumed file meaningless.
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        url = hf_hub_url(
            self._manifest.repository,
            record.name,
            revision=self._manifest.revision,
            endpoint=hub_endpoint(),
        )
        with http_stream_backoff(
            "GET",
            url,
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=(),
            retry_on_status_codes=_PASSING_STATUSES,
            max_retries=2,
        ) as response:
            hf_raise_for_status(response)
            is_rest = have > 0 and response.status_code == httpx2.codes.PARTIAL_CONTENT
            with part.open("ab" if is_rest else "wb") as stream:
                for block in response.iter_bytes(_BLOCK_BYTES):
                    stream.write(block)
                    self._report(record.name, min(stream.tell(), record.size))
                    if stream.tell() > record.size:
                        break


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

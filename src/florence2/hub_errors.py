"""What the hub's refusals mean for the person who asked for a checkpoint, one sentence each."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Final

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from florence2.errors import CheckpointError

_FULL_DISK: Final = (errno.ENOSPC, errno.EDQUOT)
_BYTES_PER_MB: Final = 1_000_000

_log = logging.getLogger(__name__)


class HubUnreachableError(CheckpointError):
    """The hub gave no answer at all; what is on this machine may still be enough."""


def megabytes(size: int) -> str:
    """A size in bytes as people read it: ``"3.4 MB"``, and ``"200 bytes"`` of a small one."""
    return f"{size / _BYTES_PER_MB:.1f} MB" if size >= _BYTES_PER_MB // 10 else f"{size} bytes"


def unreachable(endpoint: str, repository: str, error: Exception) -> HubUnreachableError:
    """No connection to the hub, or an answer that is not a hub's."""
    _log.info("No usable answer from %s for %s: %r", endpoint, repository, error)
    return HubUnreachableError(
        f"The hub at {endpoint} cannot be reached for {repository}; check the connection, or the "
        "address in HF_ENDPOINT."
    )


def refused(
    error: HfHubHTTPError, endpoint: str, repository: str, revision: str
) -> CheckpointError:
    """The hub answered a request with an error status."""
    status = error.response.status_code
    _log.info("%s refused %s@%s: HTTP %s: %s", endpoint, repository, revision, status, error)
    if status >= 500:
        return HubUnreachableError(
            f"The hub at {endpoint} answers {repository} with HTTP {status}, a fault of its own; "
            "try again later."
        )
    return CheckpointError(_refusal(error, status, endpoint, repository, revision))


def _refusal(
    error: HfHubHTTPError, status: int, endpoint: str, repository: str, revision: str
) -> str:
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{repository} has no revision {revision!r} at {endpoint}; name a branch, tag or "
            "commit that it has."
        )
    if isinstance(error, GatedRepoError):
        return (
            f"{repository} at {endpoint} is gated (HTTP {status}); accept its terms on its page "
            "and set HF_TOKEN to a token of that account."
        )
    if status in (401, 403):
        return (
            f"The hub at {endpoint} refuses access to {repository} (HTTP {status}), which is "
            "private or does not exist; check the name, or set HF_TOKEN to a token that may read "
            "it."
        )
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return (
            f"{repository} at revision {revision} is not found at {endpoint} (HTTP {status}); "
            "check the name, or set HF_TOKEN if it is private."
        )
    return (
        f"The hub at {endpoint} refuses {repository} with HTTP {status}; try again later, or "
        "place the files by hand."
    )


def interrupted(file: str, repository: str, have: int, size: int) -> CheckpointError:
    """The connection broke again and again while a file was being received."""
    return CheckpointError(
        f"The download of {file} from {repository} keeps breaking off at {megabytes(have)} of "
        f"{megabytes(size)}; run the same command again, and it goes on from there."
    )


def no_room(folder: Path, needed: int, free: int) -> CheckpointError:
    """Known before the transfer starts."""
    return CheckpointError(
        f"The download needs {megabytes(needed)} in {folder} and {megabytes(free)} are free; "
        "make room, or name another cache folder."
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

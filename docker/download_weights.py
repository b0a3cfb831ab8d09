"""Downloads checkpoints into an image while it is built; the build stops if one is not whole.

    python3 docker/download_weights.py [NAMES]

``NAMES`` are parted by spaces, as one argument or several; none stands for the four published
checkpoints. They land in ``FLORENCE2_CACHE`` and are verified by size and hash. Exit codes: 0 every
checkpoint is there, 1 at least one is not.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from florence2.checkpoint.catalog import KNOWN_CHECKPOINTS, default_cache_dir, resolve
from florence2.errors import FlorenceError

_log = logging.getLogger("download_weights")


def main(arguments: Sequence[str]) -> int:
    """Tries every name, so that one run shows all that is wrong, and returns the exit code."""
    names = " ".join(arguments).split() or [known.name for known in KNOWN_CHECKPOINTS]
    failed = [name for name in names if not _download(name)]
    if failed:
        _log.error("Not in the image: %s.", ", ".join(failed))
        return 1
    _log.info("In %s: %s.", default_cache_dir(), ", ".join(names))
    return 0


def _download(name: str) -> bool:
    _log.info("%s: downloading", name)
    try:
        # What an earlier layer left behind is hashed as well, not only what arrives now.
        files = resolve(name, offline=False, verify="full")
    except FlorenceError as error:
        _log.error("%s: %s", name, error)
        return False
    size = sum((files.folder / file).stat().st_size for file in files.files)
    _log.info("%s: %.2f GB, verified, in %s", name, size / 1e9, files.folder)
    return True


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    sys.exit(main(sys.argv[1:]))

"""How much memory this process may use: the machine's, or less in a container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

# Where nothing says how much there is.
_ASSUMED_BYTES: Final = 8 * 2**30
_V2_FILE: Final = "memory.max"
_V1_FILE: Final = "memory.limit_in_bytes"


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """The machine's memory, or the least that a control group above this process allows.

    ``root`` is where ``proc`` and ``sys`` are.
    """
    return min([_machine_bytes(), *_limits(root)])


def _machine_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Some systems have neither the call nor the names.
    except (AttributeError, ValueError, OSError):
        return _ASSUMED_BYTES


def _limits(root: Path) -> Iterator[int]:
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="ascii", errors="replace")
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for line in groups.splitlines():
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if not kinds:
            yield from _on_the_way(mounted, path, _V2_FILE)
        elif "memory" in kinds.split(","):
            yield from _on_the_way(mounted / "memory", path, _V1_FILE)


def _on_the_way(mounted: Path, path: str, name: str) -> Iterator[int]:
    """The limits of a group and of all that contain it.

    In a container the path may be the host's, while its own group is mounted at the top.
    """
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    for depth in range(len(parts) + 1):
        try:
            text = mounted.joinpath(*parts[:depth], name).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        # "max" is no limit; of v1, a number larger than any machine.
        if text.isdecimal() and int(text) > 0:
            yield int(text)

"""Files that lie where others should: a pointer to large content, a web page in its place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_HEAD_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class StandIn:
    """What a file is instead, as in "is a web page", and what to do about it."""

    is_what: str
    remedy: str


_POINTER: Final = StandIn(
    "is a Git LFS pointer, not the file itself", "run `git lfs pull` where it was cloned"
)
_SIGNS: Final = (
    (re.compile(rb"version https://(?:git-lfs|hawser)\.github\.com/spec/"), _POINTER),
    (
        re.compile(rb"(?:\.\./)*(?:\.git)?/annex/objects/"),
        StandIn("is a git-annex pointer, not the file itself", "run `git annex get` on it"),
    ),
    (
        re.compile(
            rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*\?>\s*)?(?:<!--.*?-->\s*)?"
            rb"<(?:!doctype html|html|head|error)\b",
            re.IGNORECASE | re.DOTALL,
        ),
        StandIn(
            "is a web page, not the file itself",
            "fetch it again with the address of the file, signed in if it asks for that",
        ),
    ),
)


def stand_in(head: bytes) -> StandIn | None:
    """What a file that begins with ``head`` stands in for another as; None for anything else."""
    return next((what for sign, what in _SIGNS if sign.match(head)), None)


def stand_in_at(path: Path) -> StandIn | None:
    """``stand_in`` of a file; OSError when it cannot be opened."""
    with path.open("rb") as stream:
        return stand_in(stream.read(_HEAD_BYTES))

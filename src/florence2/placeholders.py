"""Files that lie where others should: a Git LFS or git-annex pointer, a web page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

HEAD_BYTES: Final = 1024
"""So much of a file tells a placeholder."""


@dataclass(frozen=True, slots=True)
class Placeholder:
    """What a file is instead, as in "is a web page", and what to do about it."""

    is_what: str
    remedy: str


_SIGNS: Final = (
    (
        re.compile(rb"version https://(?:git-lfs|hawser)\.github\.com/spec/"),
        Placeholder(
            "is a Git LFS pointer, not the file itself", "run `git lfs pull` where it was cloned"
        ),
    ),
    (
        re.compile(rb"(?:\.\./)*(?:\.git)?/annex/objects/"),
        Placeholder("is a git-annex pointer, not the file itself", "run `git annex get` on it"),
    ),
    (
        re.compile(
            rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*\?>\s*)?(?:<!--.*?-->\s*)?"
            rb"<(?:!doctype html|html|head|error)\b",
            re.IGNORECASE | re.DOTALL,
        ),
        Placeholder(
            "is a web page, not the file itself",
            "fetch it again with the address of the file, signed in if it asks for that",
        ),
    ),
)


def find_placeholder(head: bytes) -> Placeholder | None:
    """What a file that begins with ``head`` stands for another as; None for anything else."""
    return next((what for sign, what in _SIGNS if sign.match(head)), None)

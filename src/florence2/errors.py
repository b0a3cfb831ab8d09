"""Errors a caller can act on.

``FlorenceError``            anything this package raises on purpose; its text is one plain
                             sentence: the rule, the value received, what to do
├── RequestError             the caller's task, prompt, region or setting is wrong
├── ImageError               an image cannot be read or is outside the limits
├── CheckpointError          a checkpoint is missing, damaged, or does not answer
└── DeviceError              a device or runtime cannot be used here
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FlorenceError(Exception):
    """Base of the errors whose text is meant for the person who made the request."""

    code = "error"


class RequestError(FlorenceError):
    """The request breaks a rule; sending it again unchanged fails again."""

    code = "bad_request"


class ImageError(FlorenceError):
    """The image cannot be read, or is larger than the limits allow."""

    code = "bad_image"


class CheckpointError(FlorenceError):
    """The checkpoint's files are missing, damaged, of an unknown layout, or give no answer."""

    code = "bad_checkpoint"


class DeviceError(FlorenceError):
    """The device or the runtime asked for is not available on this machine."""

    code = "bad_device"


def unknown_name(kind: str, received: str, known: Iterable[str]) -> str:
    """One sentence for a name that is not in a closed set, with the nearest known name."""
    choices = list(known)
    lowered = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(received.lower(), lowered, n=1, cutoff=0.5)
    hint = f" Did you mean {lowered[near[0]]!r}?" if near else ""
    return f"Unknown {kind} {received!r}.{hint} Known: {', '.join(choices)}."

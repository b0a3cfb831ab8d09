"""Errors a caller can act on: the text of each is one plain sentence, with the rule, the value
received and what to do; its ``code`` is the name that programs know it by.
"""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar


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


class HubUnreachableError(CheckpointError):
    """The hub gave no answer at all; what is on this machine may still be enough."""


class PrecisionError(CheckpointError):
    """The checkpoint gives NaN or infinity in reduced precision; in float32 it may answer."""


class DeviceError(FlorenceError):
    """The device or the runtime asked for is not available on this machine."""

    code = "bad_device"


class DeviceLostError(FlorenceError):
    """The device failed so that it answers nothing more to this process."""

    code = "device_lost"


class OutOfMemoryError(FlorenceError):
    """One request alone does not fit into memory."""

    code = "out_of_memory"


class NotFiniteError(FlorenceError):
    """The network gave no finite numbers for one prompt, so there is no answer to it."""

    code = "not_finite"
    token_ids: tuple[int, ...] = ()  # as an Answer of nothing


class GenerationCancelledError(FlorenceError):
    """The caller no longer waits for the answer."""

    code = "cancelled"


class DeadlineError(FlorenceError):
    """The time that the caller gave was over before the answer was there."""

    code = "deadline"


class InternalError(FlorenceError):
    """A fault of this program; its trace is in the log."""

    code = "internal_error"

    def __init__(self) -> None:
        super().__init__(
            "An answer failed because of a fault in this program, which its log describes; send "
            "the request again or report it."
        )


class QueueFullError(FlorenceError):
    """Too many asks wait already; ``retry_after_s`` is about when they will be answered."""

    code = "queue_full"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoppedError(FlorenceError):
    """The scheduler was closed: its checkpoint is no longer deployed."""

    code = "not_deployed"


def stopped() -> StoppedError:
    """The error of everyone who waits when the scheduler is closed, or comes later."""
    return StoppedError(
        "No checkpoint is deployed any more, so the request was not answered; deploy one and send "
        "it again."
    )


class NoRoomError(FlorenceError):
    """There was no room in time; the same request can succeed later."""

    code = "no_room"
    retry_after_s = 5.0


class LibraryError(FlorenceError, ImportError):
    """An installed package cannot be imported for want of a system library."""

    code = "missing_library"


# What OpenCV's and the SDK's wheels take from the system, by Debian's package.
_DEBIAN_PACKAGES: Final = {
    "libGL.so": "libgl1",
    "libGLX.so": "libgl1",
    "libxcb.so": "libxcb1",
    "libglib-2.0.so": "libglib2.0-0",
    "libgthread-2.0.so": "libglib2.0-0",
    "libmagic": "libmagic1",
}


_LIBRARY: Final = re.compile(
    r"lib[\w.+-]+(?=: cannot open shared object file)|(?<=failed to find )libmagic"
)


@contextmanager
def naming_libraries() -> Iterator[None]:
    """Around an import: what a missing system library makes of it is a LibraryError."""
    try:
        yield
    except ImportError as error:
        found = _LIBRARY.search(str(error))
        if found is None:
            raise
        library = found[0]
        package = next(
            (name for start, name in _DEBIAN_PACKAGES.items() if library.startswith(start)), None
        )
        advice = f"the package {package} on Debian and Ubuntu" if package else "its package"
        raise LibraryError(
            f"A package needs the system library {library}, which this machine lacks; install "
            f"{advice} (everything the app needs: apt-get install libgl1 libglib2.0-0 libmagic1)."
        ) from error


Error = TypeVar("Error", bound=BaseException)


def as_value(error: Error) -> Error:
    """``error`` to be handed on as a value: without the tracebacks of itself and its causes.

    A traceback holds the variables of its frames and of all their callers: pixels, features, a
    decoding session with its keys and values. They would live until the garbage collector ran.
    """
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop()
        if link is not None and link.__traceback__ is not None:
            link.__traceback__ = None
            chain += [link.__cause__, link.__context__]
    return error


def shown(value: object) -> str:
    """A received value in one short line, for a message."""
    return " ".join(reprlib.repr(value).split())


def shown_s(seconds: float) -> str:
    """A duration as people say it: ``"250 ms"``, ``"2.5 s"``, ``"3 min 20 s"``, ``"2 h 5 min"``."""
    if math.isinf(seconds):
        return "any time"
    if seconds < 0.9995:
        return f"{round(1000 * seconds)} ms" if seconds >= 0.001 else "less than 1 ms"
    if seconds < 59.95:
        return f"{round(seconds, 1):g} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s} s" if rest_s else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def unknown_name(kind: str, received: str, known: Iterable[str]) -> str:
    """One sentence for a name that is not in a closed set, with the nearest known name."""
    choices = list(known)
    lowered = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(received.lower(), lowered, n=1, cutoff=0.5)
    hint = f" Did you mean {lowered[near[0]]!r}?" if near else ""
    return f"Unknown {kind} {received!r}.{hint} Known: {', '.join(choices)}."

"""Why a request at the scheduler has no answer."""

from __future__ import annotations

from florence2.errors import FlorenceError


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

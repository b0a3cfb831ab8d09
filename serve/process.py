"""The process of the app: how its threads wait, how it starts on the platform, and how it ends."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Final, NoReturn, TypeVar

from florence2.errors import FlorenceError

logger = logging.getLogger(__name__)


# By default a thread that waits turns in a loop for milliseconds. Where other programs want the
# cores too, it waits for one that is not running, and takes the core that this one needs: labeling
# took ten times as long. So beside others it sleeps at once, which is also how it comes first when
# it wakes. Alone it turns long enough to bridge two operations: falling asleep between them costs a
# third of a decoder step's speed. The names are those of GNU's library (Linux) and of LLVM's and
# Intel's (in milliseconds).
_ALONE: Final = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
_BESIDE_OTHERS: Final = {"GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
_CHOSEN_BY_USER: Final = "OMP_WAIT_POLICY"

_CHOSEN_COUNT: Final = "OMP_NUM_THREADS"
_SMALL_D_MODEL: Final = 512

LOADAVG: Final = "/proc/loadavg"
_LOOKS: Final = 5
_BETWEEN_LOOKS_S: Final = 0.01


def bound_spinning() -> None:
    """Must come before torch is imported; what the environment says already stays."""
    if _CHOSEN_BY_USER not in os.environ:
        for name, value in (_BESIDE_OTHERS if is_machine_busy() else _ALONE).items():
            os.environ.setdefault(name, value)


def leave_cores_to_others(d_model: int) -> None:
    """One thread for a small network beside others: two gain little, and wait for each other."""
    if d_model < _SMALL_D_MODEL and _CHOSEN_COUNT not in os.environ and is_machine_busy():
        import torch

        torch.set_num_threads(1)


def is_machine_busy() -> bool:
    """Whether others keep at least half of the cores running, at each of a few looks in a row.

    False where the system does not tell. A load average would be a minute late.
    """
    cores = os.cpu_count() or 1
    for look in range(_LOOKS):
        if look:
            time.sleep(_BETWEEN_LOOKS_S)
        if 2 * _others_running() < cores:
            return False
    return True


def _others_running() -> int:
    """Threads of the whole machine that run or want to, but this one."""
    try:
        with open(LOADAVG, encoding="ascii") as file:
            return int(file.read().split()[3].split("/")[0]) - 1
    except (OSError, ValueError, IndexError):
        return 0


Made = TypeVar("Made")

CANNOT_START: Final = 2
_ENDED: Final = 0
_HELD_UP: Final = 1
_STARTUP_FAILED: Final = "Application startup failed. Exiting."
# Saving the page for offline use, which the SDK does last, may take its time.
_GRACE_S: Final = 120.0
_SAVES_PAGE: Final = ("ContentOrigin", "_upload_offline_session")
# A request may still wait for the platform, which the SDK asks again for minutes.
_REQUEST_GRACE_S: Final = 5.0
_BETWEEN_ENDS_S: Final = 0.2


def start_or_end(make: Callable[[], Made]) -> Made:
    """What ``make`` gives; whatever it raises ends the process, with one sentence last in the log.

    Also ends a process whose server does not come up afterwards, and one that threads hold back.
    """
    server = ServerErrors()
    threading.Thread(target=_see_to_the_end, args=(server,), name="ending", daemon=True).start()
    try:
        made = make()
    except (SystemExit, KeyboardInterrupt):
        raise
    except FlorenceError as error:
        end_process(str(error))
    # Whatever it is: the alternative is a process that looks alive.
    except BaseException as error:  # noqa: BLE001
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        end_process(
            f"The app could not start because of something unexpected ({text}); see above where."
        )
    logging.getLogger("uvicorn.error").addHandler(server)
    return made


class ServerErrors(logging.Handler):
    """What uvicorn says when it gives up before it has served: a port that is taken, above all."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.text: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        # Its other errors are about a request, and it goes on.
        if isinstance(record.msg, OSError) or record.msg == _STARTUP_FAILED:
            self.text = record.getMessage()


def _see_to_the_end(server: ServerErrors) -> None:
    """Waits for the main thread, then for those the SDK leaves behind, but not for ever."""
    threading.main_thread().join()
    if server.text is not None:
        end_process(f"The app could not start because its server did not ({server.text}).")
    if content := sys.modules.get("supervisely.app.content"):
        content.ContentOrigin().stop()
    ended_s = time.monotonic()
    # Where nothing is left, the process ends in between.
    while (after_s := time.monotonic() - ended_s) < _GRACE_S:
        time.sleep(_BETWEEN_ENDS_S)
        if after_s > _REQUEST_GRACE_S and not _is_page_being_saved():
            end_process(
                "The app has ended; what still went on "
                f"{_REQUEST_GRACE_S:.0f} s later was given up.",
                _ENDED,
            )
    end_process(f"The app has ended, but something in it went on for {_GRACE_S:.0f} s.", _HELD_UP)


def _is_page_being_saved() -> bool:
    names = [thread.name for thread in threading.enumerate()]
    return any(part in name for name in names for part in _SAVES_PAGE)


def end_process(sentence: str, status: int = CANNOT_START) -> NoReturn:
    """Ends the process here and now, whatever other threads do; the sentence is its last line."""
    is_platform = os.environ.get("ENV") == "production"
    level = "fatal" if status else "warn"
    line = json.dumps({"message": sentence, "level": level}) if is_platform else sentence
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
    os._exit(status)


def log_like_the_sdk() -> None:
    """Lines of ours with their level, as the platform reads them; nothing else would print them."""
    from serve.sdk import sly

    for name in ("florence2", "serve"):
        own = logging.getLogger(name)
        own.handlers = list(sly.logger.handlers)
        own.setLevel(sly.logger.level)
        own.propagate = False

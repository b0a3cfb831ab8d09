"""The process of the app: how its threads wait, how it starts on the platform, and how it ends."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NoReturn, TypeVar

from florence2.errors import FlorenceError

logger = logging.getLogger(__name__)


Made = TypeVar("Made")

CANNOT_START: Final = 2
_HELD_UP: Final = 1
_STARTUP_FAILED: Final = "Application startup failed. Exiting."
# Saving the page for offline use, which the SDK does last, may take its time.
_GRACE_S: Final = 120.0


def start_or_end(make: Callable[[], Made]) -> Made:
    """What ``make`` gives; whatever it raises ends the process, with one sentence last in the log.

    Also ends a process whose server does not come up afterwards, and one that threads hold back.
    """
    server = _ServerErrors()
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


class _ServerErrors(logging.Handler):
    """What uvicorn says when it gives up before it has served: a port that is taken, above all."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.text: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        # Its other errors are about a request, and it goes on.
        if isinstance(record.msg, OSError) or record.msg == _STARTUP_FAILED:
            self.text = record.getMessage()


def _see_to_the_end(server: _ServerErrors) -> None:
    """Waits for the main thread, then for those the SDK leaves behind, but not for ever."""
    threading.main_thread().join()
    if server.text is not None:
        end_process(f"The app could not start because its server did not ({server.text}).")
    if content := sys.modules.get("supervisely.app.content"):
        content.ContentOrigin().stop()
    time.sleep(_GRACE_S)
    end_process(f"The app has ended, but something in it went on for {_GRACE_S:.0f} s.", _HELD_UP)


def end_process(sentence: str, status: int = CANNOT_START) -> NoReturn:
    """Ends the process here and now, whatever other threads do; the sentence is its last line."""
    is_platform = os.environ.get("ENV") == "production"
    line = json.dumps({"message": sentence, "level": "fatal"}) if is_platform else sentence
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


@contextmanager
def optional_autostart() -> Iterator[None]:
    """Inside, a platform that does not say whether to deploy by itself does not end the start.

    The SDK asks for it while it mounts its routes, and takes an error for the end.
    """
    from supervisely.app.fastapi import subapp

    ask = subapp.set_autostart_flag_from_state

    def asked(default: str | None = None) -> None:
        try:
            ask(default)
        except Exception as error:  # noqa: BLE001 - the SDK and its transport raise what they like
            logger.warning(
                "The platform did not say whether to deploy a model by itself (%s: %s); choose one "
                "on the page and press Serve.",
                type(error).__name__,
                error,
            )

    subapp.set_autostart_flag_from_state = asked
    try:
        yield
    finally:
        subapp.set_autostart_flag_from_state = ask

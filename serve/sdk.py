"""The one door to the Supervisely SDK.

Importing the SDK switches Pillow to accepting damaged files for the whole process: half an image
would then be labeled as if it were whole. Importing it from here switches that back.

The SDK waits for an answer of the platform for ever, also after the connection is gone without a
word, as connections go overnight. Imported from here it gives up after a time, and tries again.

It also imports, by name, every module on the stack of whoever imports it, and a program that runs
under a name that is no module's (a worker of pytest-xdist, for one) would end there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import requests
from PIL import ImageFile
from requests.adapters import HTTPAdapter

from florence2.errors import naming_libraries


@contextmanager
def _importable_stack() -> Iterator[None]:
    frame = sys._getframe()
    names: list[str] = []
    while frame.f_back is not None:
        frame = frame.f_back
        names.append(frame.f_globals.get("__name__", ""))
    strangers = {name: ModuleType(name) for name in names if name not in sys.modules}
    sys.modules.update(strangers)
    try:
        yield
    finally:
        for name in strangers:
            del sys.modules[name]


with naming_libraries(), _importable_stack():
    import supervisely as sly
    from supervisely.annotation.label import LabelingStatus

ImageFile.LOAD_TRUNCATED_IMAGES = False

CONNECT_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 300.0
"""Between two parts of an answer, and before its first."""


class AnswerInTime(HTTPAdapter):
    """The transport of a session, with a limit of time for who named none."""

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,  # noqa: ANN401 - as requests has it
        verify: bool | str = True,
        cert: Any = None,  # noqa: ANN401
        proxies: dict[str, str] | None = None,
    ) -> requests.Response:
        limit_s = (CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S) if timeout is None else timeout
        return super().send(request, stream, limit_s, verify, cert, proxies)


# Every session has its own, and the SDK makes one for every call. Nobody else uses requests here.
requests.sessions.HTTPAdapter = AnswerInTime  # type: ignore[attr-defined]

__all__ = ["LabelingStatus", "sly"]

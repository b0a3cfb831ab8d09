"""The one door to the Supervisely SDK.

Importing the SDK switches Pillow to accepting damaged files for the whole process: half an image
would then be labeled as if it were whole. Importing it from here switches that back.

It also imports, by name, every module on the stack of whoever imports it, and a program that runs
under a name that is no module's (a worker of pytest-xdist, for one) would end there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from PIL import ImageFile

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

__all__ = ["LabelingStatus", "sly"]

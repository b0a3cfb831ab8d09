"""Florence-2: captions, boxes, polygons and text from images and task prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from florence2.api import Florence2
    from florence2.engine.ask import Ask
    from florence2.engine.encoding import EncodedImage
    from florence2.errors import FlorenceError
    from florence2.records import Failure, Region, Result

__all__ = ["Ask", "EncodedImage", "Failure", "Florence2", "FlorenceError", "Region", "Result"]

_HOMES = {
    "Ask": "florence2.engine.ask",
    "EncodedImage": "florence2.engine.encoding",
    "Failure": "florence2.records",
    "Florence2": "florence2.api",
    "FlorenceError": "florence2.errors",
    "Region": "florence2.records",
    "Result": "florence2.records",
}


def __getattr__(name: str) -> object:
    # torch takes a second to import; listing the tasks does not need it.
    if name not in _HOMES:
        raise AttributeError(f"module 'florence2' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)

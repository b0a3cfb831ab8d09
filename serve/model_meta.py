"""The classes and tags that clients are told of before they ask, and those seen since.

Clients keep what they read when they connect, and take a class they were not told of for one of
boxes; so the shapes that cannot be guessed are there from the start.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Final

from serve.predict.naming import FIXED_SHAPES, class_color, clean_class_name
from serve.sdk import sly
from serve.tags import TAG_METAS

MAX_LEARNT: Final = 1000

_GEOMETRIES: Final = {"rectangle": sly.Rectangle, "polygon": sly.Polygon, "bitmap": sly.Bitmap}
_FIXED: Final = tuple(
    sly.ObjClass(name, _GEOMETRIES[shape], class_color(name))
    for name, shape in FIXED_SHAPES.items()
)


class ModelMeta:
    """A growing ``sly.ProjectMeta``; safe to use from any thread.

    At most ``max_learnt`` classes are remembered beside the fixed ones; those seen longest ago go
    first. A class that is seen in a second shape becomes one of any shape, so that every
    annotation that was learnt can be read with a snapshot; a fixed class keeps its shape.
    """

    def __init__(self, max_learnt: int = MAX_LEARNT) -> None:
        self._max_learnt = max_learnt
        self._learnt: dict[str, sly.ObjClass] = {}
        self._lock = threading.Lock()
        self._snapshot: sly.ProjectMeta = _meta_of(())

    def snapshot(self) -> sly.ProjectMeta:
        """All classes and tags as they are now; it never changes."""
        return self._snapshot

    def learn(self, annotation: sly.Annotation) -> None:
        """Adds the classes of an annotation's labels."""
        self._add(label.obj_class for label in annotation.labels)

    def announce(self, names: Iterable[str], geometry: type = sly.Rectangle) -> None:
        """Adds classes before any answer has them; ``names`` are cleaned."""
        cleaned = (clean_class_name(name) for name in names)
        self._add(sly.ObjClass(name, geometry, class_color(name)) for name in cleaned)

    def _add(self, seen: Iterable[sly.ObjClass]) -> None:
        with self._lock:
            before = self._shapes()
            for obj_class in seen:
                if obj_class.name not in FIXED_SHAPES:
                    known = self._learnt.pop(obj_class.name, obj_class)
                    self._learnt[obj_class.name] = _both(known, obj_class)
            while len(self._learnt) > self._max_learnt:
                self._learnt.pop(next(iter(self._learnt)))
            if self._shapes() != before:
                self._snapshot = _meta_of(self._learnt.values())

    def _shapes(self) -> dict[str, type]:
        """To see a change by: to the SDK a class of any shape equals one of a certain shape."""
        return {name: obj_class.geometry_type for name, obj_class in self._learnt.items()}


def _both(known: sly.ObjClass, seen: sly.ObjClass) -> sly.ObjClass:
    if known.geometry_type in (seen.geometry_type, sly.AnyGeometry):
        return known
    return known.clone(geometry_type=sly.AnyGeometry)


def _meta_of(learnt: Iterable[sly.ObjClass]) -> sly.ProjectMeta:
    return sly.ProjectMeta([*_FIXED, *learnt], tag_metas=list(TAG_METAS.values()))

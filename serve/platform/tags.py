"""Tag metas that a project already has with another meaning: ours take another name."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Final

from serve.sdk import sly

DEFAULT_SUFFIX: Final = "_nn"
# Two runs that read a project's meta, add to it and write it back would undo each other's work.
meta_lock: Final = threading.Lock()
_ANYWHERE: Final = sly.TagApplicableTo.ALL


def compatible_tag_meta(
    wanted: sly.TagMeta, project_meta: sly.ProjectMeta, suffix: str | None = None
) -> sly.TagMeta:
    """``wanted``, or as the project has it, or renamed where the project's means something else.

    The first free or equal name of ``confidence``, ``confidence_nn``, ``confidence_nn_2``, ...
    """
    suffix = suffix or DEFAULT_SUFFIX
    name, number = wanted.name, 1
    while True:
        known = project_meta.get_tag_meta(name)
        if known is None:
            return wanted if name == wanted.name else wanted.clone(name=name)
        if _takes(known, wanted):
            return known
        name = wanted.name + suffix + (f"_{number}" if number > 1 else "")
        number += 1


def _takes(known: sly.TagMeta, wanted: sly.TagMeta) -> bool:
    """Whether the project's tag can hold the same values in the same places."""
    if known.value_type != wanted.value_type or known.applicable_classes:
        return False
    if known.value_type == sly.TagValueType.ONEOF_STRING and not set(wanted.possible_values) <= set(
        known.possible_values
    ):
        return False
    return known.applicable_to in (_ANYWHERE, wanted.applicable_to)


def with_compatible_tags(
    annotation: sly.Annotation, project_meta: sly.ProjectMeta, suffix: str | None = None
) -> sly.Annotation:
    """The annotation with each tag that the project would read differently under another name.

    The SDK's ``update_meta_and_ann`` adds the renamed tag to the project but leaves labels with
    the old one, so that numbers are uploaded as text.
    """
    tags = [tag for label in annotation.labels for tag in label.tags] + list(annotation.img_tags)
    metas = {tag.meta.name: compatible_tag_meta(tag.meta, project_meta, suffix) for tag in tags}
    if all(name == meta.name for name, meta in metas.items()):
        return annotation
    labels = [label.clone(tags=_renamed(label.tags, metas)) for label in annotation.labels]
    return annotation.clone(labels=labels, img_tags=_renamed(annotation.img_tags, metas))


def _renamed(tags: Iterable[sly.Tag], metas: dict[str, sly.TagMeta]) -> sly.TagCollection:
    return sly.TagCollection([tag.clone(meta=metas[tag.meta.name]) for tag in tags])

"""Labels that are on the platform already and are to be asked about, with their images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from florence2.engine.ask import AnyImage
from florence2.records import Failure, Region
from serve.existing_regions import regions_from_annotation
from serve.platform.failures import failure_of
from serve.platform.images import Target
from serve.platform.pipeline import Batch
from serve.platform.services import Download
from serve.sdk import sly


@dataclass(frozen=True, slots=True)
class OldTag:
    """A tag that a label has already."""

    tag_id: int | None
    value: object


@dataclass(frozen=True, slots=True)
class LabelTask:
    """One label to ask about. ``old_tags`` are those that an answer replaces."""

    figure_id: int
    region: Region
    old_tags: tuple[OldTag, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ImageTask:
    """One image's labels to ask about; ``num_skipped`` others are tagged already."""

    image: AnyImage | None
    labels: tuple[LabelTask, ...]
    num_skipped: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Which labels: of ``classes``, None being all; tagged ones only to ``overwrite`` them.

    ``tag_names`` is the tag's name in each project, by its id.
    """

    tag_names: dict[int, str]
    classes: frozenset[str] | None
    overwrite: bool


def fetch_labels(
    api: sly.Api, batch: Batch, choice: Choice, download: Download
) -> list[ImageTask | Failure]:
    """What is to be asked about each image. Images without such labels are not downloaded."""
    found: dict[int, ImageTask | Failure] = {
        target.image_id: target.failure for target in batch if target.failure is not None
    }
    groups: dict[int, list[Target]] = defaultdict(list)
    for target in batch:
        if target.dataset_id is not None and target.image_id not in found:
            groups[target.dataset_id].append(target)
    for group in groups.values():
        found.update(_labels_of_dataset(api, group, choice))
    wanted = [
        target
        for target in {one.image_id: one for one in batch}.values()
        if isinstance(task := found[target.image_id], ImageTask) and task.labels
    ]
    images = download(api, [target.info for target in wanted]) if wanted else []
    for target, image in zip(wanted, images, strict=True):
        task = found[target.image_id]
        if isinstance(image, Failure):
            found[target.image_id] = image
        elif isinstance(task, ImageTask):
            found[target.image_id] = ImageTask(image, task.labels, task.num_skipped)
    return [found[target.image_id] for target in batch]


def _labels_of_dataset(
    api: sly.Api, group: Sequence[Target], choice: Choice
) -> dict[int, ImageTask | Failure]:
    ids = [target.image_id for target in group]
    try:
        meta = sly.ProjectMeta.from_json(api.project.get_meta(group[0].project_id))
        stored = api.annotation.download_json_batch(group[0].dataset_id, ids)
    except Exception as error:  # noqa: BLE001  (the SDK and its transport raise what they like)
        sly.logger.warning(f"The labels of {len(group)} images cannot be read: {error!r}")
        if len(group) == 1:
            return {ids[0]: _unreadable(ids[0], error)}
        return {
            image_id: task
            for target in group
            for image_id, task in _labels_of_dataset(api, [target], choice).items()
        }
    return {
        target.image_id: _image_task(target, annotation, meta, choice)
        for target, annotation in zip(group, stored, strict=True)
    }


def _image_task(
    target: Target, stored: dict[str, Any], meta: sly.ProjectMeta, choice: Choice
) -> ImageTask | Failure:
    try:
        annotation = sly.Annotation.from_json(stored, meta)
        return _chosen(annotation, choice.tag_names[target.project_id or 0], choice)
    except Exception as error:  # noqa: BLE001  (damaged annotations raise anything)
        sly.logger.warning(f"The labels of image {target.image_id} are damaged: {error!r}")
        return _unreadable(target.image_id, error)


def _chosen(annotation: sly.Annotation, tag_name: str, choice: Choice) -> ImageTask:
    labels: list[LabelTask] = []
    num_skipped = 0
    for place in regions_from_annotation(annotation):
        label = annotation.labels[place.label_index]
        if choice.classes is not None and label.obj_class.name not in choice.classes:
            continue
        if place.figure_id is None:
            continue
        old = tuple(OldTag(tag.sly_id, tag.value) for tag in label.tags if tag.name == tag_name)
        if old and not choice.overwrite:
            num_skipped += 1
            continue
        labels.append(LabelTask(place.figure_id, place.region, old))
    return ImageTask(None, tuple(labels), num_skipped)


def _unreadable(image_id: int, error: Exception) -> Failure:
    return failure_of(error, f"The labels of image {image_id} cannot be read", "bad_annotation")

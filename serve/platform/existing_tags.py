"""Writing tags on labels that exist, without making the labels anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from florence2.records import Failure
from serve.platform.existing_labels import LabelTask
from serve.platform.failures import failure_of
from serve.platform.tags import compatible_tag_meta, meta_lock
from serve.sdk import sly


@dataclass(frozen=True, slots=True)
class NewTag:
    """What a label is to be tagged with."""

    label: LabelTask
    value: str

    @property
    def is_there(self) -> bool:
        """Whether the label has this tag, and no other of its name."""
        return [old.value for old in self.label.old_tags] == [self.value]


def ensure_tag_meta(api: sly.Api, project_id: int, wanted: sly.TagMeta) -> sly.TagMeta:
    """The project's own tag, with its id; added under a free name where it is missing."""
    with meta_lock:
        meta = sly.ProjectMeta.from_json(api.project.get_meta(project_id))
        fitting = compatible_tag_meta(wanted, meta)
        if meta.get_tag_meta(fitting.name) is None:
            api.project.update_meta(project_id, meta.add_tag_meta(fitting))
            meta = sly.ProjectMeta.from_json(api.project.get_meta(project_id))
    return meta.get_tag_meta(fitting.name)


def write_tags(
    api: sly.Api, project_id: int, tag_meta: sly.TagMeta, tags: Sequence[NewTag]
) -> dict[int, Failure]:
    """Tags the labels; the failures by figure id. One request for all that have no tag yet."""
    fresh = [tag for tag in tags if not tag.label.old_tags]
    failures: dict[int, Failure] = {}
    try:
        if fresh:
            _add(api, project_id, tag_meta, fresh)
    except Exception as error:  # noqa: BLE001  (whatever it is, the other labels go on)
        sly.logger.warning(f"{len(fresh)} labels cannot be tagged together: {error!r}")
        for tag in fresh:
            failures.update(_add_one(api, project_id, tag_meta, tag))
    for tag in tags:
        if tag.label.old_tags and not tag.is_there:
            failures.update(_replace(api, project_id, tag_meta, tag))
    return failures


def _add(api: sly.Api, project_id: int, tag_meta: sly.TagMeta, tags: Sequence[NewTag]) -> None:
    api.image.tag.add_to_objects(
        project_id,
        [
            {"tagId": tag_meta.sly_id, "figureId": tag.label.figure_id, "value": tag.value}
            for tag in tags
        ],
    )


def _add_one(
    api: sly.Api, project_id: int, tag_meta: sly.TagMeta, tag: NewTag
) -> dict[int, Failure]:
    try:
        if not _has_it(api, tag_meta, tag):
            _add(api, project_id, tag_meta, [tag])
    except Exception as error:  # noqa: BLE001  (as above)
        return _failed(tag, error)
    return {}


def _has_it(api: sly.Api, tag_meta: sly.TagMeta, tag: NewTag) -> bool:
    """A request that failed may have been carried out in part."""
    stored = api.advanced.get_object_tags(tag.label.figure_id)
    return any(one.get("tagId") == tag_meta.sly_id for one in stored)


def _replace(
    api: sly.Api, project_id: int, tag_meta: sly.TagMeta, tag: NewTag
) -> dict[int, Failure]:
    """Removes the old values first: a label may not be allowed two. A failure puts them back."""
    removed: list[NewTag] = []
    try:
        for old in tag.label.old_tags:
            api.advanced.remove_tag_from_object(tag_meta.sly_id, tag.label.figure_id, old.tag_id)
            removed.append(NewTag(tag.label, str(old.value)))
        _add(api, project_id, tag_meta, [tag])
    except Exception as error:  # noqa: BLE001  (as above)
        _put_back(api, project_id, tag_meta, removed)
        return _failed(tag, error)
    return {}


def _put_back(
    api: sly.Api, project_id: int, tag_meta: sly.TagMeta, removed: Sequence[NewTag]
) -> None:
    try:
        if removed:
            _add(api, project_id, tag_meta, removed)
    except Exception as error:  # noqa: BLE001  (the failure that led here is reported)
        values = [tag.value for tag in removed]
        sly.logger.error(
            f"Label {removed[0].label.figure_id} lost its tag {tag_meta.name!r} {values}: {error!r}"
        )


def _failed(tag: NewTag, error: Exception) -> dict[int, Failure]:
    what = f"Label {tag.label.figure_id} cannot be tagged"
    return {tag.label.figure_id: failure_of(error, what, "upload_failed")}

"""Writing tags on labels that exist, without making the labels anew.

Writing the same twice is the same as writing it once, whoever repeats it: a client that got no
answer in time, two at once, or a connection that was lost before the platform's answer came.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from florence2.records import Failure
from serve.platform.existing_labels import LabelTask, OldTag
from serve.platform.failures import failure_of, platform_failure
from serve.platform.images import Target
from serve.platform.tags import compatible_tag_meta, meta_lock
from serve.sdk import sly

_ATTEMPTS: Final = 3
# By project: what a label has is read and written by one run at a time.
_writing: Final[dict[int, threading.Lock]] = {}


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


@dataclass(frozen=True, slots=True)
class Written:
    """What became of the tags of one image; the others had been there. Failures by figure id."""

    count: int
    failures: dict[int, Failure]


@dataclass(frozen=True)
class TagWriter:
    """Tags labels of one project. ``overwrite`` replaces other values of the tag."""

    api: sly.Api
    project_id: int
    tag_meta: sly.TagMeta
    overwrite: bool

    def write(self, target: Target, tags: Sequence[NewTag]) -> Written:
        """Tags labels of the image, one request for all that have no tag yet.

        What another run has written since they were read is left, or replaced, as it is now.
        """
        with _writing.setdefault(self.project_id, threading.Lock()):
            try:
                now = self._as_they_are(target, tags)
            except Exception as error:  # noqa: BLE001  (the SDK and its transport raise anything)
                return Written(0, {key: one for tag in tags for key, one in _failed(tag, error)})
            due = [
                tag
                for tag in now
                if not tag.label.old_tags or (self.overwrite and not tag.is_there)
            ]
            failures = self._write_all(due)
        return Written(len(due) - len(failures), failures)

    def _as_they_are(self, target: Target, tags: Sequence[NewTag]) -> list[NewTag]:
        [stored] = self.api.annotation.download_json_batch(target.dataset_id, [target.image_id])
        old = {
            figure["id"]: tuple(
                OldTag(tag.get("id"), tag.get("value"))
                for tag in figure.get("tags", ())
                if tag["name"] == self.tag_meta.name
            )
            for figure in stored["objects"]
        }
        return [
            NewTag(replace(tag.label, old_tags=old.get(tag.label.figure_id, ())), tag.value)
            for tag in tags
        ]

    def _write_all(self, tags: Sequence[NewTag]) -> dict[int, Failure]:
        fresh = [tag for tag in tags if not tag.label.old_tags]
        failures: dict[int, Failure] = {}
        try:
            if fresh:
                self._add(fresh)
        except Exception as error:  # noqa: BLE001  (whatever it is, the other labels go on)
            sly.logger.warning(f"{len(fresh)} labels cannot be tagged together: {error!r}")
            for tag in fresh:
                failures.update(self._add_one(tag))
        for tag in tags:
            if tag.label.old_tags:
                failures.update(self._replace(tag))
        return failures

    def _add(self, tags: Sequence[NewTag]) -> None:
        """One attempt: the SDK would repeat a request that was carried out and not answered."""
        _asking_once(self.api).image.tag.add_to_objects(
            self.project_id,
            [
                {"tagId": self.tag_meta.sly_id, "figureId": tag.label.figure_id, "value": tag.value}
                for tag in tags
            ],
        )

    def _add_one(self, tag: NewTag) -> list[tuple[int, Failure]]:
        try:
            self._add_unless_there(tag)
        except Exception as error:  # noqa: BLE001  (as above)
            return _failed(tag, error)
        return []

    def _add_unless_there(self, tag: NewTag) -> None:
        """Attempts while the platform fails; each looks first what the one before has done."""
        for attempt in range(1, _ATTEMPTS + 1):
            if self._has_it(tag):
                return
            try:
                self._add([tag])
            except Exception as error:
                if attempt == _ATTEMPTS or platform_failure(error) is None:
                    raise
            else:
                return

    def _has_it(self, tag: NewTag) -> bool:
        stored = self.api.advanced.get_object_tags(tag.label.figure_id)
        return any(one.get("tagId") == self.tag_meta.sly_id for one in stored)

    def _replace(self, tag: NewTag) -> list[tuple[int, Failure]]:
        """Removes the old values first, as two may not be allowed. A failure puts them back."""
        removed: list[NewTag] = []
        figure_id, meta_id = tag.label.figure_id, self.tag_meta.sly_id
        try:
            for old in tag.label.old_tags:
                self.api.advanced.remove_tag_from_object(meta_id, figure_id, old.tag_id)
                removed.append(NewTag(tag.label, str(old.value)))
            self._add_unless_there(tag)
        except Exception as error:  # noqa: BLE001  (as above)
            self._put_back(removed)
            return _failed(tag, error)
        return []

    def _put_back(self, removed: Sequence[NewTag]) -> None:
        try:
            if removed and not self._has_it(removed[0]):
                self._add(removed)
        except Exception as error:  # noqa: BLE001  (the failure that led here is reported)
            values = [tag.value for tag in removed]
            sly.logger.error(
                f"Label {removed[0].label.figure_id} lost its tag {self.tag_meta.name!r} "
                f"{values}: {error!r}"
            )


def _asking_once(api: sly.Api) -> sly.Api:
    if not isinstance(api, sly.Api) or api.retry_count == 1:
        return api
    return sly.Api(api.server_address, api.token, retry_count=1)


def _failed(tag: NewTag, error: Exception) -> list[tuple[int, Failure]]:
    what = f"Label {tag.label.figure_id} cannot be tagged"
    return [(tag.label.figure_id, failure_of(error, what, "upload_failed"))]

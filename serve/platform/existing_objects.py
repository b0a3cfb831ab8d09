"""Attributes of objects that are labeled already: what the model says about them, as tags."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Final

from florence2.engine.ask import Ask
from florence2.engine.encoding import AnyImage
from florence2.engine.scheduler import Priority
from florence2.errors import FlorenceError, ImageError, RequestError, shown
from florence2.records import Failure, Region, Result, region_on_image
from florence2.tasks import find_task
from serve.naming import clean_text
from serve.platform.failures import (
    FailedImageError,
    failure_json,
    failure_of,
    platform_failure,
)
from serve.platform.images import Target, download_images, each_or_failure, resolve
from serve.platform.pipeline import (
    Batch,
    fetch_ahead,
    split_batches,
)
from serve.platform.registry import InferenceRequest
from serve.platform.request_state import Source, State, batch_size_of
from serve.platform.run import Ledger, RunServices
from serve.platform.upload import compatible_tag_meta, meta_lock
from serve.predict.annotations import REGION_TEXT_TAGS, TAG_METAS
from serve.predict.full_queue import when_queue_has_room
from serve.predict.geometry import box_xyxy_from_rectangle_tlbr
from serve.predict.predictor import Call
from serve.sdk import sly
from serve.settler import Settler

_ATTEMPTS: Final = 3
# By project: what a label has is read and written by one run at a time.
_writing: Final[dict[int, threading.Lock]] = {}

StoredTag = tuple[int | None, object]
"""The id and the value of a tag that a label has."""


def tag_existing_objects(
    api: sly.Api, state: State, request: InferenceRequest, services: RunServices
) -> None:
    """Asks a region task about every label of the images, and writes the answers as their tags.

    ``state``: the images as for a run, ``task_prompt``, ``classes``, ``overwrite``, ``settings``.
    Labels stay what they are. One that has the tag is skipped unless ``overwrite``, so a second
    run continues a first. Results tell per image what was written, skipped and failed;
    PartialFailureError at the end for any image that is not whole.
    """
    TaggingRun(api, state, request, services).work()


@dataclass(frozen=True, slots=True)
class TagRequest:
    """Which task is asked about the labels of which classes, None being all.

    Labels that are tagged already only to ``overwrite`` their tags.
    """

    task: str
    classes: frozenset[str] | None
    overwrite: bool

    @classmethod
    def of(cls, state: State) -> TagRequest:
        """What ``state`` asks for; RequestError for a task that tells nothing about a region."""
        name = state.get("task_prompt")
        known = ", ".join(REGION_TEXT_TAGS)
        if not isinstance(name, str):
            raise RequestError(
                f"task_prompt names what is asked about each label, one of {known}, and "
                f"{shown(name)} was received; choose one."
            )
        token = find_task(name).token
        if token not in REGION_TEXT_TAGS:
            raise RequestError(
                f"Labels can be asked {known}, and {token} was received; choose one of these."
            )
        classes, overwrite = state.get("classes"), state.get("overwrite", False)
        if classes is not None and not (
            isinstance(classes, list) and all(isinstance(one, str) for one in classes)
        ):
            raise RequestError(f"classes is a list of names, and {shown(classes)} was received.")
        if not isinstance(overwrite, bool):
            raise RequestError(f"overwrite is true or false, and {shown(overwrite)} was received.")
        return cls(token, frozenset(classes) if classes else None, overwrite)


@dataclass(frozen=True, slots=True, eq=False)
class ImageLabels:
    """One image's labels to ask about, by figure id; ``num_skipped`` others are tagged already.

    ``image`` is None before it is downloaded, and stays so where there are no labels.
    """

    regions: dict[int, Region]
    num_skipped: int
    image: AnyImage | None = None


Answered = tuple[Target, ImageLabels | Failure, Sequence[Result | Failure]]


class TaggingRun:
    """One run over labels of the platform; see ``tag_existing_objects``."""

    def __init__(
        self, api: sly.Api, state: State, request: InferenceRequest, services: RunServices
    ) -> None:
        self._api = api
        self._request = request
        self._services = services
        self._asked = TagRequest.of(state)
        # What these runs ask stands beside the settings, under some of the same names: the
        # settings alone would be checked against it.
        settings = state.get("settings")
        if isinstance(settings, Mapping):
            settings = {key: value for key, value in settings.items() if key != "task_prompt"}
        self._settings = services.settings_of({"settings": settings})
        asked_size = batch_size_of(state, services.default_batch_size)
        self._batch_size = asked_size * services.num_devices
        self._targets = resolve(api, Source.of_either(state)).without_repeats().targets
        self._writers: dict[int | None, TagWriter] = {}

    def work(self) -> None:
        """Does all images, or stops when the request is stopped."""
        fetched = fetch_ahead(
            split_batches(self._targets, self._batch_size),
            self._fetch,
            self._services.budget,
            self._request.is_stopped,
            is_bulk=True,
        )
        lost = "labels without the tag"
        with Ledger(self._request, len(self._targets), lost, must_be_whole=True) as ledger:
            wanted = TAG_METAS[REGION_TEXT_TAGS[self._asked.task]]
            projects = {one.project_id for one in self._targets if one.project_id is not None}
            for project_id in sorted(projects):
                meta = ensure_tag_meta(self._api, project_id, wanted)
                writer = TagWriter(self._api, project_id, meta, self._asked.overwrite)
                self._writers[project_id] = writer
            with (
                Settler[list[Answered]](lambda answered: self._settle(answered, ledger)) as settler,
                closing(fetched),
            ):
                for batch, labels, hold in fetched:
                    with hold:
                        if self._request.is_stopped():
                            break
                        settler.put(self._ask(batch, labels))

    def _fetch(self, batch: Batch) -> list[ImageLabels | Failure]:
        """What is to be asked about each image. Images without such labels are not downloaded."""
        found: dict[int, ImageLabels | Failure] = {
            target.image_id: target.failure for target in batch if target.failure is not None
        }
        groups: dict[int | None, list[Target]] = defaultdict(list)
        for target in batch:
            if target.failure is None:
                groups[target.dataset_id].append(target)
        for group in groups.values():
            read = partial(self._read_labels, group[0])
            found |= each_or_failure([target.image_id for target in group], read, _unreadable)
        asked = {
            target.image_id: labels
            for target in batch
            if isinstance(labels := found[target.image_id], ImageLabels) and labels.regions
        }
        infos = [target.info for target in batch if target.image_id in asked]
        images = download_images(self._api, infos)
        for (image_id, labels), image in zip(asked.items(), images, strict=True):
            found[image_id] = image if isinstance(image, Failure) else replace(labels, image=image)
        return [found[target.image_id] for target in batch]

    def _read_labels(self, first: Target, image_ids: list[int]) -> list[ImageLabels | Failure]:
        """The labels of images of one dataset; ``first`` is one of its images."""
        meta = sly.ProjectMeta.from_json(self._api.project.get_meta(first.project_id))
        stored = self._api.annotation.download_json_batch(first.dataset_id, image_ids)
        tag_name = self._writers[first.project_id].tag_meta.name
        labels: list[ImageLabels | Failure] = []
        for image_id, one in zip(image_ids, stored, strict=True):
            try:
                labels.append(self._chosen(sly.Annotation.from_json(one, meta), tag_name))
            except Exception as error:  # noqa: BLE001  (damaged annotations raise anything)
                sly.logger.warning(f"The labels of image {image_id} are damaged: {error!r}")
                labels.append(_unreadable(image_id, error))
        return labels

    def _chosen(self, annotation: sly.Annotation, tag_name: str) -> ImageLabels:
        """The labels to ask about. One without a figure's id was never on the platform."""
        regions: dict[int, Region] = {}
        num_skipped = 0
        for label in annotation.labels:
            region = region_of(label.geometry, annotation.img_size)
            classes, figure_id = self._asked.classes, label.geometry.sly_id
            if region is None or figure_id is None:
                continue
            if classes is not None and label.obj_class.name not in classes:
                continue
            if not self._asked.overwrite and any(tag.name == tag_name for tag in label.tags):
                num_skipped += 1
                continue
            regions[figure_id] = region
        return ImageLabels(regions, num_skipped)

    def _ask(self, batch: Batch, fetched: Sequence[ImageLabels | Failure]) -> list[Answered]:
        """All labels of the batch in one request; those of an image share its features."""
        asks = [
            Ask(
                one.image,
                self._asked.task,
                region=region,
                num_beams=self._settings.num_beams,
                max_new_tokens=self._settings.max_new_tokens,
                adapter=self._settings.model,
            )
            for one in fetched
            if isinstance(one, ImageLabels) and one.image is not None
            for region in one.regions.values()
        ]
        outcomes = iter(self._outcomes_of(asks))
        answered: list[Answered] = []
        for target, labels in zip(batch, fetched, strict=True):
            num_asked = len(labels.regions) if isinstance(labels, ImageLabels) else 0
            of_image = tuple(islice(outcomes, num_asked))
            first = of_image[0] if of_image else None
            if isinstance(first, Failure) and first.code == ImageError.code:
                # It cannot be opened: one failure, and not one of each of its labels.
                answered.append((target, first, ()))
            else:
                answered.append((target, labels, of_image))
        return answered

    def _outcomes_of(self, asks: Sequence[Ask]) -> Sequence[Result | Failure]:
        if not asks:
            return []
        call = Call(Priority.BULK, should_stop=self._request.is_stopped)
        try:
            outcomes = when_queue_has_room(
                lambda: self._services.ask(asks, call), self._request.is_stopped
            )
        except FlorenceError:
            if not self._request.is_stopped():
                raise
            return [Failure("cancelled", "The run was stopped.")] * len(asks)
        for outcome in outcomes:
            if isinstance(outcome, Failure) and outcome.code == "not_deployed":
                raise FailedImageError(outcome)
        return outcomes

    def _settle(self, answered: list[Answered], ledger: Ledger) -> None:
        for target, labels, outcomes in answered:
            if isinstance(labels, Failure):
                if ledger.add_failure(target, labels):
                    self._request.add_results([_entry(target, error=labels)])
            elif not self._is_cut(outcomes):
                self._write(target, labels, outcomes, ledger)

    def _is_cut(self, outcomes: Sequence[Result | Failure]) -> bool:
        """Whether the run was stopped before all labels of the image were answered."""
        return self._request.is_stopped() and any(
            isinstance(one, Failure) and one.code == "cancelled" for one in outcomes
        )

    def _write(
        self,
        target: Target,
        labels: ImageLabels,
        outcomes: Sequence[Result | Failure],
        ledger: Ledger,
    ) -> None:
        failures: dict[int, Failure] = {}
        values: dict[int, str] = {}
        num_empty = 0
        for figure_id, outcome in zip(labels.regions, outcomes, strict=True):
            if isinstance(outcome, Failure):
                failures[figure_id] = outcome
            elif text := clean_text(
                outcome.text or " ".join(found.label for found in outcome.objects)
            ):
                values[figure_id] = text
            else:
                num_empty += 1
        num_written, refused = self._writers[target.project_id].write(target, values)
        num_skipped = labels.num_skipped + len(values) - num_written - len(refused)
        failures.update(refused)
        error = None
        if failures:
            first = next(iter(failures.values()))
            error = Failure(
                first.code,
                f"{len(failures)} of {len(labels.regions)} labels of image {target.image_id} have "
                f"no tag, the first because: {first.message}",
            )
        entry = _entry(target, num_written, num_skipped, num_empty, failures, error)
        if error is None:
            ledger.add_done([entry], 1)
        else:
            self._request.add_results([entry])
            ledger.add_failure(target, error)


def region_of(
    geometry: sly.geometry.geometry.Geometry, image_size_hw: tuple[int | None, int | None]
) -> Region | None:
    """The outer box of a label's shape, in float pixels inside the image.

    None for a shape that the SDK cannot place, or that lies outside the image. One without a size,
    as an image that is only linked, does not cut off any.
    """
    if isinstance(geometry, sly.AnyGeometry):
        return None
    height, width = (math.inf if side is None else side for side in image_size_hw)
    box = geometry.to_bbox()
    x1, y1, x2, y2 = box_xyxy_from_rectangle_tlbr((box.top, box.left, box.bottom, box.right))
    return region_on_image((x1, y1, x2, y2), (width, height))


def _unreadable(image_id: int, error: Exception) -> Failure:
    return failure_of(error, f"The labels of image {image_id} cannot be read", "bad_annotation")


def _entry(
    target: Target,
    num_written: int = 0,
    num_skipped: int = 0,
    num_empty: int = 0,
    failures: Mapping[int, Failure] | None = None,
    error: Failure | None = None,
) -> dict[str, Any]:
    return {
        "image_id": target.image_id,
        "name": target.name,
        "dataset_id": target.dataset_id,
        "project_id": target.project_id,
        "annotation": None,
        "data": None,
        "written": num_written,
        "skipped": num_skipped,
        "unanswered": num_empty,
        "failed": [
            {"label_id": figure_id, **failure_json(failure)}
            for figure_id, failure in (failures or {}).items()
        ],
        "error": None if error is None else failure_json(error),
    }


def ensure_tag_meta(api: sly.Api, project_id: int, wanted: sly.TagMeta) -> sly.TagMeta:
    """The project's own tag, with its id; added under a free name where it is missing."""
    with meta_lock:
        meta = sly.ProjectMeta.from_json(api.project.get_meta(project_id))
        fitting = compatible_tag_meta(wanted, meta)
        if meta.get_tag_meta(fitting.name) is None:
            api.project.update_meta(project_id, meta.add_tag_meta(fitting))
            meta = sly.ProjectMeta.from_json(api.project.get_meta(project_id))
    return meta.get_tag_meta(fitting.name)


@dataclass(frozen=True)
class TagWriter:
    """Tags labels of one project. ``overwrite`` replaces other values of the tag."""

    api: sly.Api
    project_id: int
    tag_meta: sly.TagMeta
    overwrite: bool

    def write(self, target: Target, values: Mapping[int, str]) -> tuple[int, dict[int, Failure]]:
        """Tags labels of the image, one request for all that have no tag yet.

        How many it wrote, and the failures, by figure id; the others had been there. What another
        run has written since they were asked about is left, or replaced, as it is now.
        """
        if not values:
            return 0, {}
        with _writing.setdefault(self.project_id, threading.Lock()):
            try:
                tags = self._stored_tags(target)
            except Exception as error:  # noqa: BLE001  (the SDK and its transport raise anything)
                return 0, {figure_id: _failure(figure_id, error) for figure_id in values}
            fresh = {key: value for key, value in values.items() if not tags[key]}
            other = {
                key: value
                for key, value in values.items()
                if self.overwrite and tags[key] and [old for _, old in tags[key]] != [value]
            }
            try:
                if fresh:
                    self._add(fresh.items())
                one_by_one = other
            except Exception as error:  # noqa: BLE001  (whatever it is, the other labels go on)
                sly.logger.warning(f"{len(fresh)} labels cannot be tagged together: {error!r}")
                one_by_one = fresh | other
            failures: dict[int, Failure] = {}
            for figure_id, value in one_by_one.items():
                try:
                    self._replace(figure_id, tags[figure_id], value)
                except Exception as error:  # noqa: BLE001  (as above)
                    failures[figure_id] = _failure(figure_id, error)
        return len(fresh) + len(other) - len(failures), failures

    def _stored_tags(self, target: Target) -> dict[int, list[StoredTag]]:
        """The tags of the name, by figure id."""
        [stored] = self.api.annotation.download_json_batch(target.dataset_id, [target.image_id])
        tags: dict[int, list[StoredTag]] = defaultdict(list)
        for figure in stored["objects"]:
            for tag in figure.get("tags", ()):
                if tag["name"] == self.tag_meta.name:
                    tags[figure["id"]].append((tag.get("id"), tag.get("value")))
        return tags

    def _add(self, values: Iterable[tuple[int, str]]) -> None:
        """One attempt: the SDK would repeat a request that was carried out and not answered."""
        api = self.api
        if isinstance(api, sly.Api) and api.retry_count != 1:
            api = sly.Api(api.server_address, api.token, retry_count=1)
        tag_id = self.tag_meta.sly_id
        tags = [{"tagId": tag_id, "figureId": key, "value": value} for key, value in values]
        api.image.tag.add_to_objects(self.project_id, tags)

    def _replace(self, figure_id: int, old_tags: list[StoredTag], value: str) -> None:
        """Removes the old values first, as two may not be allowed. A failure puts them back."""
        removed: list[tuple[int, str]] = []
        try:
            for tag_id, old in old_tags:
                self.api.advanced.remove_tag_from_object(self.tag_meta.sly_id, figure_id, tag_id)
                removed.append((figure_id, str(old)))
            self._add_unless_there(figure_id, value)
        except Exception:
            self._put_back(figure_id, removed)
            raise

    def _add_unless_there(self, figure_id: int, value: str) -> None:
        """Attempts while the platform fails; each looks first what the one before has done."""
        for attempt in range(1, _ATTEMPTS + 1):
            if self._has_tag(figure_id):
                return
            try:
                self._add([(figure_id, value)])
            except Exception as error:
                if attempt == _ATTEMPTS or platform_failure(error) is None:
                    raise
            else:
                return

    def _has_tag(self, figure_id: int) -> bool:
        stored = self.api.advanced.get_object_tags(figure_id)
        return any(one.get("tagId") == self.tag_meta.sly_id for one in stored)

    def _put_back(self, figure_id: int, removed: Sequence[tuple[int, str]]) -> None:
        try:
            if removed and not self._has_tag(figure_id):
                self._add(removed)
        except Exception as error:  # noqa: BLE001  (the failure that led here is reported)
            values = [value for _, value in removed]
            sly.logger.error(
                f"Label {figure_id} lost its tag {self.tag_meta.name!r} {values}: {error!r}"
            )


def _failure(figure_id: int, error: Exception) -> Failure:
    return failure_of(error, f"Label {figure_id} cannot be tagged", "upload_failed")

"""Attributes of objects that are labeled already: what the model says about them, as tags."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Final

from florence2.engine.ask import AnyImage, Ask
from florence2.errors import FlorenceError, ImageError, RequestError, shown
from florence2.prompts import region_on_image
from florence2.records import Failure, Region, Result
from florence2.tasks import find_task
from serve.platform.failures import FailedImageError, failure_of, platform_failure
from serve.platform.images import (
    Download,
    ExistingServices,
    Images,
    State,
    Target,
    any_source,
    batch_size_of,
    resolve,
)
from serve.platform.pipeline import (
    Batch,
    Behind,
    fetch_ahead,
    room_for_downloads,
    split_batches,
    when_queue_has_room,
)
from serve.platform.project_run import Ledger
from serve.platform.registry import InferenceRequest
from serve.platform.upload import compatible_tag_meta, meta_lock
from serve.predict.annotations import REGION_TEXT_TAGS, TAG_METAS
from serve.predict.geometry import box_xyxy_from_rectangle_tlbr
from serve.predict.naming import clean_text
from serve.sdk import sly
from serve.settings import Settings


@dataclass(frozen=True, slots=True)
class LabelRegion:
    """Where a label is. ``label_index`` counts ``annotation.labels``; ``figure_id`` is the
    platform's own, None for a label that was never there."""

    label_index: int
    figure_id: int | None
    region: Region


def regions_from_annotation(annotation: sly.Annotation) -> list[LabelRegion]:
    """The outer box of every label's shape, in float pixels inside the image.

    A label whose shape the SDK cannot place, or that lies outside the image, is left out. An
    annotation without a size, as of an image that is only linked, does not cut off any.
    """
    height, width = (math.inf if side is None else side for side in annotation.img_size)
    return [
        LabelRegion(index, label.geometry.sly_id, region)
        for index, label in enumerate(annotation.labels)
        if (region := _region(label.geometry, (width, height))) is not None
    ]


def _region(
    geometry: sly.geometry.geometry.Geometry, size_wh: tuple[float, float]
) -> Region | None:
    if isinstance(geometry, sly.AnyGeometry):
        return None
    box = geometry.to_bbox()
    x1, y1, x2, y2 = box_xyxy_from_rectangle_tlbr((box.top, box.left, box.bottom, box.right))
    return region_on_image((x1, y1, x2, y2), size_wh)


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


Asked = tuple[Batch, Sequence["Answers | Failure"]]


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked about which labels."""

    task: str
    classes: frozenset[str] | None
    overwrite: bool


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What was said about one image's labels, in the order of ``task.labels``."""

    task: ImageTask
    outcomes: tuple[Result | Failure, ...]


def tag_existing_objects(
    api: sly.Api, state: State, request: InferenceRequest, services: ExistingServices
) -> None:
    """Asks a region task about every label of the images, and writes the answers as their tags.

    ``state``: the images as for a run, ``task_prompt``, ``classes``, ``overwrite``, ``settings``.
    Labels stay what they are. One that has the tag is skipped unless ``overwrite``, so a second
    run continues a first. Results tell per image what was written, skipped and failed;
    PartialFailureError at the end for any image that is not whole.
    """
    wish = wish_of(state)
    settings = services.settings_of(_without_task(state), api)
    batch_size = batch_size_of(state, services.default_batch_size)
    images = resolve(api, any_source(state)).without_repeats()
    request.set_stage(InferenceRequest.Stage.INFERENCE, 0, len(images.targets))
    ledger = Ledger(request, len(images.targets), "labels without the tag")
    try:
        run = _Run(services, api, request, wish, settings, ledger, _tag_metas(api, wish, images))
        run.work(images, batch_size)
    except Exception as error:
        ledger.close_broken(error)
        raise
    ledger.close(must_be_whole=True)


def wish_of(state: State) -> Wish:
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
    return Wish(token, frozenset(classes) if classes else None, overwrite)


def _without_task(state: State) -> State:
    """Settings without what is named beside them: alone they would be checked against it."""
    settings = state.get("settings")
    if not isinstance(settings, Mapping):
        return state
    return {**state, "settings": {k: v for k, v in settings.items() if k != "task_prompt"}}


def _tag_metas(api: sly.Api, wish: Wish, images: Images) -> dict[int, sly.TagMeta]:
    wanted = TAG_METAS[REGION_TEXT_TAGS[wish.task]]
    projects = {one.project_id for one in images.targets if one.project_id is not None}
    return {one: ensure_tag_meta(api, one, wanted) for one in sorted(projects)}


@dataclass(frozen=True)
class _Run:
    services: ExistingServices
    api: sly.Api
    request: InferenceRequest
    wish: Wish
    settings: Settings
    ledger: Ledger
    tag_metas: dict[int, sly.TagMeta]

    def work(self, images: Images, batch_size: int) -> None:
        names = {project_id: meta.name for project_id, meta in self.tag_metas.items()}
        choice = Choice(names, self.wish.classes, self.wish.overwrite)
        behind: Behind[Asked] = Behind(self._write_all)
        fetched = fetch_ahead(
            split_batches(images.targets, batch_size),
            lambda batch: fetch_labels(self.api, batch, choice, self.services.download),
            room=room_for_downloads(self.request, is_bulk=True),
        )
        try:
            with closing(fetched):
                for batch, tasks in fetched:
                    if self.request.is_stopped():
                        break
                    behind.put((batch, self._ask_all(tasks)))
        finally:
            behind.finish()

    def _ask_all(self, tasks: Sequence[ImageTask | Failure]) -> list[Answers | Failure]:
        """All labels of the batch in one request; those of an image share its features."""
        asks = [ask for task in tasks for ask in self._asks(task)]
        try:
            outcomes = iter(self._answers(asks))
        except FlorenceError:
            if not self.request.is_stopped():
                raise
            outcomes = iter([Failure("cancelled", "The run was stopped.")] * len(asks))
        return [
            task
            if isinstance(task, Failure)
            else _answers(task, tuple(next(outcomes) for _ in task.labels))
            for task in tasks
        ]

    def _answers(self, asks: Sequence[Ask]) -> Sequence[Result | Failure]:
        if not asks:
            return []
        outcomes = when_queue_has_room(
            lambda: self.services.ask(asks, should_stop=self.request.is_stopped),
            self.request.is_stopped,
        )
        for outcome in outcomes:
            if isinstance(outcome, Failure) and outcome.code == "not_deployed":
                raise FailedImageError(outcome)
        return outcomes

    def _asks(self, task: ImageTask | Failure) -> list[Ask]:
        if isinstance(task, Failure) or task.image is None:
            return []
        return [
            Ask(
                task.image,
                self.wish.task,
                region=label.region,
                num_beams=self.settings.num_beams,
                max_new_tokens=self.settings.max_new_tokens,
            )
            for label in task.labels
        ]

    def _write_all(self, asked: Asked) -> None:
        for target, answers in zip(*asked, strict=True):
            if isinstance(answers, Failure):
                if self.ledger.fail(target, answers):
                    self.request.add_results([_entry(target, error=answers)])
            elif not _is_cut(answers, self.request):
                self._write(target, answers)

    def _write(self, target: Target, answers: Answers) -> None:
        failures: dict[int, Failure] = {}
        tags: list[NewTag] = []
        unanswered = 0
        for label, outcome in zip(answers.task.labels, answers.outcomes, strict=True):
            if isinstance(outcome, Failure):
                failures[label.figure_id] = outcome
            elif text := _words(outcome):
                tags.append(NewTag(label, text))
            else:
                unanswered += 1
        written = self._write_tags(target, [tag for tag in tags if not tag.is_there])
        skipped = answers.task.num_skipped + len(tags) - written.count - len(written.failures)
        failures.update(written.failures)
        error = _summary(target, failures, answers.task.labels)
        entry = _entry(target, written.count, skipped, unanswered, failures, error)
        self.request.add_results([entry])
        if error is None:
            self.ledger.done(1)
        else:
            self.ledger.fail(target, error)

    def _write_tags(self, target: Target, tags: Sequence[NewTag]) -> Written:
        if not tags or target.project_id is None:
            return Written(0, {})
        meta = self.tag_metas[target.project_id]
        return TagWriter(self.api, target.project_id, meta, self.wish.overwrite).write(target, tags)


def _answers(task: ImageTask, outcomes: tuple[Result | Failure, ...]) -> Answers | Failure:
    """An image that cannot be opened is one failure, and not one of each of its labels."""
    first = outcomes[0] if outcomes else None
    if isinstance(first, Failure) and first.code == ImageError.code:
        return first
    return Answers(task, outcomes)


def _is_cut(answers: Answers, request: InferenceRequest) -> bool:
    """Whether the run was stopped before all labels of the image were answered."""
    return request.is_stopped() and any(
        isinstance(one, Failure) and one.code == "cancelled" for one in answers.outcomes
    )


def _words(result: Result) -> str:
    return clean_text(result.text or " ".join(found.label for found in result.objects))


def _summary(
    target: Target, failures: Mapping[int, Failure], labels: Sequence[LabelTask]
) -> Failure | None:
    if not failures:
        return None
    first = next(iter(failures.values()))
    return Failure(
        first.code,
        f"{len(failures)} of {len(labels)} labels of image {target.image_id} have no tag, the "
        f"first because: {first.message}",
    )


def _entry(
    target: Target,
    written: int = 0,
    skipped: int = 0,
    unanswered: int = 0,
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
        "written": written,
        "skipped": skipped,
        "unanswered": unanswered,
        "failed": [
            {"label_id": figure_id, "code": failure.code, "message": failure.message}
            for figure_id, failure in (failures or {}).items()
        ],
        "error": None if error is None else {"code": error.code, "message": error.message},
    }

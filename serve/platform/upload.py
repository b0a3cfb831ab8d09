"""Labels on their way to the platform: by batch, and image by image where a batch fails."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from florence2.errors import GenerationCancelledError
from florence2.records import Failure
from serve.platform.failures import NotFoundError, failure_of
from serve.platform.images import Target, check_project_is_there
from serve.platform.lease import RunHeldError
from serve.platform.patience import Patience, PlatformAwayError
from serve.platform.registry import InferenceRequest
from serve.platform.request_state import Destination
from serve.platform.run import RunServices
from serve.platform.run_records import RunRecord
from serve.platform.run_store import OwnLabels
from serve.provenance import with_run_tag
from serve.sdk import LabelingStatus, sly

sdk = sly.nn.inference.inference

DEFAULT_SUFFIX: Final = "_nn"

Meta = TypeVar("Meta", sly.ObjClass, sly.TagMeta)

# Two runs that read a project's meta, add to it and write it back would undo each other's work.
meta_lock: Final = threading.Lock()
_ANYWHERE: Final = sly.TagApplicableTo.ALL
# After these the other images of a batch are not tried: the platform is away, or the run stopped.
_SILENCE: Final = (PlatformAwayError, GenerationCancelledError)


def compatible_tag_meta(
    wanted: sly.TagMeta, project_meta: sly.ProjectMeta, suffix: str | None = None
) -> sly.TagMeta:
    """``wanted``, or as the project has it, or renamed where the project's means something else."""
    return compatible(
        wanted, project_meta.get_tag_meta, lambda known: _takes(known, wanted), suffix
    )


def compatible(
    wanted: Meta,
    known_of: Callable[[str], Meta | None],
    takes: Callable[[Meta], bool],
    suffix: str | None,
) -> Meta:
    """A class or tag under the first name that the project has free, or ``takes`` it under.

    Of ``confidence``, ``confidence_nn``, ``confidence_nn_2``, ...
    """
    suffix = suffix or DEFAULT_SUFFIX
    name, number = wanted.name, 1
    while True:
        known = known_of(name)
        if known is None:
            return wanted if name == wanted.name else wanted.clone(name=name)
        if takes(known):
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


def with_words_described(
    annotation: sly.Annotation, project_meta: sly.ProjectMeta
) -> sly.Annotation | str:
    """The annotation without tags that a project does not take, for a client that adds none.

    The platform refuses all labels of an image for one of those. Their words become the
    description of the object or the image; a number goes. A confidence that the project lacks
    stays, as every client adds it. What is said of the image alone is no annotation, but the name
    of the tag that is missing: clients lose the description of an image.
    """

    def is_taken(tag: sly.Tag) -> bool:
        known = project_meta.get_tag_meta(tag.meta.name)
        return tag.meta.name == "confidence" if known is None else _takes(known, tag.meta)

    def parted(tags: Iterable[sly.Tag]) -> tuple[list[sly.Tag], list[sly.Tag]]:
        taken = [tag for tag in tags if is_taken(tag)]
        return taken, [tag for tag in tags if not is_taken(tag) and isinstance(tag.value, str)]

    image_tags, untold = parted(annotation.img_tags)
    if untold and not annotation.labels:
        return str(untold[0].meta.name)
    labels = []
    for label in annotation.labels:
        tags, words = parted(label.tags)
        labels.append(label.clone(tags=sly.TagCollection(tags), description=_said(words)))
    return annotation.clone(
        labels=labels, img_tags=sly.TagCollection(image_tags), img_description=_said(untold)
    )


def _said(tags: Iterable[sly.Tag]) -> str:
    return "\n".join(tag.value for tag in tags)


def _renamed(tags: Iterable[sly.Tag], metas: dict[str, sly.TagMeta]) -> sly.TagCollection:
    return sly.TagCollection([tag.clone(meta=metas[tag.meta.name]) for tag in tags])


def prediction_of(
    target: Target, annotation: sly.Annotation | None = None, **extra: object
) -> sly.nn.model.prediction.Prediction:
    """The SDK's own record of one image's prediction, with ``extra`` keys in its result."""
    return sly.nn.model.prediction.Prediction(
        annotation,
        name=target.name,
        image_id=target.image_id,
        dataset_id=target.dataset_id,
        project_id=target.project_id,
        image_name=target.name,
        slides_data={},
        **extra,
    )


def entry_of(
    target: Target, annotation: sly.Annotation | None = None, **extra: object
) -> dict[str, Any]:
    """An image's result, as the SDK's ``_format_output`` writes it.

    One that failed has no annotation, which is not the same as an empty one.
    """
    return {**prediction_of(target, annotation, **extra).to_json(), "data": {}}


def uploaded_entry(target: Target) -> dict[str, Any]:
    """An image whose labels are on the platform: neither annotation nor data, as the SDK does."""
    return {**entry_of(target), "data": None}


@dataclass(frozen=True, slots=True)
class Labeled:
    """An image and its new labels; ``source_id`` is the image's that it is a copy of, if it is."""

    target: Target
    annotation: sly.Annotation
    source_id: int | None = None


Step = Callable[[list[Labeled]], list[Labeled]]


class SdkUpload:
    """The SDK's own way of labels to copies of images, without a model behind it."""

    upload_predictions = sdk.Inference.upload_predictions
    _format_output = sdk.Inference._format_output


class Uploading:
    """The uploads of one run, called from one thread. Results are added to the request.

    What is written is noted in ``record``. Without ``patience`` nothing is tried again: somebody
    waits. ``num_lost_batches``: how many of the last batches failed as a whole.
    """

    def __init__(
        self,
        services: RunServices,
        api: sly.Api,
        destination: Destination,
        request: InferenceRequest,
        record: RunRecord,
        patience: Patience | None,
    ) -> None:
        self.num_lost_batches = 0
        self._patience = patience
        self._record = record
        self._own: dict[int, OwnLabels] = {}
        self._services = services
        self._api = api
        self._destination = destination
        self._request = request
        request.context.setdefault("project_meta", {})

    def upload(self, batch: Sequence[Labeled]) -> dict[int, Failure]:
        """The failures by image id.

        Raises NotFoundError where the project is gone, and RunHeldError where the run is another
        process's now.
        """
        self._record.check_held()
        if self._record.writes_tag:
            run_id = self._record.run_id
            batch = [Labeled(one.target, with_run_tag(one.annotation, run_id)) for one in batch]
        groups: dict[int | None, list[Labeled]] = defaultdict(list)
        for labeled in batch:
            groups[labeled.target.dataset_id].append(labeled)
        failures: dict[int, Failure] = {}
        for group in groups.values():
            failures.update(self._upload_dataset(group))
        if batch:
            # What was deleted, or not got to, says nothing about the rest.
            other = (NotFoundError.code, GenerationCancelledError.code)
            lost = {one for one, why in failures.items() if why.code not in other}
            is_lost = all(one.target.image_id in lost for one in batch)
            self.num_lost_batches = self.num_lost_batches + 1 if is_lost else 0
        return failures

    def written_to(self, target: Target) -> tuple[int | None, int | None]:
        """The project that has an image's new labels, and the dataset of the image's copy if it is
        one that has them; None for a project that is not made yet."""
        output = self._destination.project_id
        if output is None and self._destination.mode != "create":
            output = target.project_id
        if output == target.project_id:
            return output, None
        created = self._request.context.get("created_dataset", {})
        return output, created.get(target.dataset_id)

    def _upload_dataset(self, group: list[Labeled]) -> dict[int, Failure]:
        # Labels are added by reading those that are there and writing all: of two runs at once,
        # such as those of a double click, one would undo the other's, or add what it added. But a
        # click on another image does not wait for a run that waits for the platform.
        with _alone_with({one.target.image_id for one in group}):
            return self._upload_alone(group)

    def _upload_alone(self, group: list[Labeled]) -> dict[int, Failure]:
        # What is there already is looked up once, before anything is sent: after an upload that
        # failed in part, the run's own labels would be taken for labels that were there.
        pending, failures = self._attempt(group, self._not_written_yet, self._not_written_yet)
        fresh, more = self._attempt(pending, self._without_known, self._without_known)
        failures |= more
        _, more = self._attempt(fresh, self._send, self._send_again)
        known = self._request.context.get("annotation", {})
        for one in group:
            known.pop(one.target.image_id, None)
        return {**failures, **more}

    def _attempt(
        self, group: list[Labeled], step: Step, again: Step
    ) -> tuple[list[Labeled], dict[int, Failure]]:
        """What ``step`` makes of the group; where it raises, what ``again`` makes of each image."""
        if not group:
            return group, {}
        try:
            return self._tried(step, group), {}
        except (NotFoundError, RunHeldError):
            raise
        except _SILENCE as error:
            return [], {one.target.image_id: _failure(one, error) for one in group}
        except Exception as error:  # noqa: BLE001  (whatever it is, the other images go on)
            sly.logger.warning(f"Labels of {len(group)} images cannot be uploaded: {error!r}")
        if self._patience is not None and (lost := self._lost_dataset(group)):
            return [], lost
        kept: list[Labeled] = []
        failures: dict[int, Failure] = {}
        silence: Exception | None = None
        for one in group:
            self._request.context["project_meta"].clear()
            try:
                if silence is not None:
                    raise silence
                kept.extend(self._tried(again, [one]))
            except (NotFoundError, RunHeldError):
                raise
            except Exception as error:  # noqa: BLE001  (as above)
                sly.logger.warning(f"Labels of image {one.target.image_id} failed: {error!r}")
                failures[one.target.image_id] = self._failure_of(one, error)
                silence = error if isinstance(error, _SILENCE) else None
        return kept, failures

    def _tried(self, step: Step, group: list[Labeled]) -> list[Labeled]:
        """Again where that can help, but never a copy of an image that may be there already."""
        if self._patience is None or (
            step == self._send and self._destination.is_copying(group[0].target.project_id)
        ):
            return step(group)

        def work() -> list[Labeled]:
            self._record.check_held()
            return step(group)

        return self._patience.tried(work)

    def _lost_dataset(self, group: list[Labeled]) -> dict[int, Failure]:
        """A failure of each image where their dataset was deleted meanwhile; NotFoundError where
        the whole project was."""
        first = group[0].target
        project_id, _ = self.written_to(first)
        try:
            check_project_is_there(self._api, project_id)
            check_project_is_there(self._api, first.project_id)
            if self._api.dataset.get_info_by_id(first.dataset_id) is not None:
                return {}
        except NotFoundError:
            raise
        except Exception as error:  # noqa: BLE001  (as above)
            sly.logger.warning(f"Dataset {first.dataset_id} cannot be looked up: {error!r}")
            return {}
        text = f"Dataset {first.dataset_id}, in which it was, was deleted while the run went on."
        return {one.target.image_id: Failure(NotFoundError.code, text) for one in group}

    def _failure_of(self, labeled: Labeled, error: Exception) -> Failure:
        image_id = labeled.target.image_id
        if self._patience is not None and not isinstance(error, _SILENCE):
            try:
                is_there = self._api.image.get_info_by_id(image_id) is not None
            except Exception as unknown:  # noqa: BLE001  (as above)
                sly.logger.warning(f"Image {image_id} cannot be looked up: {unknown!r}")
            else:
                if not is_there:
                    text = f"Image {image_id} was deleted while the run went on."
                    return Failure(NotFoundError.code, text)
        return _failure(labeled, error)

    def _not_written_yet(self, group: list[Labeled]) -> list[Labeled]:
        """Without images that the run had labeled when it was cut off, and could not note."""
        first = group[0].target
        project_id, copied_to = self.written_to(first)
        is_here = project_id is not None and project_id == first.project_id
        if not self._record.is_resumed or not is_here or copied_to is not None:
            return group
        ids = [one.target.image_id for one in group]
        stored = self._api.annotation.download_json_batch(first.dataset_id, ids)
        known = self._request.context.setdefault("annotation", {})
        meta = self._meta(project_id, is_fresh=True)
        left: list[Labeled] = []
        done: list[Labeled] = []
        for one, before in zip(group, stored, strict=True):
            image_id = one.target.image_id
            if self._record.found(image_id, before, first.project_id or 0):
                done.append(one)
                continue
            left.append(one)
            if self._destination.mode in ("append", "iou_merge", "skip_labeled"):
                # It would be downloaded once more otherwise.
                known[image_id] = sly.Annotation.from_json(before, meta)
        self._request.add_results([uploaded_entry(one.target) for one in done])
        return left

    def _without_known(self, group: list[Labeled]) -> list[Labeled]:
        """Drops what is labeled in the source already."""
        if self._destination.iou is None:
            return group
        first = group[0].target
        meta = self._meta(first.project_id)
        annotations = [one.annotation for one in group]
        if self._output_project(first) is None:
            # Compared under the names they will have, or a second run would not know its own.
            annotations = [self._fitted(one, meta)[1] for one in annotations]
        annotations = sdk._exclude_duplicated_predictions(
            self._api,
            annotations,
            first.dataset_id,
            [one.target.image_id for one in group],
            iou=self._destination.iou,
            meta=meta,
        )
        return [
            Labeled(one.target, annotation)
            for one, annotation in zip(group, annotations, strict=True)
        ]

    def _send(self, group: list[Labeled]) -> list[Labeled]:
        output = self._output_project(group[0].target)
        empty: list[Labeled] = []
        if output is None and self._destination.mode not in ("replace", "create"):
            # Where nothing is added, the labels that are there are not written anew either.
            empty = [
                one for one in group if not one.annotation.labels and not one.annotation.img_tags
            ]
            if self._destination.mode == "replace_own":
                changed = self._without_own(group)
                empty = [one for one in empty if one.target.image_id not in changed]
            group = [one for one in group if one not in empty]
        if group and output is None:
            self._write(group)
        elif group:
            self._copy(group, output, dst_project_id=output)
        self._request.add_results([uploaded_entry(one.target) for one in empty])
        return group

    def _without_own(self, group: list[Labeled]) -> set[int]:
        """Keeps what is to stay of the images' labels for what is written to join.

        The ids of the images of which something goes.
        """
        first = group[0].target
        if first.project_id is None:
            return set()
        own = self._own.get(first.project_id)
        if own is None:
            own = OwnLabels(self._api, first.project_id, but_run=self._record.run_id)
            self._own[first.project_id] = own
        meta = self._meta(first.project_id, is_fresh=True)
        known = self._request.context.setdefault("annotation", {})
        ids = [one.target.image_id for one in group]
        changed: set[int] = set()
        stored = self._api.annotation.download_json_batch(first.dataset_id, ids)
        for image_id, before in zip(ids, stored, strict=True):
            left = own.without(image_id, before)
            if left is not before:
                changed.add(image_id)
            # After an upload that failed, labels that are there may be this run's own.
            if image_id not in known:
                known[image_id] = sly.Annotation.from_json(left, meta)
        return changed

    def _send_again(self, group: list[Labeled]) -> list[Labeled]:
        """Labels the copy that a failed upload has left behind, rather than copy once more."""
        [labeled] = group
        target = labeled.target
        created = self._request.context.get("created_dataset", {}).get(target.dataset_id)
        output = self._output_project(target)
        copy = None
        if output is not None and created is not None:
            copy = self._api.image.get_info_by_name(created, target.name)
        if copy is None:
            return self._send(group)
        there = Labeled(Target(copy.id, output, copy), labeled.annotation, target.image_id)
        self._copy([there], output, upload_mode="replace", inference_request=None)
        self._request.add_results([uploaded_entry(target)])
        return group

    def _write(self, group: list[Labeled]) -> None:
        """Labels go to the images themselves, as the SDK's ``upload_predictions`` writes them.

        That fits each annotation to the project once more, and makes JSON of it four times.
        """
        first = group[0].target
        annotations = self._fitted_to_project(group, first.project_id)
        if first.project_id is not None:
            self._record.keep_intents(first.project_id)
        ids = [one.target.image_id for one in group]
        for annotation in annotations:
            for label in annotation.labels:
                label.status = LabelingStatus.AUTO
        if self._destination.mode not in ("replace", "create"):
            before = self._labels_before(ids, first)
            annotations = [_merged(*pair) for pair in zip(before, annotations, strict=True)]
        self._api.annotation.upload_anns(ids, annotations)
        self._request.add_results([uploaded_entry(one.target) for one in group])

    def _labels_before(self, image_ids: list[int], target: Target) -> list[sly.Annotation]:
        """What the images of a dataset have already, those of ``target`` and others."""
        known = self._request.context.setdefault("annotation", {})
        missing = [one for one in image_ids if one not in known]
        if missing:
            meta = self._meta(target.project_id)
            stored = self._api.annotation.download_json_batch(target.dataset_id, missing)
            for image_id, before in zip(missing, stored, strict=True):
                known[image_id] = sly.Annotation.from_json(before, meta)
        return [known[one] for one in image_ids]

    def _copy(self, group: list[Labeled], project_id: int | None, **changed: object) -> None:
        """Labels go to copies of the images in another project, by the SDK."""
        context = self._request.context
        options: dict[str, Any] = {
            "api": self._api,
            "upload_mode": self._destination.mode,
            "context": context,
            "inference_request": self._request,
            "model_prediction_suffix": self._destination.suffix,
            **changed,
        }
        images = context.setdefault("image_info", {})
        images.update({one.target.image_id: one.target.info for one in group})
        predictions = []
        for one, annotation in zip(group, self._fitted_to_project(group, project_id), strict=True):
            prediction = prediction_of(one.target)
            prediction.annotation = annotation
            predictions.append(prediction)
        try:
            self._services.upload(predictions=predictions, **options)
        finally:
            for one in group:
                images.pop(one.target.image_id, None)

    def _fitted_to_project(
        self, group: list[Labeled], project_id: int | None
    ) -> list[sly.Annotation]:
        """The annotations under the names that a project has for them, or has from now on; the
        record is told of them."""
        meta = self._meta(project_id)
        fitted = [self._fitted(one.annotation, meta) for one in group]
        if any(is_lacking for *_, is_lacking in fitted):
            # The project may have grown since: writing back an old meta would delete from it.
            with meta_lock:
                meta = self._meta(project_id, is_fresh=True)
                grown = meta
                for place, one in enumerate(group):
                    fitted[place] = self._fitted(one.annotation, grown)
                    if fitted[place][2]:
                        grown = _KnownMeta.of(fitted[place][0])
                if grown is not meta:
                    added = self._api.project.update_meta(project_id, grown)
                    self._request.context["project_meta"][project_id] = added
        for one, (_, annotation, _) in zip(group, fitted, strict=True):
            if project_id is not None:
                source_id = one.source_id or one.target.image_id
                self._record.before_upload(project_id, source_id, annotation)
        return [annotation for _, annotation, _ in fitted]

    def _fitted(
        self, annotation: sly.Annotation, meta: sly.ProjectMeta
    ) -> tuple[sly.ProjectMeta, sly.Annotation, bool]:
        """A project's meta with what an annotation needs of it, the annotation under the names of
        it, and whether something of it was lacking."""
        suffix = self._destination.suffix
        tagged = with_compatible_tags(annotation, meta, suffix)
        fitted: tuple[sly.ProjectMeta, sly.Annotation, bool]
        fitted = sdk.update_meta_and_ann(meta, tagged, suffix)
        return fitted

    def _meta(self, project_id: int | None, *, is_fresh: bool = False) -> sly.ProjectMeta:
        metas = self._request.context["project_meta"]
        if is_fresh or project_id not in metas:
            stored = self._api.project.get_meta(project_id)
            if getattr(metas.get(project_id), "stored", None) != stored:
                metas[project_id] = _KnownMeta.from_json(stored)
                metas[project_id].stored = stored
        elif not isinstance(metas[project_id], _KnownMeta):
            # What the SDK has kept of it after it added to it.
            metas[project_id] = _KnownMeta.of(metas[project_id])
        return metas[project_id]

    def _output_project(self, target: Target) -> int | None:
        """Where images are copied to; None when labels go to the images themselves."""
        if self._destination.mode == "create" and self._destination.project_id is None:
            self._destination = replace(self._destination, project_id=self._create_project(target))
        output = self._destination.project_id
        return None if output == target.project_id else output

    def _create_project(self, target: Target) -> int:
        source = self._api.project.get_info_by_id(target.project_id)
        created = self._api.project.create(
            source.workspace_id,
            name=f"Predictions from task #{self._services.task_id}",
            description=f"Auto created project from inference request {self._request.uuid}",
            change_name_if_conflict=True,
        )
        self._request.context.setdefault("project_info", {})[created.id] = created
        project_id: int = created.id
        return project_id


def _merged(before: sly.Annotation, new: sly.Annotation) -> sly.Annotation:
    """As the SDK's ``merge``, which makes three annotations for it."""
    labels = [*before.labels, *new.labels]
    return before.clone(labels=labels, img_tags=before.img_tags.add_items(new.img_tags))


class _KnownMeta(sly.ProjectMeta):  # type: ignore[misc]
    """The meta of a project, which the SDK makes JSON of for every image, to log it or not.

    That takes longer than all else about an image's labels. Whoever changes a meta makes a new one,
    and nobody changes the JSON. ``stored`` is what it was read from, if it was.
    """

    stored: dict[str, Any] | None = None
    _json: dict[str, Any] | None = None

    @classmethod
    def of(cls, meta: sly.ProjectMeta) -> _KnownMeta:
        """The same classes, tags and settings."""
        return cls(meta.obj_classes, meta.tag_metas, meta.project_type, meta.project_settings)

    def to_json(self) -> dict[str, Any]:
        if self._json is None:
            self._json = super().to_json()
        return self._json


_in_hand: Final[set[int]] = set()
_in_hand_changed: Final = threading.Condition()


@contextmanager
def _alone_with(image_ids: set[int]) -> Iterator[None]:
    """Held while labels go to these images: nobody else sends any to one of them."""
    with _in_hand_changed:
        _in_hand_changed.wait_for(lambda: _in_hand.isdisjoint(image_ids))
        _in_hand.update(image_ids)
    try:
        yield
    finally:
        with _in_hand_changed:
            _in_hand.difference_update(image_ids)
            _in_hand_changed.notify_all()


def _failure(labeled: Labeled, error: Exception) -> Failure:
    what = f"The labels of image {labeled.target.image_id} cannot be uploaded"
    is_stopped = isinstance(error, GenerationCancelledError)
    return failure_of(error, what, None if is_stopped else "upload_failed")

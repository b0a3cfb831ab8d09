"""Objects of a video on the platform: written with their figures, told apart, undone."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from serve.platform.failures import failure_of, platform_failure
from serve.platform.upload import compatible, compatible_tag_meta, meta_lock
from serve.provenance import Undone
from serve.sdk import sly

# isort: split
from supervisely.api.video.video_api import VideoInfo

_FIGURES_PER_CALL: Final = 200
_OBJECTS_PER_CALL: Final = 100
_DIGEST_BYTES: Final = 6
_DECIMALS: Final = 3
_WAITS_S: Final = (1.0, 5.0, 20.0)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class WrittenObject:
    """An object that a run wrote; ``digest`` of None: its figures may not all be there."""

    id: int
    class_name: str
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class VideoLine:
    """What a run wrote on one video."""

    video_id: int
    name: str
    objects: tuple[WrittenObject, ...] = ()

    def to_json(self) -> Json:
        objects = [[one.id, one.class_name, one.digest] for one in self.objects]
        return {"video_id": self.video_id, "name": self.name, "objects": objects}

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> VideoLine:
        objects = tuple(WrittenObject(*one) for one in stored.get("objects", ()))
        return cls(stored["video_id"], str(stored.get("name")), objects)


@dataclass(frozen=True, slots=True)
class Figure:
    """A box of the object with this place in the list of new ones, in a frame."""

    owner: int
    frame: int
    shape: sly.Rectangle


@dataclass(slots=True)
class VideoWriter:
    """Writes new objects on one video, each with the score and, unless None, the run's tag.

    ``suffix`` goes behind names that the project has with another meaning. ``track_id`` is that of
    an annotation tool which waits for figures. ``known_ids`` are the objects that were there
    before. ``note`` gets all objects so far as soon as more are there, which have no tags yet.
    """

    api: sly.Api
    info: VideoInfo
    run_tag: sly.VideoTag | None = None
    suffix: str | None = None
    track_id: object = None
    known_ids: frozenset[int] = frozenset()
    note: Callable[[Sequence[WrittenObject]], None] = lambda objects: None
    run_tag_name: str | None = None
    num_figures: int = 0
    _is_uncertain: bool = False
    _digests: list[ObjectDigest] = field(default_factory=list)
    _objects: list[WrittenObject] = field(default_factory=list)

    def write_objects(self, objects: Sequence[sly.VideoObject]) -> None:
        """The objects, without figures."""
        fitted = self._fitted(objects)
        for start in range(0, len(fitted), _OBJECTS_PER_CALL):
            batch = fitted[start : start + _OBJECTS_PER_CALL]
            ids = self._add(batch)
            for one, object_id in zip(batch, ids, strict=True):
                name = one.obj_class.name
                self._objects.append(WrittenObject(object_id, name))
                tags = [{"name": tag.name, "value": tag.value} for tag in one.tags]
                self._digests.append(ObjectDigest(name, tags, self.run_tag_name))
            self.note(self._objects)
            self._tag(batch, ids)

    def _add(self, objects: Sequence[sly.VideoObject]) -> list[int]:
        """The ids of new objects; what a call made whose answer was lost goes."""
        items = [{"classId": one.obj_class.sly_id, "entityId": self.info.id} for one in objects]
        body = {"datasetId": self.info.dataset_id, "annotationObjects": items}
        added = self._sent("annotation-objects.bulk.add", body, self._remove_bare)
        return [row["id"] for row in added]

    def _tag(self, objects: Sequence[sly.VideoObject], ids: Sequence[int]) -> None:
        tags = [
            {"tagId": tag.meta.sly_id, "objectId": object_id, "value": tag.value}
            for one, object_id in zip(objects, ids, strict=True)
            for tag in one.tags
        ]
        self.api.video.tag.append_to_objects_json(self.info.id, tags, self.info.project_id)

    def _remove_bare(self) -> None:
        """Objects that came since this began and have neither tags nor figures."""
        stored = stored_annotation(self.api, self.info)
        known = self.known_ids | {one.id for one in self._objects}
        known |= {figure["objectId"] for frame in stored["frames"] for figure in frame["figures"]}
        bare = [one["id"] for one in stored["objects"] if not one["tags"]]
        _remove(self.api, [object_id for object_id in bare if object_id not in known])

    def write_figures(
        self, figures: Iterable[Figure], should_stop: Callable[[], bool]
    ) -> list[WrittenObject] | None:
        """The objects once all their figures are there; None where it was stopped before."""
        rest = iter(figures)
        while batch := list(islice(rest, _FIGURES_PER_CALL)):
            if should_stop():
                return None
            body = {
                "entityId": self.info.id,
                "figures": [self._figure_json(one) for one in batch],
            }
            self._sent("figures.bulk.add", body, self._doubt)
            self.num_figures += len(batch)
        if self._is_uncertain:
            self._remove_doubles()
        return [
            WrittenObject(one.id, one.class_name, digest.value())
            for one, digest in zip(self._objects, self._digests, strict=True)
        ]

    def _sent(self, method: str, body: Json, on_lost: Callable[[], None]) -> list[Json]:
        """Sent again where it failed on its way, after ``on_lost``: it may have been carried out.

        Not by the SDK, which tells nobody that it sends it once more.
        """
        waits_s = iter(_WAITS_S)
        while True:
            try:
                answer = self.api.post(method, body, retries=1, raise_error=True)
                return list(answer.json())
            except Exception as error:
                wait_s = next(waits_s, None)
                if wait_s is None or not _may_be_lost(error):
                    raise
                time.sleep(wait_s)
                on_lost()

    def _doubt(self) -> None:
        """Whether figures are there twice is looked at once all are there."""
        self._is_uncertain = True

    def _remove_doubles(self) -> None:
        """Of equal figures of an object in one frame, all but one."""
        ours = {one.id for one in self._objects}
        seen: set[tuple[int, int]] = set()
        doubles = []
        for frame in stored_annotation(self.api, self.info)["frames"]:
            for figure in frame["figures"]:
                place = figure["objectId"], frame["index"]
                if figure["objectId"] in ours and place in seen:
                    doubles.append(figure["id"])
                seen.add(place)
        self.api.video.figure.remove_batch(doubles, batch_size=_FIGURES_PER_CALL)

    def _figure_json(self, figure: Figure) -> Json:
        geometry = figure.shape.to_json()
        self._digests[figure.owner].add(figure.frame, geometry)
        tracked = {} if self.track_id is None else {"trackId": self.track_id}
        return {
            "objectId": self._objects[figure.owner].id,
            "geometryType": figure.shape.geometry_name(),
            "geometry": geometry,
            "meta": {"frame": figure.frame},
            "nnCreated": True,
            "nnUpdated": True,
            **tracked,
        }

    def _fitted(self, objects: Sequence[sly.VideoObject]) -> list[sly.VideoObject]:
        """The objects under the names that the project has for their classes and tags, which it is
        given as far as it lacks them."""
        if self.run_tag is not None:
            objects = [one.clone(tags=one.tags.add(self.run_tag)) for one in objects]
        with meta_lock:
            project_id = self.info.project_id
            meta = known = sly.ProjectMeta.from_json(self.api.project.get_meta(project_id))
            fitted = []
            for one in objects:
                obj_class = _compatible_class(one.obj_class, meta, self.suffix)
                tags = []
                for tag in one.tags:
                    tag_meta = compatible_tag_meta(tag.meta, meta, self.suffix)
                    tags.append(sly.VideoTag(tag_meta, tag.value))
                    if meta.get_tag_meta(tag_meta.name) is None:
                        meta = meta.add_tag_meta(tag_meta)
                    if self.run_tag is not None and tag.name == self.run_tag.name:
                        self.run_tag_name = tag_meta.name
                if meta.get_obj_class(obj_class.name) is None:
                    meta = meta.add_obj_class(obj_class)
                collection = sly.VideoTagCollection(tags)
                fitted.append(one.clone(obj_class=obj_class, tags=collection))
            if meta is not known:
                meta = self.api.project.update_meta(project_id, meta)
        return [_with_ids(one, meta) for one in fitted]


def _with_ids(one: sly.VideoObject, meta: sly.ProjectMeta) -> sly.VideoObject:
    """With class and tags as the project has them, which know their ids."""
    tags = [sly.VideoTag(meta.get_tag_meta(tag.name), tag.value) for tag in one.tags]
    obj_class = meta.get_obj_class(one.obj_class.name)
    return one.clone(obj_class=obj_class, tags=sly.VideoTagCollection(tags))


def _may_be_lost(error: Exception) -> bool:
    """Whether a call failed on its way, or at the platform, rather than was refused."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status >= 500 if status is not None else platform_failure(error) is not None


def _compatible_class(
    wanted: sly.ObjClass, meta: sly.ProjectMeta, suffix: str | None
) -> sly.ObjClass:
    """``wanted``, or as the project has it, or renamed where the project's has another shape."""
    shapes = (wanted.geometry_type, sly.AnyGeometry)
    return compatible(
        wanted, meta.get_obj_class, lambda known: known.geometry_type in shapes, suffix
    )


class ObjectDigest:
    """12 hex digits of an object: equal for one class, one set of tags but the run's, and the same
    figures in the same frames, which are added in the order of the frames."""

    def __init__(
        self, class_name: str, tags: Iterable[Mapping[str, Any]], run_tag: str | None
    ) -> None:
        values = sorted(
            json.dumps([tag.get("name"), _rounded(tag.get("value"))], default=str)
            for tag in tags
            if tag.get("name") != run_tag
        )
        self._hash = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        self._update([class_name, values])

    def add(self, frame: int, geometry: Mapping[str, Any]) -> None:
        self._update([frame, _rounded(geometry.get("points"))])

    def value(self) -> str:
        return self._hash.hexdigest()

    def _update(self, what: object) -> None:
        text = json.dumps(what, ensure_ascii=False, sort_keys=True, default=str)
        self._hash.update(text.encode("utf-8", "backslashreplace") + b"\n")


def _rounded(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return round(float(value), _DECIMALS)
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


# What is there


def stored_annotation(api: sly.Api, info: VideoInfo) -> Json:
    """All objects and figures of a video, as the platform has them."""
    [annotation] = api.video.annotation.download_bulk(info.dataset_id, [info.id])
    return dict(annotation)


def remove_objects(
    api: sly.Api,
    info: VideoInfo,
    written: Sequence[WrittenObject],
    run_id: str,
    run_tag: str | None,
) -> frozenset[int]:
    """Takes back what a run that was cut off has written: it is written anew. The ids of the
    objects that stay."""
    ids = {one.id for one in written}
    stored = stored_annotation(api, info)["objects"]
    gone = [
        one["id"]
        for one in stored
        if one["id"] in ids or (run_tag is not None and _run_of(one, run_tag) == run_id)
    ]
    _remove(api, gone)
    return frozenset(one["id"] for one in stored).difference(gone)


def _run_of(stored: Mapping[str, Any], run_tag: str) -> object:
    tags = stored.get("tags", ())
    return next((tag.get("value") for tag in tags if tag.get("name") == run_tag), None)


def _remove(api: sly.Api, object_ids: Sequence[int]) -> None:
    api.video.object.remove_batch(list(object_ids), batch_size=_OBJECTS_PER_CALL)


def undo_line(
    api: sly.Api, line: VideoLine, run_id: str, run_tag: str | None, undone: Undone
) -> None:
    """Deletes the objects of a run on one video that nobody has changed since; the others are
    named. With ``is_shown_only`` nothing is deleted."""
    info = api.video.get_info_by_id(line.video_id)
    if info is None:
        undone.num_gone += len(line.objects)
        return
    stored = stored_annotation(api, info)
    digests = _stored_digests(stored, run_tag)
    written = {one.id: one for one in line.objects}
    unchanged: list[int] = []
    for one in stored["objects"]:
        known = written.pop(one["id"], None)
        is_marked = run_tag is not None and _run_of(one, run_tag) == run_id
        if known is None and not is_marked:
            continue
        is_same = known is not None and known.digest == digests[one["id"]]
        if is_same and (is_marked or run_tag is None):
            unchanged.append(one["id"])
            continue
        why = "" if known and known.digest else ", written in the last moments of a run"
        undone.keep(
            f"video {line.video_id} ({line.name}): object {one['id']} of class "
            f"{one.get('classTitle')!r}{why}"
        )
    undone.num_gone += len(written)
    undone.num_images += bool(unchanged)
    if not undone.is_shown_only:
        try:
            _remove(api, unchanged)
        except Exception as error:  # noqa: BLE001  (the SDK and its transport raise anything)
            what = f"{len(unchanged)} objects of video {line.video_id} cannot be deleted"
            undone.failed.append(failure_of(error, what).message)
            return
    undone.num_deleted += len(unchanged)


def _stored_digests(stored: Json, run_tag: str | None) -> dict[int, str]:
    """The digest of each object, by its id."""
    figures: dict[int, list[tuple[int, str, Json]]] = defaultdict(list)
    for frame in stored.get("frames", ()):
        for figure in frame["figures"]:
            geometry = figure["geometry"]
            order = json.dumps(geometry, sort_keys=True)
            figures[figure["objectId"]].append((frame["index"], order, geometry))
    digests = {}
    for one in stored["objects"]:
        digest = ObjectDigest(one.get("classTitle", ""), one.get("tags", ()), run_tag)
        for index, _, geometry in sorted(figures[one["id"]], key=lambda row: row[:2]):
            digest.add(index, geometry)
        digests[one["id"]] = digest.value()
    return digests

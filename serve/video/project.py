"""A Supervisely video project on disk, written frame by frame, so that a long video fits."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from florence2.errors import ImageError
from florence2.records import BoxXyxy, SizeWh
from serve.console import say
from serve.labeling.files import OutputError, Workspace, hash_of
from serve.labeling.project import DATASET, PROJECT_DIR
from serve.naming import class_color
from serve.predict.annotations import TAG_METAS
from serve.predict.geometry import rectangle_tlbr_from_box_xyxy
from serve.sdk import LabelingStatus, sly
from serve.video.tracking import FollowedFrame, Track, TrackKey

_SCORE: Final = TAG_METAS["confidence"]
# A key is made of what it is the key of: the same run gives the same file.
_KEYS: Final = uuid.UUID("5f1c5ad4-3d0b-4c55-8ab0-6a2c3f0f2c11")


class VideoProject:
    """One dataset, ``ds0``, with one video and its annotation.

    The order is what makes a kill harmless, as with images: the classes, then the annotation, then
    the video.
    """

    def __init__(self, workspace: Workspace, video: Path, *, link: bool) -> None:
        self._workspace = workspace
        self._video = video
        self._link = link
        self.folder = workspace.root / PROJECT_DIR
        dataset = self.folder / DATASET
        self._stored_video = dataset / "video" / video.name
        self.annotation_path = dataset / "ann" / f"{video.name}.json"

    def is_whole(self, annotation_hash: str) -> bool:
        """Whether the video and an annotation are here, the annotation as it was written or as
        somebody changed it."""
        try:
            is_here = self._stored_video.stat().st_size == self._video.stat().st_size
            if not is_here:
                return False
            if hash_of(self.annotation_path) == annotation_hash:
                return True
            return isinstance(json.loads(self.annotation_path.read_text("utf-8")), dict)
        except (OSError, ValueError):
            return False

    def write(
        self,
        tracks: Mapping[TrackKey, Track],
        frames: Iterable[FollowedFrame],
        size_wh: SizeWh,
        num_frames: int,
        classes: Sequence[str],
        our_hash: str,
        wrote: Callable[[str], None],
    ) -> tuple[str, int]:
        """Writes everything anew; the annotation's hash and the number of its figures.

        ``classes`` come before those that were found. ``our_hash`` is that of the annotation that
        an earlier run wrote: another one is a person's, and is moved to ``edited`` with the classes
        and tags that it uses. ``wrote`` is told the new one's before the video is brought.
        """
        self._keep_edited(our_hash)
        for folder in (self._stored_video.parent, self.annotation_path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        names = dict.fromkeys((*classes, *(track.class_name for track in tracks.values())))
        meta = sly.ProjectMeta(
            [sly.ObjClass(name, sly.Rectangle, class_color(name)) for name in names],
            [_SCORE],
            project_type=sly.ProjectType.VIDEOS.value,
        )
        self._workspace.write_text(
            self.folder / "meta.json", json.dumps(meta.to_json(), ensure_ascii=False, indent=2)
        )
        # Keys get their ids on the platform.
        self._workspace.write_text(
            self.folder / "key_id_map.json", json.dumps(sly.KeyIdMap().to_dict(), indent=2)
        )
        objects = {key: _own_object(track) for key, track in tracks.items()}
        num_figures = self._write_annotation(objects, frames, size_wh, num_frames)
        annotation_hash = hash_of(self.annotation_path)
        wrote(annotation_hash)
        self._bring_video()
        self._workspace.sync()
        return annotation_hash, num_figures

    def _write_annotation(
        self,
        objects: Mapping[TrackKey, sly.VideoObject],
        frames: Iterable[FollowedFrame],
        size_wh: SizeWh,
        num_frames: int,
    ) -> int:
        """The SDK's own JSON of an annotation with all frames, of which it would hold all."""
        collection = sly.VideoObjectCollection(list(objects.values()))
        empty = sly.VideoAnnotation(
            (size_wh[1], size_wh[0]), num_frames, collection, key=_key("video")
        )
        head = empty.to_json()
        del head["frames"]
        num_figures = 0
        with self._workspace.writing(self.annotation_path) as file:
            file.write(json.dumps(head, ensure_ascii=False)[:-1] + ', "frames": [')
            for number, frame in enumerate(frames):
                figures = [
                    _own_figure(objects[key], box, frame.index, size_wh)
                    for key, box in frame.boxes.items()
                ]
                num_figures += len(figures)
                file.write(",\n" if number else "\n")
                file.write(json.dumps(sly.Frame(frame.index, figures).to_json()))
            file.write("\n]}\n")
        return num_figures

    def _bring_video(self) -> None:
        try:
            if self._stored_video.stat().st_size == self._video.stat().st_size:
                return
        except OSError:
            # It is not here yet.
            pass
        try:
            self._workspace.bring(self._video, self._stored_video, link=self._link)
        except ImageError as error:
            raise OutputError(
                f"The video was read and could then not be copied from {str(self._video)!r}; put "
                "it back and run the same command again."
            ) from error

    def _keep_edited(self, our_hash: str) -> None:
        path = self.annotation_path
        if not path.exists() or hash_of(path) == our_hash:
            return
        target = self._workspace.set_aside(path)
        if (meta := self.folder / "meta.json").exists():
            shutil.copy2(meta, target.with_suffix(".meta.json"))
        say(f"{path.name} was there and is not what a run wrote; it is now {target}")


def video_object(
    track: Track, key: uuid.UUID | None = None, tag_key: uuid.UUID | None = None
) -> sly.VideoObject:
    """A track as an object of a video, with its score; keys that nobody names are made up."""
    name = track.class_name
    obj_class = sly.ObjClass(name, sly.Rectangle, class_color(name))
    tags = sly.VideoTagCollection([sly.VideoTag(_SCORE, round(track.score, 4), key=tag_key)])
    return sly.VideoObject(obj_class, tags, key=key)


def video_figure(
    owner: sly.VideoObject,
    box: BoxXyxy,
    frame: int,
    size_wh: SizeWh,
    number: int | None = None,
    key: uuid.UUID | None = None,
) -> sly.VideoFigure:
    """A box of an object in a frame; ``number`` is the object's, for those who ask for tracks."""
    shape = sly.Rectangle(*rectangle_tlbr_from_box_xyxy(box, size_wh))
    track_id = None if number is None else str(number)
    return sly.VideoFigure(owner, shape, frame, key, track_id=track_id, status=LabelingStatus.AUTO)


def _own_object(track: Track) -> sly.VideoObject:
    name = f"object {track.number}"
    return video_object(track, _key(name), _key(f"confidence of {name}"))


def _own_figure(
    owner: sly.VideoObject, box: BoxXyxy, frame: int, size_wh: SizeWh
) -> sly.VideoFigure:
    key = _key(f"{owner.key().hex} in {frame}")
    return video_figure(owner, box, frame, size_wh, key=key)


def _key(name: str) -> uuid.UUID:
    return uuid.uuid5(_KEYS, name)

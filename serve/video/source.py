"""Where the frames of a run in the app come from: a file, or a video of the platform.

A video of the platform is downloaded and decoded, unless few frames of it are asked for, or av is
not installed: then the platform gives single frames.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from florence2.errors import FlorenceError, GenerationCancelledError
from florence2.images import open_image
from serve.limits import readable_size
from serve.platform.failures import NotFoundError, platform_failure
from serve.platform.registry import InferenceRequest
from serve.sdk import sly
from serve.video.asking import Video
from serve.video.frames import (
    ASSUMED_RATE,
    MAX_FRAME_PIXELS,
    AskedFrame,
    Place,
    Range,
    asked_frames,
    check_frame_size,
    count_frames,
    has_library,
    open_clip,
)
from serve.video.request import FramesAsked

# isort: split
from supervisely.api.video.video_api import VideoInfo

FEW_FRAMES: Final = 16
"""So many frames are fetched one by one rather than with the whole video."""
_FRAMES_AT_A_TIME: Final = 8
_WAITS_S: Final = (0.5, 2.0)


class NoRoomForVideoError(FlorenceError):
    """There is no room on the disk for a video."""

    code = "disk_full"


def video_of_file(path: Path) -> Video:
    """A video file; VideoError for one that is damaged."""
    clip = open_clip(path)
    said = clip.num_frames_said
    return Video(
        path.name,
        clip.size_wh,
        clip.rate,
        said or None,
        said or count_frames(path),
        lambda wanted, after: asked_frames(clip, wanted, after),
    )


def video_info(api: sly.Api, video_id: int) -> VideoInfo:
    """What the platform knows of a video; NotFoundError."""
    info = api.video.get_info_by_id(video_id)
    if info is None:
        raise NotFoundError(
            f"There is no video {video_id}, or no access to it; check the id, which is a video's "
            "and not an image's."
        )
    return info


@contextmanager
def video_of_platform(
    api: sly.Api,
    info: VideoInfo,
    asked: FramesAsked,
    request: InferenceRequest,
) -> Iterator[Video]:
    """A video of the platform, and its file as long as this is open.

    RequestError where it has none of the frames, VideoError for one that is damaged,
    NoRoomForVideoError where the disk has no room for it.
    """
    num_frames = info.frames_count or None
    rate = _rate_of(info)
    ids = {"video_id": info.id, "dataset_id": info.dataset_id, "project_id": info.project_id}
    wanted = asked.within(num_frames, rate)
    size_wh = (info.frame_width or 0, info.frame_height or 0)
    check_frame_size(size_wh, info.name)
    if num_frames is not None and all(size_wh) and _is_fetched(wanted.count(num_frames)):

        def frames(wanted: Range, after: Place | None) -> Generator[AskedFrame]:
            return _fetched_frames(api, info.id, rate, wanted, after)

        yield Video(info.name, size_wh, rate, num_frames, num_frames, frames, ids)
        return
    with TemporaryDirectory(prefix="video-") as folder:
        path = Path(folder) / f"video{Path(info.name).suffix[:8]}"
        _download(api, info, path, request)
        video = video_of_file(path)
        known = num_frames or video.num_frames
        likely = known or video.likely_frames
        yield replace(video, name=info.name, num_frames=known, likely_frames=likely, ids=ids)


def _is_fetched(num_asked: int) -> bool:
    return num_asked <= FEW_FRAMES or not has_library("av")


def _rate_of(info: VideoInfo) -> float:
    """Frames in a second; the SDK's own duration is in whole seconds."""
    duration_s = (info.file_meta or {}).get("duration")
    if isinstance(duration_s, int | float) and duration_s > 0 and info.frames_count:
        return float(info.frames_count / duration_s)
    return ASSUMED_RATE


def _fetched_frames(
    api: sly.Api, video_id: int, rate: float, wanted: Range, after: Place | None
) -> Generator[AskedFrame]:
    last = wanted.first if wanted.last is None else wanted.last
    before = wanted.first - 1 if after is None else after.index
    indexes = [n for n in range(wanted.first, last + 1, wanted.every) if n > before]
    for start in range(0, len(indexes), _FRAMES_AT_A_TIME):
        batch = indexes[start : start + _FRAMES_AT_A_TIME]
        pictures = api.video.frame.download_bytes(video_id, batch)
        for index, picture in zip(batch, pictures, strict=True):
            times_s = tuple(number / rate for number in range(before + 1, index + 1))
            place = Place(index, None, index / rate)
            with open_image(picture, MAX_FRAME_PIXELS) as opened:
                pixels = np.array(opened.image)
            yield AskedFrame(place, times_s, 0, pixels)
            before = index


def _download(api: sly.Api, info: VideoInfo, path: Path, request: InferenceRequest) -> None:
    """The video's file; a transfer that breaks off is begun again."""
    size = _size_of(info)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise _no_room(info, size)
    for wait_s in (*_WAITS_S, None):
        request.set_stage(InferenceRequest.Stage.PREPARING, 0, max(size, 1))
        try:
            api.video.download_path(info.id, str(path), progress_cb=_progress(request))
        except FlorenceError:
            raise
        except OSError as error:
            if platform_failure(error) is None:
                raise _no_room(info, size) from error
            if wait_s is None:
                raise
            time.sleep(wait_s)
        else:
            return


def _progress(request: InferenceRequest) -> Callable[[int], None]:
    def arrived(count: int) -> None:
        if request.is_stopped():
            raise GenerationCancelledError("The run was stopped while the video was downloaded.")
        request.done(count)

    return arrived


def _size_of(info: VideoInfo) -> int:
    size: Any = (info.file_meta or {}).get("size")
    try:
        return max(0, int(size))
    except (TypeError, ValueError):
        return 0


def _no_room(info: VideoInfo, size: int) -> NoRoomForVideoError:
    return NoRoomForVideoError(
        f"A video is downloaded before it is decoded, and {info.name!r} ({readable_size(size)}) "
        "does not fit on the disk here; make room, or name another folder in TMPDIR."
    )

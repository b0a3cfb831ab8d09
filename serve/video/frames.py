"""The frames of a video file, decoded in order: which are asked about, and when they are.

A frame's index is its place among all that can be decoded, from 0, as in annotations of videos.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from florence2.errors import FlorenceError
from florence2.records import SizeWh

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# What the SDK reads back from a video project.
EXTENSIONS: Final = (".avi", ".mp4", ".3gp", ".flv", ".webm", ".wmv", ".mov", ".mkv")
INSTALL: Final = 'pip install "serve-florence-2[video]"'
ASSUMED_RATE: Final = 25.0
MAX_FRAME_PIXELS: Final = 8192 * 8192
"""Several frames are in memory at once, and a file of some kilobytes can claim any size."""
# Formats that name files, by which a client would be answered about any video on this machine.
_LISTS: Final = frozenset({"hls", "dash", "concat", "imf"})


_BOUNDED: Final = {"max_pixels": str(MAX_FRAME_PIXELS)}


class VideoError(FlorenceError):
    """The file is no video, or none of its frames can be decoded."""

    code = "bad_video"


def is_video(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).lower().endswith(EXTENSIONS)


@dataclass(frozen=True, slots=True)
class Clip:
    """A video file. ``size_wh`` is that of an upright frame, ``turns`` the quarter turns to the
    left that make it upright; ``stored_wh`` is its size before.

    ``num_frames_said`` is what the file's header says, 0 where it says nothing; ``rate`` are
    frames in a second, on average.
    """

    path: Path
    size_wh: SizeWh
    stored_wh: SizeWh
    turns: int
    rate: float
    num_frames_said: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run is in a video. ``pts`` is the frame's time stamp in the file, None where the
    file's time stamps do not say which frame is which."""

    index: int
    pts: int | None
    time_s: float


@dataclass(frozen=True, slots=True, eq=False)
class AskedFrame:
    """A frame to ask about, as RGB [h, w, 3].

    ``times_s`` are the seconds of all frames after the one that was asked before, its own last.
    ``damaged`` counts what could not be decoded since then.
    """

    place: Place
    times_s: tuple[float, ...]
    damaged: int
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Range:
    """Every ``every``-th frame from ``first`` to ``last``, both included; without ``last`` to the
    end. The last frame of it is asked about in any case, so that nothing after it is unknown."""

    every: int = 1
    first: int = 0
    last: int | None = None

    def __contains__(self, index: object) -> bool:
        return (
            isinstance(index, int)
            and index >= self.first
            and (self.last is None or index <= self.last)
        )

    def is_asked(self, index: int) -> bool:
        return (index - self.first) % self.every == 0 or index == self.last

    def count(self, num_frames: int) -> int:
        """How many frames of a video are asked about."""
        end = num_frames - 1 if self.last is None else min(self.last, num_frames - 1)
        steps = max(0, end - self.first)
        return 0 if end < self.first else -(-steps // self.every) + 1


def need_libraries(*names: str) -> None:
    """Raises VideoError where the packages for videos, or these of them, cannot be imported."""
    for name in names or ("av", "trackers"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise VideoError(
                f"Videos are decoded by av and followed by trackers, and {error.name!r} is not "
                f"installed; {INSTALL}."
            ) from error


def has_library(name: str) -> bool:
    """Whether a package is installed, without importing it."""
    return importlib.util.find_spec(name) is not None


def open_clip(path: Path) -> Clip:
    """What there is to know of a video. Raises VideoError for a file without frames, or with
    frames of more than ``MAX_FRAME_PIXELS``."""
    need_libraries("av")
    check_frame_size(_size_in_header(path), path.name)
    with _opened(path) as (container, stream):
        said, rate = stream.frames, stream.average_rate or stream.guessed_rate
        frame = next((frame for frame, _ in _decoded(container, stream)), None)
    if frame is None:
        raise VideoError(
            f"A video has frames, and none of {path.name!r} can be decoded; it is empty or "
            "damaged: give a whole file."
        )
    turns = round(frame.rotation / 90) % 4
    stored = (frame.width, frame.height)
    size = stored if turns % 2 == 0 else (stored[1], stored[0])
    return Clip(path, size, stored, turns, float(rate or ASSUMED_RATE), said)


def check_frame_size(size_wh: SizeWh, name: str) -> None:
    """VideoError for a frame that is too large to be decoded."""
    width, height = size_wh
    if width * height > MAX_FRAME_PIXELS:
        raise VideoError(
            f"A frame of a video can have at most {MAX_FRAME_PIXELS / 1e6:.0f} million pixels, and "
            f"those of {name!r} are {width}x{height}; scale the video down."
        )


def check_without_av(path: Path) -> None:
    """VideoError for a file that OpenCV would decode into frames that are too large."""
    from florence2.opencv import cv2

    capture = cv2.VideoCapture(str(path))
    try:
        width, height = (
            int(capture.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        )
    finally:
        capture.release()
    check_frame_size((width, height), path.name)


def _size_in_header(path: Path) -> SizeWh:
    """Of a frame, zeros where no header says it."""
    import av

    try:
        # Opening a file decodes its first frames, except by a decoder that is not allowed.
        with av.open(str(path), container_options={"codec_whitelist": "none"}) as container:
            for stream in _moving(container):
                return stream.width, stream.height
    except av.FFmpegError:
        # Whoever opens it to decode it says what is wrong.
        return 0, 0
    return 0, 0


def _moving(container: InputContainer) -> list[VideoStream]:
    """The streams that are no cover picture."""
    import av

    is_cover = av.stream.Disposition.attached_pic
    return [one for one in container.streams.video if not one.disposition & is_cover]


def asked_frames(clip: Clip, wanted: Range, after: Place | None = None) -> Generator[AskedFrame]:
    """The frames that are asked about, in order, only those behind ``after``, if given.

    Decoding stops where the file does, also in the middle of what its header promises.
    """
    times: list[float] = []
    damaged = 0
    held: tuple[VideoFrame, Place] | None = None
    for frame, place, lost in _placed(clip, after):
        damaged += lost
        if place.index not in wanted:
            if wanted.last is not None and place.index > wanted.last:
                break
            continue
        times.append(place.time_s)
        if wanted.is_asked(place.index):
            yield AskedFrame(place, tuple(times), damaged, _upright(frame, clip))
            times, damaged, held = [], 0, None
            if place.index == wanted.last:
                return
        else:
            held = frame, place
    if held is not None:
        # Nobody knew that it is the last one.
        yield AskedFrame(held[1], tuple(times), damaged, _upright(held[0], clip))


def count_frames(path: Path) -> int:
    """How many frames a file seems to have, without decoding them: some packets may be damaged."""
    with _opened(path) as (container, stream):
        return sum(packet.size > 0 for packet in _packets(container, stream))


def frame_at(clip: Clip, place: Place) -> NDArray[np.uint8] | None:
    """One frame as RGB [h, w, 3], found by its time stamp; None where the file has none by it."""
    import av

    if place.pts is None:
        return None
    with _opened(clip.path) as (container, stream):
        try:
            container.seek(place.pts, stream=stream)
        except av.FFmpegError:
            return None
        for frame, _ in _decoded(container, stream):
            if frame.pts == place.pts:
                return _upright(frame, clip)
            if frame.pts is None or frame.pts > place.pts:
                return None
    return None


class _opened:  # noqa: N801 - it is used as a function
    """A file with its video stream; VideoError in a sentence where it has none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._container: InputContainer | None = None

    def __enter__(self) -> tuple[InputContainer, VideoStream]:
        import av

        name = self._path.name
        try:
            container = self._container = av.open(str(self._path), "r", options=dict(_BOUNDED))
        except OSError as error:
            raise VideoError(
                f"A video is read from its file, and {name!r} cannot be read "
                f"({error.strerror or error}); check its name and its rights."
            ) from error
        except av.FFmpegError as error:
            raise VideoError(
                f"A video is a file of MP4, MKV, AVI or the like, and {name!r} cannot be opened as "
                f"one ({error.strerror}); it is cut, damaged or of another kind: give a whole file."
            ) from error
        if container.format.name in _LISTS:
            container.close()
            raise VideoError(
                f"A video holds its own frames, and {name!r} is a list of other files "
                f"({container.format.name}); give the video itself."
            )
        streams = _moving(container)
        if not streams:
            kinds = sorted({one.type for one in container.streams})
            container.close()
            raise VideoError(
                f"A video has moving pictures, and {name!r} holds "
                f"{'only ' + ' and '.join(kinds) if kinds else 'none'}; give a file with a video "
                "stream."
            )
        # A frame that is larger than the header says counts as damaged.
        streams[0].codec_context.options = dict(_BOUNDED)
        return container, streams[0]

    def __exit__(self, *_: object) -> None:
        if self._container is not None:
            self._container.close()


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Any]:
    """The packets until the file ends; what is wrong with its end ends it."""
    import av

    packets = iter(container.demux(stream))
    while True:
        try:
            yield next(packets)
        except StopIteration:
            return
        except av.FFmpegError as error:
            if isinstance(error, OSError):
                # The disk, and not what is in the file: the rest is there.
                raise VideoError(
                    f"The video could not be read further ({error.strerror}); run the same "
                    "command again."
                ) from error
            return


def _decoded(container: InputContainer, stream: VideoStream) -> Generator[tuple[VideoFrame, int]]:
    """Frames in the order in which they are shown, each with how many packets before were bad."""
    import av

    damaged = 0
    ended = False
    for packet in _packets(container, stream):
        ended = packet.size == 0
        try:
            frames = packet.decode()
        except av.FFmpegError:
            damaged += 1
            continue
        for frame in frames:
            yield frame, damaged + frame.is_corrupt
            damaged = 0
    if not ended:
        # The end of a cut file is no end to its decoder, which holds frames back.
        for frame in _flushed(stream):
            yield frame, damaged + frame.is_corrupt
            damaged = 0


def _flushed(stream: VideoStream) -> list[VideoFrame]:
    import av

    try:
        return list(stream.decode(None))
    except av.FFmpegError:
        return []


def _placed(clip: Clip, after: Place | None) -> Generator[tuple[VideoFrame, Place, int]]:
    """Decoded frames with their places, those behind ``after``.

    Where the file's time stamps allow, decoding begins shortly before; else at the start.
    """
    if after is not None:
        with _opened(clip.path) as (container, stream):
            frames = _decoded(container, stream)
            if _is_found(frames, container, stream, after):
                yield from _from_here(frames, after, clip)
                return
    with _opened(clip.path) as (container, stream):
        frames = _decoded(container, stream)
        if after is not None:
            deque(islice(frames, after.index + 1), maxlen=0)
        yield from _from_here(frames, after, clip)


def _from_here(
    frames: Iterator[tuple[VideoFrame, int]], last: Place | None, clip: Clip
) -> Generator[tuple[VideoFrame, Place, int]]:
    for frame, damaged in frames:
        last = _place_of(frame, last, clip.rate)
        yield frame, last, damaged


def _is_found(
    frames: Iterator[tuple[VideoFrame, int]],
    container: InputContainer,
    stream: VideoStream,
    place: Place,
) -> bool:
    """Whether the next of ``frames`` is the one behind ``place``, found by its time stamp."""
    import av

    if place.pts is None:
        return False
    try:
        container.seek(place.pts, stream=stream)
    except av.FFmpegError:
        return False
    for frame, _ in frames:
        if frame.pts is None or frame.pts > place.pts:
            return False
        if frame.pts == place.pts:
            return True
    return False


def _place_of(frame: VideoFrame, last: Place | None, rate: float) -> Place:
    """Where a frame is, by the one before it; a time stamp that does not grow is none."""
    index = 0 if last is None else last.index + 1
    earliest_s = float("-inf") if last is None else last.time_s
    time_s = frame.time
    if time_s is None or time_s <= earliest_s:
        time_s = 0.0 if last is None else last.time_s + 1 / rate
        return Place(index, None, time_s)
    is_known = last is None or last.pts is not None
    return Place(index, frame.pts if is_known else None, time_s)


def _upright(frame: VideoFrame, clip: Clip) -> NDArray[np.uint8]:
    """The frame as players show it; one of another size than the first is scaled to that."""
    width, height = clip.stored_wh
    scaled = frame.reformat(width=width, height=height, format="rgb24")
    return np.ascontiguousarray(np.rot90(scaled.to_ndarray(), clip.turns))

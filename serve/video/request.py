"""Which frames of a video a request asks about, in which order, and whether objects are followed.

Read of its state in every spelling that the SDK and its clients have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from florence2.errors import RequestError, shown, unknown_name
from serve.platform.request_state import Destination
from serve.video.frames import Range

State = Mapping[str, Any]
VideoMode = Literal["append", "skip_labeled", "replace_own"]

VIDEO_ID_KEYS: Final = ("videoId", "video_id")
_FIRST_KEYS: Final = ("startFrameIndex", "start_frame_index", "start_frame")
_END_KEYS: Final = ("endFrameIndex", "end_frame_index", "end_frame")
_COUNT_KEYS: Final = ("framesCount", "frames_count", "num_frames")
_STEP_KEYS: Final = ("stride", "step")
# The SDK's session sends the first, and its own app reads the last one only.
_DIRECTION_KEYS: Final = ("framesDirection", "frames_direction", "direction")
_DIRECTIONS: Final = ("forward", "backward")
# Clients name the SDK's tracker, whatever follows the objects then.
TRACKERS: Final = ("botsort", "ocsort")
VIDEO_MODES: Final[tuple[VideoMode, ...]] = ("append", "skip_labeled", "replace_own")
_LONGEST_S: Final = 10**12
_MOST_FRAMES: Final = 10**12


@dataclass(frozen=True, slots=True)
class FramesAsked:
    """The frames of a request. ``first`` of None: the first one, or backwards the last.

    Of ``num_frames``, ``end`` (the frame after the last one that may be asked) and ``duration_s``
    the first that is there says how far it goes; none of them: as far as the video.
    """

    step: int = 1
    first: int | None = None
    num_frames: int | None = None
    end: int | None = None
    duration_s: float | None = None
    is_backward: bool = False

    @classmethod
    def of(cls, state: State, *, is_end_asked: bool = False) -> FramesAsked:
        """RequestError for what is no such number. ``is_end_asked``: the frame ``endFrameIndex`` is
        asked too, which the SDK has so for a video that is sent, and not for one of the platform.
        """
        direction = _first_of(state, _DIRECTION_KEYS)[1]
        if direction is not None and direction not in _DIRECTIONS:
            name = direction if isinstance(direction, str) else shown(direction)
            raise RequestError(unknown_name(_DIRECTION_KEYS[0], name, _DIRECTIONS))
        is_backward = direction == "backward"
        end = _whole(state, _END_KEYS, least=0)
        if end is not None and is_end_asked:
            end += -1 if is_backward else 1
        return cls(
            _whole(state, _STEP_KEYS, least=1) or 1,
            _whole(state, _FIRST_KEYS, least=0),
            _whole(state, _COUNT_KEYS, least=1),
            end,
            _duration_s(state.get("duration")),
            is_backward,
        )

    def within(self, num_frames: int | None, rate: float) -> Range:
        """These frames of a video with ``num_frames``, None where nobody knows how many it has.

        RequestError where the video has none of them.
        """
        first = self.first
        if first is None:
            first = num_frames - 1 if self.is_backward and num_frames else 0
        reach = self._reach(first, rate)
        lowest, above = first, first + 1
        if self.is_backward:
            lowest = 0 if reach is None else max(0, first - reach + 1)
        elif reach is not None or num_frames is not None:
            ends = [first + reach] if reach is not None else []
            above = min(ends + ([num_frames] if num_frames is not None else []))
        else:
            return Range(self.step, first)
        if above <= lowest or (num_frames is not None and first >= num_frames):
            has = "no known number of" if num_frames is None else str(num_frames)
            raise RequestError(
                "A request asks for at least one frame that a video has, by their numbers from 0: "
                f"this one has {has} frames, and none of them is in the range that was received "
                f"(from {_short(first)}{'' if reach is None else f', {_short(reach)} frames'}); "
                "change startFrameIndex or framesCount."
            )
        if self.is_backward:
            return Range(self.step, first - (first - lowest) // self.step * self.step, first)
        return Range(self.step, first, first + (above - 1 - first) // self.step * self.step)

    def _reach(self, first: int, rate: float) -> int | None:
        """Over how many frames it goes, those between asked ones counted."""
        if self.num_frames is not None:
            return self.num_frames
        if self.end is not None:
            return max(0, first - self.end if self.is_backward else self.end - first)
        return None if self.duration_s is None else int(self.duration_s * rate)


@dataclass(frozen=True, slots=True)
class VideoRequest:
    """What a request wants of a video. ``notes`` say what of it makes no difference.

    ``mode`` of None: the answers are returned and nothing is changed. ``skip_labeled`` leaves a
    video with objects alone, ``replace_own`` takes the place of what earlier runs wrote and nobody
    has changed since. ``suffix`` goes behind names that the project has with another meaning.
    """

    frames: FramesAsked
    is_followed: bool
    notes: tuple[str, ...] = ()
    mode: VideoMode | None = None
    suffix: str | None = None

    @classmethod
    def of(cls, state: State) -> VideoRequest:
        """What is asked of a video of the platform; RequestError for what is not understood."""
        destination = Destination.of(state)
        mode = destination.mode
        if destination.project_id is not None:
            raise RequestError(
                "The labels of a video are written on the video itself, and output_project_id was "
                "received; copy the video there first, and label the copy."
            )
        if mode is not None and mode not in VIDEO_MODES:
            raise RequestError(
                f"Labels of a video are added: upload_mode is one of {', '.join(VIDEO_MODES)}, and "
                f"{mode} was received; choose one of them."
            )
        asked = cls._of(state, is_end_asked=False)
        return replace(asked, mode=mode, suffix=destination.suffix)

    @classmethod
    def of_sent(cls, state: State) -> VideoRequest:
        """What is asked of a video that is sent, which is nowhere to write labels to."""
        if state.get("upload_mode") is not None or state.get("output_project_id") is not None:
            raise RequestError(
                "A video that is sent gets its answer and lies on no platform, and upload_mode was "
                "received; leave it out, or upload the video and ask for it by its id."
            )
        return cls._of(state, is_end_asked=True)

    @classmethod
    def _of(cls, state: State, *, is_end_asked: bool) -> VideoRequest:
        tracker = state.get("tracker")
        if tracker is not None and tracker not in ("", *TRACKERS):
            name = tracker if isinstance(tracker, str) else shown(tracker)
            raise RequestError(unknown_name("tracker", name, TRACKERS))
        notes: tuple[str, ...] = ()
        if tracker and state.get("tracker_settings"):
            notes = (
                "tracker_settings are those of another tracker than the one that follows objects "
                "here, and make no difference.",
            )
        return cls(FramesAsked.of(state, is_end_asked=is_end_asked), bool(tracker), notes)


def video_id_of(state: State) -> int:
    """The video that a request names; RequestError."""
    key, value = _first_of(state, VIDEO_ID_KEYS)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RequestError(
            f"{key} is a whole number above 0, and {shown(value)} was received; correct it."
        )
    return value


def _first_of(state: State, keys: Sequence[str]) -> tuple[str, Any]:
    """The first of several spellings that has a value."""
    for key in keys:
        if state.get(key) is not None:
            return key, state[key]
    return keys[0], None


def _whole(state: State, keys: Sequence[str], *, least: int) -> int | None:
    key, value = _first_of(state, keys)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RequestError(
            f"{key} is a whole number from {least}, and {shown(value)} was received; correct it "
            "or leave it out."
        )
    # More is the same, and nothing that can be computed with as a float.
    return min(value, _MOST_FRAMES)


def _duration_s(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _LONGEST_S:
        return float(value)
    raise RequestError(
        f"duration is a number of seconds above 0, and {shown(value)} was received; correct it or "
        "leave it out."
    )


def _short(number: int) -> str:
    """A number that somebody made as long as a book is no use in a sentence."""
    return str(number) if number < _MOST_FRAMES else "more than any video has"

"""What was found in some frames, followed through all of them: each object keeps its number.

Each class is followed on its own, so that two things of different classes that cross are never
taken for each other. The tracker is ``trackers``' OC-SORT; ``bench/video.py`` compares it with
others.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

from florence2.evaluation.detection import box_ious
from florence2.records import BoxXyxy
from serve.video.journal import Detection, Seen

LOST_S: Final = 1.0
"""How long an object may be out of sight and keep its number."""
SURE_SCORE: Final = 0.1
"""A box of this score may begin a track, a less sure one only goes on with one."""
# How much a box overlaps with where its object is expected.
_LEAST_IOU: Final = 0.2
# Of an object that was found once, nobody knows whether it is there.
_LEAST_FOUND: Final = 2
# Frames without an answer in a row, before which nothing is looked up any more.
_MOST_WAITING: Final = 64
# The unit in which trackers counts how long something may be lost.
_TRACKERS_RATE: Final = 30.0

TrackKey = tuple[str, int]
"""A class and a number in it."""


class Tracker(Protocol):
    """Follows the boxes of one class through the frames that are asked about."""

    def follow(self, found: list[Detection], time_s: float) -> list[int | None]:
        """The number of each box, None where it is not followed."""


MakeTracker = Callable[[float], Tracker]
"""Makes one for so many asked frames a second."""


class LibraryTracker:
    """One of the trackers of the package ``trackers``."""

    def __init__(self, tracker: Any) -> None:  # noqa: ANN401 - a package without a base type
        self._tracker = tracker

    def follow(self, found: list[Detection], time_s: float) -> list[int | None]:
        import supervision

        detections = supervision.Detections(
            xyxy=np.array([one.box_xyxy for one in found], np.float64).reshape(-1, 4),
            confidence=np.array([one.score for one in found], np.float64),
            # They come back in another order.
            class_id=np.arange(len(found)),
        )
        followed = self._tracker.update(detections, timestamp=time_s)
        numbers: list[int | None] = [None] * len(found)
        if len(followed):
            for place, number in zip(followed.class_id, followed.tracker_id, strict=True):
                numbers[int(place)] = int(number) if number >= 0 else None
        return numbers


def oc_sort(asked_rate: float) -> Tracker:
    """OC-SORT for so many asked frames a second; each box may begin a track."""
    import trackers

    return LibraryTracker(
        trackers.OCSORTTracker(
            **rate_options(asked_rate),
            minimum_consecutive_frames=1,
            minimum_iou_threshold=_LEAST_IOU,
            high_conf_det_threshold=SURE_SCORE,
        )
    )


def rate_options(asked_rate: float) -> dict[str, Any]:
    """How long a tracker of the package waits for an object, in its own units."""
    return {
        "frame_rate": asked_rate,
        "lost_track_buffer": math.ceil(_lost_s(asked_rate) * _TRACKERS_RATE),
    }


def _lost_s(asked_rate: float) -> float:
    """Where frames are asked rarely, an object may still be missed once."""
    return max(LOST_S, _LEAST_FOUND / asked_rate)


@dataclass(slots=True)
class Track:
    """One object. ``number`` is its place in the order in which objects appear, from 1."""

    class_name: str
    number: int
    num_found: int = 0
    score_sum: float = 0.0

    @property
    def score(self) -> float:
        """The mean of its detections' scores."""
        return self.score_sum / self.num_found


def find_tracks(
    seen: Iterable[Seen], asked_rate: float, make: MakeTracker = oc_sort
) -> tuple[dict[TrackKey, Track], int]:
    """Every object that was found more than once, in the order in which they appear, and how many
    boxes belong to none. In a range of one frame, every object counts."""
    tracks: dict[TrackKey, Track] = {}
    num_asked = loose = 0
    for frame, keys in keyed(seen, asked_rate, make):
        num_asked += frame.failed is None
        for one, key in zip(frame.found, keys, strict=True):
            if key is None:
                loose += 1
                continue
            track = tracks.setdefault(key, Track(one.class_name, 0))
            track.num_found += 1
            track.score_sum += one.score
    least = _LEAST_FOUND if num_asked > 1 else 1
    kept = {key: track for key, track in tracks.items() if track.num_found >= least}
    for number, track in enumerate(kept.values(), 1):
        track.number = number
    return kept, loose + sum(one.num_found for one in tracks.values() if one.num_found < least)


@dataclass(frozen=True, slots=True)
class FollowedFrame:
    """The boxes of a frame by the object that they belong to."""

    index: int
    boxes: Mapping[TrackKey, BoxXyxy]


def followed_frames(
    seen: Iterable[Seen],
    tracks: Mapping[TrackKey, Track],
    asked_rate: float,
    make: MakeTracker = oc_sort,
) -> Iterator[FollowedFrame]:
    """Every frame in which an object is, in order; between two asked frames, boxes move straight.

    An object that was not found for a while and then was again is taken to have been there. What
    is in memory does not grow with the video.
    """
    window = _Window(_lost_s(asked_rate))
    for frame, keys in keyed(seen, asked_rate, make):
        window.add(frame)
        for one, key in zip(frame.found, keys, strict=True):
            if key is not None and key in tracks:
                window.put(key, one.box_xyxy)
        yield from window.settled()
    yield from window.rest()


def keyed(
    seen: Iterable[Seen], asked_rate: float, make: MakeTracker
) -> Iterator[tuple[Seen, list[TrackKey | None]]]:
    """Frames with the object of each box; a frame that failed is as if it had not been asked.

    A tracker gives an object its number when it sees it again: its first box is found then. Where
    there is one frame only, each of its boxes is an object.
    """
    trackers: dict[str, Tracker] = {}
    known: set[TrackKey] = set()
    # The last frame that was answered, and those behind it that were not.
    waiting: list[tuple[Seen, list[TrackKey | None]]] = []
    num_answered = 0
    for frame in seen:
        if frame.failed is not None:
            waiting.append((frame, []))
            if len(waiting) > _MOST_WAITING:
                yield from waiting
                waiting = []
            continue
        keys = _keys_of(frame, trackers, lambda: make(asked_rate))
        born = [
            (key, one)
            for key, one in zip(keys, frame.found, strict=True)
            if key and key not in known
        ]
        for key, one in born:
            known.add(key)
            if waiting:
                _give_first_box(key, one, *waiting[0])
        yield from waiting
        waiting = [(frame, keys)]
        num_answered += 1
    if num_answered == 1:
        waiting = [
            (frame, [(one.class_name, place) for place, one in enumerate(frame.found)])
            for frame, _ in waiting
        ]
    yield from waiting


def _keys_of(
    frame: Seen, trackers: dict[str, Tracker], make: Callable[[], Tracker]
) -> list[TrackKey | None]:
    by_class: dict[str, list[int]] = {name: [] for name in trackers}
    for place, one in enumerate(frame.found):
        by_class.setdefault(one.class_name, []).append(place)
    keys: list[TrackKey | None] = [None] * len(frame.found)
    for name, places in by_class.items():
        tracker = trackers.get(name) or trackers.setdefault(name, make())
        numbers = tracker.follow([frame.found[place] for place in places], frame.place.time_s)
        for place, number in zip(places, numbers, strict=True):
            keys[place] = None if number is None else (name, number)
    return keys


def _give_first_box(
    key: TrackKey, one: Detection, before: Seen, keys: list[TrackKey | None]
) -> None:
    """Of the frame before, the box that overlaps most and is nobody's is the object's first one."""
    free = [
        place
        for place, other in enumerate(before.found)
        if keys[place] is None and other.class_name == one.class_name
    ]
    if not free:
        return
    overlaps = box_ious([before.found[place].box_xyxy for place in free], [one.box_xyxy])[:, 0]
    if overlaps.max() > 0:
        keys[free[int(overlaps.argmax())]] = key


@dataclass(slots=True)
class _Frame:
    index: int
    time_s: float
    boxes: dict[TrackKey, BoxXyxy] = field(default_factory=dict)


class _Window:
    """The frames into which a box may still be put, because its object may be found again."""

    def __init__(self, lost_s: float) -> None:
        self._lost_s = lost_s
        self._frames: deque[_Frame] = deque()
        self._last: dict[TrackKey, tuple[_Frame, BoxXyxy]] = {}

    def add(self, seen: Seen) -> None:
        first = seen.place.index - len(seen.times_s) + 1
        self._frames += [_Frame(first + place, time) for place, time in enumerate(seen.times_s)]

    def put(self, key: TrackKey, box_xyxy: BoxXyxy) -> None:
        """A box in the last frame, and what is between it and the last one of its object."""
        now = self._frames[-1]
        before = self._last.get(key)
        if before is not None:
            for frame in self._frames:
                if before[0].index < frame.index < now.index:
                    share = (frame.time_s - before[0].time_s) / (now.time_s - before[0].time_s)
                    frame.boxes[key] = _between(before[1], box_xyxy, share)
        now.boxes[key] = box_xyxy
        self._last[key] = now, box_xyxy

    def settled(self) -> Iterator[FollowedFrame]:
        """The frames into which nothing is put any more."""
        # A tracker looks at the frame in which the time is over.
        limit_s = self._frames[-1].time_s - 2 * self._lost_s
        self._last = {key: one for key, one in self._last.items() if one[0].time_s >= limit_s}
        earliest = min((frame.index for frame, _ in self._last.values()), default=math.inf)
        while len(self._frames) > 1 and self._frames[0].index <= min(
            earliest, self._frames[-1].index - 1
        ):
            yield from _shown(self._frames.popleft())

    def rest(self) -> Iterator[FollowedFrame]:
        while self._frames:
            yield from _shown(self._frames.popleft())


def _shown(frame: _Frame) -> Iterator[FollowedFrame]:
    if frame.boxes:
        yield FollowedFrame(frame.index, frame.boxes)


def _between(start: BoxXyxy, end: BoxXyxy, share: float) -> BoxXyxy:
    x1, y1, x2, y2 = (a + (b - a) * share for a, b in zip(start, end, strict=True))
    return x1, y1, x2, y2

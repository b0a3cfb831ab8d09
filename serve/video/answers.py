"""What the SDK's clients get of a video: an entry for each frame that is asked about, in order.

Where objects are followed, each label of a frame has the number of its object in the annotation's
custom data, and the final result has the objects of the whole range as a video annotation.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Final, Protocol

from florence2.records import Failure
from serve.labeled_data import same_objects
from serve.platform.failures import PartialFailureError, failure_json
from serve.platform.registry import InferenceRequest, wait_while_paused
from serve.platform.request_state import State
from serve.platform.run import RunServices
from serve.sdk import sly
from serve.video.asking import Asked, FrameAsker, Outcome, Video, no_frames
from serve.video.detections import check_gives_boxes, seen_of
from serve.video.frames import AskedFrame, Range, need_libraries
from serve.video.journal import FrameJournal, Seen, begin_journal
from serve.video.project import video_figure, video_object
from serve.video.request import VideoRequest
from serve.video.tracking import (
    TrackKey,
    find_tracks,
    followed_frames,
    keyed,
    oc_sort,
)

_ENTRIES_AT_A_TIME: Final = 100


def answer_video(
    video: Video,
    asked: VideoRequest,
    api: sly.Api | None,
    state: State,
    request: InferenceRequest,
    services: RunServices,
) -> None:
    """Asks about the frames of a request; entries and the final result go to ``request``.

    A frame that failed has an entry with its ``error``. Stopped, it ends with what is done.
    Raises RequestError for a range that the video does not have, PartialFailureError at the end
    where the video has fewer frames than it says.
    """
    asker = FrameAsker(video, api, state, request, services)
    if asked.is_followed:
        check_gives_boxes(asker.settings, "leave out tracker, or ask <OD> or a text")
        need_libraries("trackers")
    wanted = video.range_of(asked.frames)
    request.set_stage(InferenceRequest.Stage.INFERENCE, 0, video.count(wanted))
    with TemporaryDirectory(prefix="frames-") as folder, closing(asker.batches(wanted)) as batches:
        path = Path(folder)
        is_backward = asked.frames.is_backward
        entries: _Entries = _Backwards(request, path) if is_backward else _InOrder(request)
        found = None
        with closing(entries):
            if asked.is_followed:
                rate = video.rate / wanted.every
                with closing(begin_journal(path)) as journal:
                    numbers = _add_followed(batches, journal, rate, video, entries)
                    found = _video_annotation(journal, numbers, video, rate, services)
            else:
                for batch in batches:
                    entries.add([_entry(video, *one) for one in batch])
            missing = _missing(asker, wanted, video, request)
            notes = [*asked.notes, *asker.notes(), *([missing] if missing else [])]
            request.final_result = {"video_ann": found, **({"notes": notes} if notes else {})}
            entries.finish()
    if missing:
        raise PartialFailureError(missing)


def _missing(
    asker: FrameAsker, wanted: Range, video: Video, request: InferenceRequest
) -> str | None:
    """A sentence about frames that the video should have and has not; RequestError for none."""
    if request.is_stopped():
        return None
    last = asker.last_index
    if last is None:
        raise no_frames(video, wanted)
    if wanted.last is None or video.num_frames is None or last >= wanted.last:
        return None
    return (
        f"{asker.num_asked} frames up to number {last} are done, and those after it up to "
        f"{wanted.last} cannot be decoded of {video.name!r}; it is cut or damaged: ask for the "
        "frames that are there, or upload the video anew."
    )


def _entry(
    video: Video, frame: AskedFrame, outcome: Outcome, annotation: sly.Annotation | None = None
) -> dict[str, Any]:
    """The SDK's entry of a frame; ``annotation`` in the place of the outcome's."""
    extra: dict[str, Any] = {"slides_data": {}}
    if isinstance(outcome, Failure):
        extra["error"] = failure_json(outcome)
    else:
        annotation = outcome.annotation if annotation is None else annotation
        if outcome.notes:
            extra["notes"] = list(outcome.notes)
    prediction = sly.nn.model.prediction.Prediction(
        annotation, frame_index=frame.place.index, **video.ids, **extra
    )
    return {**prediction.to_json(), "data": {}}


# Following objects


def _add_followed(
    batches: Iterable[list[Asked]],
    journal: FrameJournal,
    asked_rate: float,
    video: Video,
    entries: _Entries,
) -> dict[TrackKey, int]:
    """Adds an entry for each frame, with the labels that belong to an object, as soon as these are
    known: one frame later. The objects' numbers, which are in the order in which they appear."""
    waiting: deque[Asked] = deque()
    numbers: dict[TrackKey, int] = {}

    def seen() -> Iterator[Seen]:
        for batch in batches:
            frames = [seen_of(*one) for one in batch]
            journal.append(frames)
            waiting.extend(batch)
            yield from frames

    for _, keys in keyed(seen(), asked_rate, oc_sort):
        frame, outcome = waiting.popleft()
        annotation = None
        if not isinstance(outcome, Failure):
            annotation = _numbered(outcome.annotation, keys, numbers)
        entries.add([_entry(video, frame, outcome, annotation)])
    return numbers


def _numbered(
    annotation: sly.Annotation, keys: Sequence[TrackKey | None], numbers: dict[TrackKey, int]
) -> sly.Annotation:
    """As the SDK gives them: labels of no object are left out, numbers are in the custom data."""
    labels: list[sly.Label] = []
    ids: list[int] = []
    for parts, key in zip(same_objects(annotation.labels), keys, strict=True):
        if key is not None:
            number = numbers.setdefault(key, len(numbers) + 1)
            labels += parts
            ids += [number] * len(parts)
    return annotation.clone(labels=labels, custom_data=ids)


def _video_annotation(
    journal: FrameJournal,
    numbers: Mapping[TrackKey, int],
    video: Video,
    asked_rate: float,
    services: RunServices,
) -> dict[str, Any] | None:
    """The objects of all frames as the SDK's JSON, with the numbers that entries have."""
    if journal.last is None:
        return None
    tracks, _ = find_tracks(journal.seen(), asked_rate)
    objects = {key: video_object(track) for key, track in tracks.items()}
    # Clients read it with the classes that the app knows.
    labels = [sly.Label(sly.Rectangle(0, 0, 0, 0), one.obj_class) for one in objects.values()]
    services.learn(sly.Annotation((video.size_wh[1], video.size_wh[0]), labels))
    frames = [
        sly.Frame(
            frame.index,
            [
                video_figure(objects[key], box, frame.index, video.size_wh, numbers[key])
                for key, box in frame.boxes.items()
            ],
        ).to_json()
        for frame in followed_frames(journal.seen(), tracks, asked_rate)
    ]
    empty = sly.VideoAnnotation(
        (video.size_wh[1], video.size_wh[0]),
        video.num_frames or journal.last.index + 1,
        sly.VideoObjectCollection(list(objects.values())),
    )
    return {**empty.to_json(), "frames": frames}


# Entries in the order in which they were asked for


class _Entries(Protocol):
    """Where entries go. Those that ``finish`` gives to the request come after its final result, for
    which clients ask as soon as they have the last entry."""

    def add(self, entries: list[dict[str, Any]]) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


class _InOrder:
    def __init__(self, request: InferenceRequest) -> None:
        self._request = request
        self._last: list[dict[str, Any]] = []

    def add(self, entries: list[dict[str, Any]]) -> None:
        self._request.add_results(self._last)
        self._last = entries

    def finish(self) -> None:
        self.close()

    def close(self) -> None:
        """Also a run that failed gives what it has done."""
        self._request.add_results(self._last)
        self._last = []


class _Backwards:
    """Frames are decoded forwards, so that the first entry comes after the last frame; until then
    entries wait in a file, and memory does not grow with their number."""

    def __init__(self, request: InferenceRequest, folder: Path) -> None:
        self._request = request
        self._file: BinaryIO = (folder / "entries.jsonl").open("w+b")
        self._places: list[int] = []

    def add(self, entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            self._places.append(self._file.tell())
            self._file.write(json.dumps(entry).encode() + b"\n")

    def finish(self) -> None:
        for end in range(len(self._places), 0, -_ENTRIES_AT_A_TIME):
            wait_while_paused(self._request)
            self._request.add_results(
                [
                    self._at(place)
                    for place in reversed(self._places[max(0, end - _ENTRIES_AT_A_TIME) : end])
                ]
            )

    def _at(self, place: int) -> dict[str, Any]:
        self._file.seek(place)
        entry: dict[str, Any] = json.loads(self._file.readline())
        return entry

    def close(self) -> None:
        self._file.close()

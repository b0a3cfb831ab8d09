"""A run that labels a video of the platform: every frame of a range first, then its objects.

Objects are known once all frames were looked at, so nothing is on the platform before; what was
found is kept in team files meanwhile, and the same request goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from florence2.records import Failure
from serve.platform.failures import FailedImageError, PartialFailureError, failure_of
from serve.platform.registry import InferenceRequest
from serve.platform.request_state import State
from serve.platform.run import RunServices
from serve.platform.run_store import runs_of
from serve.platform.video_books import VideoBooks, is_over_video, video_lines
from serve.platform.video_labels import (
    Figure,
    VideoLine,
    VideoWriter,
    WrittenObject,
    remove_objects,
    stored_annotation,
    undo_line,
)
from serve.predict.geometry import rectangle_tlbr_from_box_xyxy
from serve.provenance import RUN_TAG, Undone
from serve.sdk import sly
from serve.video.asking import FrameAsker, Video, no_frames
from serve.video.detections import check_gives_boxes, seen_of
from serve.video.frames import Range, need_libraries
from serve.video.journal import FrameJournal, begin_journal
from serve.video.project import video_object
from serve.video.request import VideoRequest
from serve.video.source import video_info, video_of_platform
from serve.video.tracking import Track, TrackKey, find_tracks, followed_frames

# isort: split
from supervisely.api.video.video_api import VideoInfo

_SHOWN_FRAMES: Final = 10


@dataclass(frozen=True, slots=True)
class Tool:
    """An annotation tool that waits for the figures of a track; ``track_id`` is its own name."""

    track_id: object
    tell: Callable[[int, int], bool]
    """Told how many of how many frames are done; True: a person pressed stop."""


def label_platform_video(
    api: sly.Api,
    info: VideoInfo,
    asked: VideoRequest,
    state: State,
    request: InferenceRequest,
    services: RunServices,
    tool: Tool | None = None,
) -> None:
    """Labels a range of a video; the final result says which run it was and what it wrote.

    PartialFailureError at the end for frames without an answer, and for what broke it off: the
    same request goes on there.
    """
    if asked.mode == "skip_labeled" and stored_annotation(api, info)["objects"]:
        request.final_result = {"video_ann": None, "skipped": True}
        return
    with video_of_platform(api, info, asked.frames, request) as video:
        asker = FrameAsker(video, api, state, request, services)
        check_gives_boxes(asker.settings, "ask <OD> or a text")
        need_libraries("trackers")
        wanted = video.range_of(asked.frames)
        model = services.model_of(asker.settings)
        frames = {"first": wanted.first, "last": wanted.last, "every": wanted.every}
        mode = asked.mode or "append"
        request.set_stage(InferenceRequest.Stage.INFERENCE, 0, video.count(wanted))
        with (
            VideoBooks(api, info, asker.settings, model, mode, frames, request.is_stopped) as books,
            TemporaryDirectory(prefix="frames-") as folder,
            closing(begin_journal(Path(folder), books.lines)) as journal,
        ):
            books.began(journal.path)
            run = _Run(api, info, asked, video, wanted, request, books, journal, tool)
            try:
                run.look(asker)
                result = run.write()
            except Exception as error:
                run.failed(error)
                raise
            request.final_result = result
            if run.problem is not None:
                raise PartialFailureError(run.problem)


def track_platform_video(
    api: sly.Api,
    video_id: int,
    state: State,
    request: InferenceRequest,
    services: RunServices,
) -> None:
    """As ``label_platform_video`` for an annotation tool, which is told how far it is, that its
    figures are there, and what went wrong. A tool that cannot be told anything ends no run."""
    track_id = state.get("trackId", state.get("track_id"))
    try:
        asked = replace(VideoRequest.of(state), mode="append")
        info = video_info(api, video_id)
        ends = asked.frames.within(info.frames_count or None, 1.0)
        first, last = ends.first, ends.first if ends.last is None else ends.last

        def tell(done: int, total: int) -> bool:
            notify = api.video.notify_progress
            return bool(_told(notify, track_id, info.id, first, last, done, total))

        tool = Tool(track_id, tell)
        label_platform_video(api, info, asked, state, request, services, tool)
    except Exception as error:
        failure = failure_of(error, "The video cannot be tracked")
        _told(api.video.notify_tracking_error, track_id, failure.code, failure.message)
        raise


def _told(notify: Callable[..., Any], *what: object) -> Any:  # noqa: ANN401 - what the SDK gives
    """What the annotation tool answered; None where it could not be told."""
    try:
        return notify(*what)
    except Exception as error:  # noqa: BLE001  (the SDK and its transport raise anything)
        sly.logger.warning(f"The annotation tool could not be told: {error!r}")
        return None


class _Run:
    def __init__(
        self,
        api: sly.Api,
        info: VideoInfo,
        asked: VideoRequest,
        video: Video,
        wanted: Range,
        request: InferenceRequest,
        books: VideoBooks,
        journal: FrameJournal,
        tool: Tool | None,
    ) -> None:
        self._api = api
        self._info = info
        self._asked = asked
        self._video = video
        self._wanted = wanted
        self._request = request
        self._books = books
        self._journal = journal
        self._tool = tool
        self._rate = video.rate / wanted.every
        self._notes = asked.notes
        self.problem: str | None = None

    def look(self, asker: FrameAsker) -> None:
        """Asks about the frames that nobody has looked at yet."""
        journal, total = self._journal, self._video.count(self._wanted)
        if journal.num_asked:
            self._request.done(journal.num_asked)
        if journal.is_complete:
            return
        model = self._books.manifest.model
        with closing(asker.batches(self._wanted, journal.last, model)) as batches:
            for batch in batches:
                journal.append([seen_of(*one) for one in batch])
                self._books.looked_at(journal.num_asked)
                if self._tool is not None and self._tool.tell(journal.num_asked, total):
                    self._request.stop()
        if not self._request.is_stopped():
            if journal.last is None:
                raise no_frames(self._video, self._wanted)
            journal.end()
        self._books.looked_at(journal.num_asked, is_all=True)
        self._notes += asker.notes()

    def write(self) -> dict[str, Any]:
        """Writes the objects of all frames; what is to be told of it."""
        told: dict[str, Any] = {"video_ann": None, "run": self._books.run_id}
        if self._request.is_stopped():
            return self._stopped(told, 0)
        tracks, boxes_alone = find_tracks(self._journal.seen(), self._rate)
        # Two that began in one moment may not have seen each other.
        self._books.check_held(is_fresh=True)
        writer = self._writer(self._take_back())

        def note(objects: Sequence[WrittenObject]) -> None:
            line = VideoLine(self._info.id, self._info.name, tuple(objects))
            self._books.wrote(line, writer.run_tag_name)

        writer.note = note
        writer.write_objects([video_object(track) for track in tracks.values()])

        def should_stop() -> bool:
            self._books.check_held()
            return bool(self._request.is_stopped())

        whole = writer.write_figures(self._figures(tracks), should_stop)
        if whole is None:
            return self._stopped(told, writer.num_figures)
        note(whole)
        counts = {"objects": len(tracks), "figures": writer.num_figures}
        num_failed = self._look_back()
        self._books.ended("done", self.problem, failed=num_failed, labels=len(tracks), **counts)
        if self._tool is not None:
            total = self._video.count(self._wanted)
            self._tool.tell(total, total)
        notes = {"notes": list(self._notes)} if self._notes else {}
        return {**told, **counts, "boxes_alone": boxes_alone, **notes}

    def failed(self, error: Exception) -> None:
        """Says in the manifest why a run came to no end."""
        self._books.ended("failed", failure_of(error, "The video cannot be labeled").message)

    def _stopped(self, told: dict[str, Any], num_figures: int) -> dict[str, Any]:
        self._books.ended("stopped")
        note = (
            f"The run was stopped: {self._journal.num_asked} frames were looked at and "
            f"{num_figures} boxes of objects were written; the same request goes on there."
        )
        return {**told, "notes": [note]}

    def _take_back(self) -> frozenset[int]:
        """What an earlier process wrote of this run, and with ``replace_own`` what other runs
        wrote and nobody has changed; the ids of the objects that were there."""
        manifest = self._books.manifest
        written = self._books.written.objects
        known = remove_objects(self._api, self._info, written, manifest.run, manifest.run_tag)
        if self._asked.mode != "replace_own":
            return known
        for other in runs_of(self._api, self._info.project_id):
            if other.run == manifest.run or other.state == "undone" or not is_over_video(other):
                continue
            undone = Undone(other.run, False)
            for line in video_lines(self._api, self._info.project_id, other.run):
                if line.video_id == self._info.id:
                    undo_line(self._api, line, other.run, other.run_tag, undone)
            if undone.failed:
                # Beside them the new objects would be there twice.
                raise FailedImageError(Failure("platform_failed", undone.failed[0]))
        return known

    def _writer(self, known_ids: frozenset[int]) -> VideoWriter:
        tag = sly.VideoTag(RUN_TAG, self._books.run_id) if self._books.writes_tag else None
        track_id = None if self._tool is None else self._tool.track_id
        return VideoWriter(self._api, self._info, tag, self._asked.suffix, track_id, known_ids)

    def _figures(self, tracks: Mapping[TrackKey, Track]) -> Iterator[Figure]:
        places = {key: place for place, key in enumerate(tracks)}
        for frame in followed_frames(self._journal.seen(), tracks, self._rate):
            for key, box in frame.boxes.items():
                tlbr = rectangle_tlbr_from_box_xyxy(box, self._video.size_wh)
                yield Figure(places[key], frame.index, sly.Rectangle(*tlbr))

    def _look_back(self) -> int:
        """How many frames have no answer; says so, and what a video should have and has not."""
        num_failed, shown, first = 0, [], ""
        for one in self._journal.seen():
            if one.failed is not None:
                num_failed += 1
                first = first or one.failed[1]
                if num_failed <= _SHOWN_FRAMES:
                    shown.append(str(one.place.index))
        sentences = []
        if num_failed:
            more = f" and {num_failed - _SHOWN_FRAMES} more" if num_failed > _SHOWN_FRAMES else ""
            sentences.append(
                f"{num_failed} of {self._journal.num_asked} frames have no answer "
                f"({', '.join(shown)}{more}), the first because: {first} Boxes of others pass "
                "through them."
            )
        last, wanted = self._journal.last, self._wanted.last
        if last is not None and wanted is not None and last.index < wanted:
            sentences.append(
                f"Frames up to number {last.index} are labeled, and those after it up to {wanted} "
                f"cannot be decoded of {self._info.name!r}; it is cut or damaged."
            )
        self.problem = " ".join(sentences) or None
        return num_failed

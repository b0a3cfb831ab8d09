"""Frames of a video asked about in a run: which, how far ahead, and what becomes of failures."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from platform_fakes import services, wait_until
from video_clips import claiming_file, gray_clip

from florence2.errors import FlorenceError, RequestError
from florence2.records import Failure
from serve.predict.predictor import Predicted
from serve.sdk import sly
from serve.video.answers import answer_video
from serve.video.asking import FrameAsker, Video
from serve.video.frames import AskedFrame, Place, Range, check_without_av
from serve.video.request import FramesAsked, VideoRequest
from serve.video.source import FEW_FRAMES, video_of_file, video_of_platform

RANGES = {
    "all": ({}, Range(1, 0, 9)),
    "every fourth": ({"step": 4}, Range(4, 0, 8)),
    "from the third": ({"startFrameIndex": 2}, Range(1, 2, 9)),
    "past the end": ({"framesCount": 100, "step": 3}, Range(3, 0, 9)),
    "backwards": ({"direction": "backward"}, Range(1, 0, 9)),
    "backwards every fourth": ({"direction": "backward", "step": 4}, Range(4, 1, 9)),
    "backwards to an end": (
        {"start_frame": 8, "end_frame": 5, "direction": "backward"},
        Range(1, 6, 8),
    ),
    "seconds": ({"duration": 0.5, "start_frame": 1}, Range(1, 1, 5)),
    "nulls": ({"step": None, "stride": None, "framesCount": None}, Range(1, 0, 9)),
}


@pytest.mark.parametrize(("state", "expected"), RANGES.values(), ids=RANGES)
def test_a_request_names_frames_in_every_spelling(state, expected):
    assert FramesAsked.of(state).within(10, 10.0) == expected


def test_the_end_of_a_sent_video_is_asked_and_without_a_known_length_all_is():
    assert FramesAsked.of({"endFrameIndex": 4}, is_end_asked=True).within(10, 1.0).last == 4
    assert FramesAsked.of({}).within(None, 1.0) == Range(1, 0, None)
    assert FramesAsked.of({"framesCount": 4, "step": 2}).within(None, 1.0) == Range(2, 0, 2)


def gray_video(count: int, decoded: list[int] | None = None) -> Video:
    def frames(wanted, after):
        for index in range(wanted.first, count, wanted.every):
            if decoded is not None:
                decoded.append(index)
            pixels = np.full((8, 8, 3), index % 250, np.uint8)
            yield AskedFrame(Place(index, None, index / 10), (index / 10,), 0, pixels)

    return Video("clip.mp4", (8, 8), 10.0, count, count, frames)


def nothing_found(images, settings, call):
    return [Predicted(sly.Annotation((8, 8))) for _ in images]


@pytest.fixture
def answer(manager):
    """The request, once it ends, or as it is at work."""

    def start(video, state, predict=nothing_found, *, until_end=True):
        handed = services(predict)

        def work(inference_request):
            answer_video(video, VideoRequest.of_sent(state), None, state, inference_request, handed)

        request, _ = manager.schedule_task(work, inference_request=manager.create())
        if until_end:
            wait_until(request.is_finished)
        return request

    return start


@pytest.mark.parametrize("state", [{}, {"tracker": "botsort"}], ids=["frames", "objects"])
def test_a_run_waits_for_a_client_that_does_not_fetch_and_reads_no_further(answer, state):
    decoded: list[int] = []
    request = answer(gray_video(1200, decoded), {**state, "batch_size": 8}, until_end=False)
    wait_until(request.is_paused)
    popped = []
    while not request.is_finished():
        assert len(decoded) <= len(popped) + 560
        popped += [entry["frame_index"] for entry in request.pop_pending_results()]
    popped += [entry["frame_index"] for entry in request.pop_pending_results()]
    assert popped == list(range(1200))
    assert request.exception is None


def test_frames_that_nobody_fetches_backwards_wait_in_a_file(answer):
    request = answer(gray_video(700), {"direction": "backward"}, until_end=False)
    wait_until(request.is_paused)
    assert 500 <= request.pending_num() <= 600
    popped = []
    while not request.is_finished() or request.pending_num():
        popped += [entry["frame_index"] for entry in request.pop_pending_results()]
    assert popped == list(range(699, -1, -1))


def test_a_frame_without_an_answer_has_an_error_and_the_others_go_on(answer):
    def predict(images, settings, call):
        return [
            Failure("not_finite", "The answer made no sense.")
            if image[0, 0, 0] == 5
            else Predicted(sly.Annotation((8, 8)))
            for image in images
        ]

    request = answer(gray_video(9), {"tracker": "ocsort"}, predict)
    entries = request.pop_pending_results()
    failed = [entry for entry in entries if "error" in entry]
    assert [entry["frame_index"] for entry in entries] == list(range(9))
    assert [(one["frame_index"], one["annotation"]) for one in failed] == [(5, None)]
    assert request.exception is None


def test_what_no_frame_can_be_asked_ends_the_run_at_once(answer):
    asked = []

    def predict(images, settings, call):
        asked.append(len(images))
        return [Failure("bad_request", "The prompt is too long.")] * len(images)

    request = answer(gray_video(500), {"batch_size": 4}, predict)
    assert str(request.exception) == "The prompt is too long."
    assert asked == [4]


def test_a_run_that_writes_takes_no_answer_of_a_model_that_was_deployed_meanwhile(manager):
    told = [{"name": "one"}] * 2 + [{"name": "two"}]
    handed = replace(services(nothing_found), model_of=lambda settings: told.pop(0))
    asker = FrameAsker(gray_video(20), None, {"batch_size": 4}, manager.create(), handed)
    batches = asker.batches(Range(), model={"name": "one"})
    assert [len(next(batches)), len(next(batches))] == [4, 4]
    with pytest.raises(FlorenceError, match="began with one, and two was deployed") as caught:
        next(batches)
    assert caught.value.code == "not_deployed"


class FakeVideos:
    """A platform that gives single frames, and no whole video."""

    def __init__(self) -> None:
        self.frame = self
        self.asked: list[int] = []

    def download_bytes(self, video_id, indexes):
        self.asked += indexes
        picture = sly.image.write_bytes(np.zeros((8, 8, 3), np.uint8), "png")
        return [picture for _ in indexes]


def platform_video(videos, frames_count, size_wh=(8, 8)):
    info = SimpleNamespace(
        id=3, name="a.mp4", dataset_id=2, project_id=1, frames_count=frames_count,
        frame_width=size_wh[0], frame_height=size_wh[1], file_meta={"duration": 0.4},
    )  # fmt: skip
    api = SimpleNamespace(video=videos)
    return video_of_platform(api, info, FramesAsked(), SimpleNamespace())


def test_a_video_of_frames_that_are_too_large_is_refused_before_anything_is_fetched():
    videos = FakeVideos()
    with (
        pytest.raises(FlorenceError, match=r"'a\.mp4' are 20000x20000; scale the video down"),
        platform_video(videos, 100, (20000, 20000)),
    ):
        pass
    assert videos.asked == []


def test_frames_that_are_too_large_are_refused_also_where_opencv_would_decode_them(tmp_path):
    check_without_av(gray_clip(tmp_path / "a.mp4", 2))
    with pytest.raises(FlorenceError, match="are 12000x8000; scale the video down"):
        check_without_av(claiming_file(tmp_path / "a.avi", (12000, 8000)))


@pytest.mark.parametrize("is_av_there", [True, False])
def test_few_frames_or_all_where_av_is_missing_come_from_the_platform(monkeypatch, is_av_there):
    if not is_av_there:
        monkeypatch.setitem(sys.modules, "av", None)
    count = FEW_FRAMES if is_av_there else 100
    videos = FakeVideos()
    with platform_video(videos, count) as video:
        frames = list(video.frames(Range(3, 0, count - 1), None))
    assert videos.asked == list(range(0, count, 3)) == [one.place.index for one in frames]
    assert (video.rate, frames[1].times_s) == (
        count / 0.4,
        tuple(n / video.rate for n in (1, 2, 3)),
    )


def test_what_cannot_be_done_without_the_packages_for_videos_says_which(
    answer, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(FlorenceError, match="'av' is not installed; pip install"):
        video_of_file(tmp_path / "a.mp4")
    request = answer(gray_video(3), {"tracker": "botsort"})
    assert "'trackers' is not installed" in str(request.exception)


def test_a_video_that_is_sent_lies_nowhere():
    with pytest.raises(RequestError, match="lies on no platform"):
        VideoRequest.of_sent({"upload_mode": "append"})


LISTS = {
    "a playlist": ("m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"),
    "a list to join": ("mp4", "ffconcat version 1.0\nfile {}\n"),
}


@pytest.mark.parametrize(("ending", "text"), LISTS.values(), ids=LISTS)
def test_a_list_of_files_is_no_video_so_that_nobody_is_answered_about_files_of_the_server(
    tmp_path, ending, text
):
    own = gray_clip(tmp_path / "own.mp4", 4)
    sent = tmp_path / f"sent.{ending}"
    sent.write_text(text.format(own if ending == "m3u8" else own.name))
    with pytest.raises(FlorenceError, match="is a list of other files") as caught:
        video_of_file(sent)
    assert caught.value.code == "bad_video"

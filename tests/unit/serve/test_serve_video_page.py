"""The page that labeling a video leaves beside its report."""

from __future__ import annotations

import os
import signal
from base64 import b64decode
from io import BytesIO

import pytest
from html_pages import Tags
from label_fakes import color_in, result
from PIL import Image
from video_clips import frame_of, gray_clip

from florence2.records import Box, Failure


@pytest.fixture
def clip(tmp_path):
    return gray_clip(tmp_path / "a #1.mp4", 24)


@pytest.fixture
def page_of():
    def read(out):
        tags = Tags((out / "report.html").read_text("utf-8"))
        tags.check()
        return tags, "\n".join(tags.text)

    return read


def test_the_least_sure_boxes_are_drawn_on_their_frames(label, model, clip, page_of):
    def answer(ask):
        frame = frame_of(color_in(ask))
        box = Box((4.0, 4.0, 36.0, 20.0), "car <b>", 0.1 if frame == 12 else 0.9)
        return result(ask.task, box, size=ask.image.size_wh)

    model.answer = answer
    out = label(clip, "--every", "4").out
    tags, text = page_of(out)
    assert "All 7 frames are labeled." in text
    assert "car <b>" in text
    assert tags.values("href")[0] == "../a%20%231.mp4#t=0.48"
    pictures = [
        Image.open(BytesIO(b64decode(one.partition(",")[2]))).convert("L")
        for one in tags.values("src")
    ]
    assert len(pictures) == 7
    # Frames get lighter through the clip: the first picture is of the frame in its middle.
    middle = pictures[0].getpixel((pictures[0].width - 2, pictures[0].height - 2))
    shades = sorted(one.getpixel((one.width - 2, one.height - 2)) for one in pictures)
    assert abs(middle - shades[3]) <= 1


def test_frames_without_an_answer_and_what_is_left_are_told(label, model, clip, page_of):
    def answer(ask):
        frame = frame_of(color_in(ask))
        if frame == 12:
            os.kill(os.getpid(), signal.SIGINT)
        if frame == 4:
            return Failure("too_slow", "It took too long.")
        return result(ask.task, size=ask.image.size_wh)

    model.answer = answer
    out = label(clip, "--every", "4", "--batch", "1").out
    _, text = page_of(out)
    assert "Stopped by somebody after 4 of 7 frames, 1 of them failed; 3 are still to do." in text
    assert "It took too long." in text
    assert "frame 4 at 0.16 s" in text
    assert "florence2 label" in text
    assert "Frames that failed are not asked again" in text

"""Small video files for tests: gray frames whose level says which one they are, and odd files."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from florence2_demo.clips import write_frames

STEP = 8
"""Gray levels between two frames, which a lossy codec cannot mistake."""


def gray_frames(count: int, size_wh=(64, 48)):
    return (np.full((size_wh[1], size_wh[0], 3), STEP * n, np.uint8) for n in range(count))


def gray_clip(path: Path, count: int = 24, size_wh=(64, 48), fps: int = 25, **options) -> Path:
    """Frame n is gray of level ``STEP * n``."""
    write_frames(gray_frames(count, size_wh), path, fps, **options)
    return path


def frame_of(color) -> int:
    """Which frame a colour is that of."""
    return round(color[0] / STEP)


def timed_clip(path: Path, times_ms: list[int]) -> Path:
    """A gray clip whose frames come at these times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, time_ms in zip(gray_frames(len(times_ms)), times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def turned_clip(path: Path, degrees: int) -> Path:
    """Frames of 64 x 48 with a white top left quarter, to be turned left when shown."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(degrees)
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def audio_file(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def clip_without_frames(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return path


def text_file(path: Path) -> Path:
    path.write_text("no video" * 100)
    return path


def empty_file(path: Path) -> Path:
    path.touch()
    return path


def cut_file(path: Path) -> Path:
    """An MP4 has its table of frames at the end, and this one has no end."""
    whole = gray_clip(path)
    whole.write_bytes(whole.read_bytes()[:-600])
    return whole


def cut_streamable(path: Path, count: int = 24) -> Path:
    """The table comes first and promises frames that are not there."""
    faststart = {"movflags": "faststart"}
    whole = gray_clip(path, count, options={"g": "1", "bf": "0"}, container_options=faststart)
    data = whole.read_bytes()
    whole.write_bytes(data[: data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2])
    return whole


def claiming_file(path: Path, size_wh=(20000, 20000)) -> Path:
    """An AVI of some kilobytes whose header and frames say that they are of this size."""
    whole = gray_clip(path, 2, codec="mjpeg", options={"strict": "unofficial"})
    for form, before, after in (("<II", (64, 48), size_wh), (">HH", (48, 64), size_wh[::-1])):
        whole.write_bytes(
            whole.read_bytes().replace(struct.pack(form, *before), struct.pack(form, *after))
        )
    return whole


def growing_clip(path: Path, grown: tuple[int, ...], count: int = 3) -> Path:
    """A WebM of 64 x 48 of which these frames are 16000 x 16000."""
    whole = gray_clip(path, count, codec="libvpx", options={"g": "1"})
    start, size = b"\x9d\x01\x2a", struct.Struct("<HH")
    before, *frames = whole.read_bytes().split(start + size.pack(64, 48))
    for number, frame in enumerate(frames):
        is_grown = number in grown
        before += start + size.pack(*((16000, 16000) if is_grown else (64, 48))) + frame
    whole.write_bytes(before)
    return whole

"""Videos of the platform and videos that are sent, by the SDK's own clients: frames, numbers."""

from __future__ import annotations

import pytest
from contract_calls import App
from platform_videos import StoredVideo, add_video, add_video_project

from florence2_demo.clips import make_clip, write_clip
from serve.sdk import sly

# isort: split
from supervisely.nn.model.model_api import ModelAPI

CLIP = make_clip(3, seconds=2.0, fps=12)
PROMPT = ". ".join(dict.fromkeys(mover.kind for mover in CLIP.movers))
SETTINGS = {"text": PROMPT, "num_beams": 1}


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_clip(CLIP, path)
    return path


@pytest.fixture
def dataset_id(platform) -> int:
    return add_video_project(platform.state)[1]


@pytest.fixture
def video(platform, dataset_id, clip_path) -> StoredVideo:
    return add_video(platform.state, dataset_id, "clip.mp4", clip_path.read_bytes())


@pytest.fixture
def session(api, session_url) -> sly.nn.inference.Session:
    settings = {"text": PROMPT, "num_beams": 1}
    return sly.nn.inference.Session(api, session_url=session_url, inference_settings=settings)


@pytest.fixture
def model_api(api, session_url) -> ModelAPI:
    return ModelAPI(api, url=session_url)


def frames_of(app: App, **state) -> list[int]:
    answer = app.post("inference_video_id", {"settings": SETTINGS, **state})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["video_ann"] is None
    return [entry["frame_index"] for entry in body["ann"]]


RANGES = {
    "three from the second": ({"startFrameIndex": 1, "framesCount": 3}, [1, 2, 3]),
    "every fourth of ten": ({"framesCount": 10, "step": 4}, [0, 4, 8]),
    "the end is not asked": ({"startFrameIndex": 2, "endFrameIndex": 4}, [2, 3]),
    "as the newer client says it": ({"start_frame": 20, "num_frames": 9, "stride": 3}, [20, 23]),
    "a part of a second": ({"duration": 0.25}, [0, 1, 2]),
    "backwards": (
        {"startFrameIndex": 9, "framesCount": 7, "step": 3, "framesDirection": "backward"},
        [9, 6, 3],
    ),
    "backwards past the beginning": (
        {"start_frame": 1, "num_frames": 9, "direction": "backward"},
        [1, 0],
    ),
    "backwards from the end": ({"direction": "backward", "framesCount": 2}, [23, 22]),
}


@pytest.mark.parametrize(("state", "frames"), RANGES.values(), ids=RANGES)
def test_exactly_the_frames_of_a_range_are_answered_in_its_order(app, video, state, frames):
    assert frames_of(app, videoId=video.id, **state) == frames

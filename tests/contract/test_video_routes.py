"""Videos of the platform and videos that are sent, by the SDK's own clients: frames, numbers."""

from __future__ import annotations

import pytest
from contract_calls import App
from platform_videos import StoredVideo, add_video, add_video_project

from florence2_demo.clips import make_clip, write_clip
from serve.sdk import LabelingStatus, sly

# isort: split
from supervisely.nn.model.model_api import ModelAPI

CLIP = make_clip(3, seconds=3.0, fps=12)
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
    "as the newer client says it": (
        {"start_frame": 20, "num_frames": 9, "stride": 3},
        [20, 23, 26],
    ),
    "a part of a second": ({"duration": 0.25}, [0, 1, 2]),
    "backwards": (
        {"startFrameIndex": 9, "framesCount": 7, "step": 3, "framesDirection": "backward"},
        [9, 6, 3],
    ),
    "backwards past the beginning": (
        {"start_frame": 1, "num_frames": 9, "direction": "backward"},
        [1, 0],
    ),
    "backwards from the end": ({"direction": "backward", "framesCount": 2}, [35, 34]),
}


@pytest.mark.parametrize(("state", "frames"), RANGES.values(), ids=RANGES)
def test_exactly_the_frames_of_a_range_are_answered_in_its_order(app, video, state, frames):
    assert frames_of(app, videoId=video.id, **state) == frames


def numbers_in(annotations: dict[int, sly.Annotation]) -> dict[int, set[str]]:
    """The classes that each number was given to."""
    found: dict[int, set[str]] = {}
    for annotation in annotations.values():
        assert len(annotation.custom_data) == len(annotation.labels)
        for number, label in zip(annotation.custom_data, annotation.labels, strict=True):
            found.setdefault(number, set()).add(label.obj_class.name)
    return found


def test_objects_keep_their_number_through_the_frames_and_the_result_has_them(
    session, video, platform
):
    annotations = dict(enumerate(session.inference_video_id_async(video.id, tracker="botsort")))
    assert list(annotations) == list(range(CLIP.num_frames))
    kinds = numbers_in(annotations)
    assert sorted(kinds) == list(range(1, len(CLIP.movers) + 1))
    assert sorted(*kinds.values() and [[one for [one] in kinds.values()]]) == sorted(
        mover.kind for mover in CLIP.movers
    )
    found = sly.VideoAnnotation.from_json(
        session.inference_result["video_ann"], session.get_model_meta()
    )
    assert (found.frames_count, found.img_size) == (CLIP.num_frames, (240, 320))
    by_number = {
        int(figure.track_id): figure.video_object.obj_class.name for figure in found.figures
    }
    assert {number: {name} for number, name in by_number.items()} == kinds
    assert platform.count("videos.download") == 1


def labels_on(api, video: StoredVideo) -> sly.VideoAnnotation:
    """What a video of the platform is labeled with now."""
    info = api.video.get_info_by_id(video.id)
    meta = sly.ProjectMeta.from_json(api.project.get_meta(info.project_id))
    stored = api.video.annotation.download(video.id)
    return sly.VideoAnnotation.from_json(stored, meta, sly.KeyIdMap())


def write(app, video: StoredVideo, **state) -> dict:
    asked = {"videoId": video.id, "settings": SETTINGS, "upload_mode": "append", **state}
    answer = app.post("inference_video_id", asked)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_what_is_found_is_written_as_objects_with_figures(app, api, video):
    told = write(app, video, step=2, framesCount=21)
    found = labels_on(api, video)
    assert (told["ann"], told["video_ann"]) == ([], None)
    assert (told["objects"], told["figures"]) == (len(found.objects), len(found.figures))
    assert {figure.frame_index for figure in found.figures} == set(range(21))
    assert {figure.status for figure in found.figures} == {LabelingStatus.AUTO}
    for one in found.objects:
        tags = {tag.name: tag.value for tag in one.tags}
        assert tags.keys() == {"confidence", "florence2_run"}
        assert tags["florence2_run"] == told["run"]

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


def test_undo_deletes_what_a_run_wrote_and_nobody_has_changed(app, api, video):
    told = write(app, video, step=3, framesCount=16)
    moved = video.figures[0]
    moved["geometry"]["points"]["exterior"][0][0] += 3
    project_id = api.video.get_info_by_id(video.id).project_id
    [run] = app.post("list_runs", {"project_id": project_id}).json()
    assert (run["run"], run["state"], run["mode"]) == (told["run"], "done", "append")
    assert run["counts"] == {
        "frames": 6,
        "failed": 0,
        "labels": told["objects"],
        "objects": told["objects"],
        "figures": told["figures"],
    }
    state = {"project_id": project_id, "run": told["run"]}
    shown = app.post("undo_run", {**state, "show": True}).json()
    undone = app.post("undo_run", state).json()
    for one in (shown, undone):
        assert (one["deleted"], one["kept"], one["gone"]) == (told["objects"] - 1, 1, 0)
    assert f"object {moved['objectId']} of class" in undone["kept_labels"][0]
    assert [one.class_id for one in labels_on(api, video).objects] != []
    assert {one["id"] for one in video.objects} == {moved["objectId"]}


def test_a_second_run_leaves_a_labeled_video_alone_or_takes_the_place_of_the_first(app, api, video):
    first = write(app, video, step=4, framesCount=9)
    assert write(app, video, upload_mode="skip_labeled")["skipped"] is True
    second = write(app, video, step=4, framesCount=9, upload_mode="replace_own")
    assert second["objects"] == first["objects"] == len(video.objects)
    tags = [tag["value"] for one in video.objects for tag in one["tags"]]
    assert first["run"] not in tags
    assert tags.count(second["run"]) == second["objects"]


def test_names_that_the_project_uses_otherwise_get_another_one(app, api, platform, video):
    project_id = api.video.get_info_by_id(video.id).project_id
    kinds = [mover.kind for mover in CLIP.movers]
    outlines = [sly.ObjClass(kinds[0], sly.Polygon)]
    number = sly.TagMeta("florence2_run", sly.TagValueType.ANY_NUMBER)
    api.project.update_meta(project_id, sly.ProjectMeta(outlines, [number]).to_json())
    told = write(app, video, step=4, framesCount=9)
    classes = {one.obj_class.name for one in labels_on(api, video).objects}
    assert f"{kinds[0]}_nn" in classes
    assert kinds[0] not in classes
    undone = app.post("undo_run", {"project_id": project_id, "run": told["run"]}).json()
    assert (undone["deleted"], undone["kept"]) == (told["objects"], 0)


def test_a_run_that_was_cut_off_goes_on_where_it_was(app, api, platform, video):
    asked = {"videoId": video.id, "settings": SETTINGS, "upload_mode": "append", "framesCount": 9}
    platform.faults.fail("figures.bulk.add", times=50)
    assert_refused(app.post("inference_video_id", asked), 424, says="platform")
    assert len(video.objects) > 0
    looked_at = platform.count("videos.bulk.download-frame")
    platform.faults.statuses.clear()
    told = write(app, video, framesCount=9)
    assert platform.count("videos.bulk.download-frame") == looked_at
    assert (told["objects"], told["figures"]) == (len(video.objects), len(video.figures))
    [run] = app.post(
        "list_runs", {"project_id": api.video.get_info_by_id(video.id).project_id}
    ).json()
    assert (run["run"], run["state"]) == (told["run"], "done")

"""Videos of the platform and videos that are sent, by the SDK's own clients: frames, numbers."""

from __future__ import annotations

import threading

import pytest
from app_server import SDK_ENVIRONMENT, AppServer
from contract_calls import App, assert_refused, refused_now_or_later, wait_for
from platform_double import TOKEN
from platform_videos import StoredVideo, add_video, add_video_project, project_of, rows_of
from video_clips import claiming_file, cut_streamable, text_file

from bench.video import compare
from florence2_demo.clips import make_clip, write_clip
from serve.platform.run_store import runs_of
from serve.sdk import LabelingStatus, sly

# isort: split
from supervisely.nn.inference.predict_app.gui.utils import video_annotation_from_predictions
from supervisely.nn.model.model_api import ModelAPI

CLIP = make_clip(3, seconds=2.5, fps=8)
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
        {"start_frame": 14, "num_frames": 9, "stride": 3},
        [14, 17],
    ),
    "a part of a second": ({"duration": 0.4}, [0, 1, 2]),
    "backwards": (
        {"startFrameIndex": 9, "framesCount": 7, "step": 3, "framesDirection": "backward"},
        [9, 6, 3],
    ),
    "backwards past the beginning": (
        {"start_frame": 1, "num_frames": 9, "direction": "backward"},
        [1, 0],
    ),
    "backwards from the end": ({"direction": "backward", "framesCount": 2}, [19, 18]),
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
    assert idf1_of(found) >= 0.9


def idf1_of(annotation: sly.VideoAnnotation) -> float:
    """Against the truth of the clip, by its own numbers."""
    frames: list[dict] = [{} for _ in range(CLIP.num_frames)]
    for figure in annotation.figures:
        shape = figure.geometry
        box = (shape.left, shape.top, shape.right + 1, shape.bottom + 1)
        frames[figure.frame_index][figure.track_id] = (figure.video_object.obj_class.name, box)
    return compare([CLIP.truth(frame) for frame in range(CLIP.num_frames)], frames).idf1


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
    told = write(app, video, step=2, framesCount=15)
    found = labels_on(api, video)
    assert (told["ann"], told["video_ann"]) == ([], None)
    assert (told["objects"], told["figures"]) == (len(found.objects), len(found.figures))
    assert {figure.frame_index for figure in found.figures} == set(range(15))
    assert {figure.status for figure in found.figures} == {LabelingStatus.AUTO}
    for one in found.objects:
        tags = {tag.name: tag.value for tag in one.tags}
        assert tags.keys() == {"confidence", "florence2_run"}
        assert tags["florence2_run"] == told["run"]


def test_undo_deletes_what_a_run_wrote_and_nobody_has_changed(app, api, platform, video):
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
    # Frames of a long video are many, and say nothing of what was written.
    read = [str(one.payload) for one in platform.calls if one.method == "file-storage.download"]
    assert len([path for path in read if "/videos/" not in path]) == 2
    assert not any("/frames-" in path for path in read)
    assert [one.class_id for one in labels_on(api, video).objects] != []
    assert {one["id"] for one in video.objects} == {moved["objectId"]}


def test_a_run_that_the_project_knows_no_more_is_undone_by_its_files(app, api, platform, video):
    told = write(app, video, step=4, framesCount=9)
    project_id = project_of(platform.state, video).id
    api.project.update_custom_data(project_id, {}, silent=True)
    undone = app.post("undo_run", {"project_id": project_id, "run": told["run"]}).json()
    assert (undone["deleted"], video.objects) == (told["objects"], [])


def test_a_second_run_leaves_a_labeled_video_alone_or_takes_the_place_of_the_first(app, api, video):
    first = write(app, video, step=4, framesCount=9)
    assert write(app, video, upload_mode="skip_labeled")["skipped"] is True
    second = write(app, video, step=4, framesCount=9, upload_mode="replace_own")
    assert second["objects"] == first["objects"] == len(video.objects)
    tags = [tag["value"] for one in video.objects for tag in one["tags"]]
    assert first["run"] not in tags
    assert tags.count(second["run"]) == second["objects"]


def test_where_the_labels_of_the_first_run_cannot_be_taken_away_no_second_ones_are_beside_them(
    app, platform, video
):
    first = write(app, video, step=4, framesCount=9)
    platform.faults.fail("annotation-objects.bulk.remove", times=50, status=400)
    again = {"step": 4, "framesCount": 9, "upload_mode": "replace_own"}
    answer = app.post("inference_video_id", {"videoId": video.id, "settings": SETTINGS, **again})
    assert_refused(answer, 424, says="cannot be deleted")
    assert len(video.objects) == first["objects"]
    platform.faults.statuses.clear()
    assert write(app, video, **again)["objects"] == len(video.objects)


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


def test_the_same_request_at_the_same_moment_is_refused(app, platform, video):
    asked = {"videoId": video.id, "settings": SETTINGS, "upload_mode": "append", "framesCount": 3}
    with platform.faults.held("annotation-objects.bulk.add"):
        uuid = app.post("inference_video_id_async", asked).json()["inference_request_uuid"]
        wait_for(lambda: platform.count("annotation-objects.bulk.add"))
        assert_refused(app.post("inference_video_id", asked), 409, says="labeled by the same")
    assert app.finished(uuid)[0]["exception"] is None


def test_the_same_request_to_another_app_is_refused_until_the_first_is_done(
    app, platform, video, tmp_path
):
    asked = {"videoId": video.id, "settings": SETTINGS, "upload_mode": "append", "framesCount": 3}
    env = {**SDK_ENVIRONMENT, "SERVER_ADDRESS": platform.address, "API_TOKEN": TOKEN}
    server = AppServer(tmp_path, env, is_forked=True)
    server.start()
    try:
        other = App(server.url)
        with platform.faults.held("annotation-objects.bulk.add"):
            uuid = app.post("inference_video_id_async", asked).json()["inference_request_uuid"]
            wait_for(lambda: platform.count("annotation-objects.bulk.add"))
            refused = other.post("inference_video_id", asked)
            assert_refused(refused, 409, says="is being labeled by the same request now")
        assert app.finished(uuid)[0]["exception"] is None
        first = len(video.objects)
        assert write(other, video, framesCount=3)["objects"] == len(video.objects) - first > 0
    finally:
        server.stop()


def test_what_was_written_and_whose_answer_was_lost_is_there_once(app, platform, video):
    for method in ("figures.bulk.add", "annotation-objects.bulk.add"):
        platform.faults.lose(method)
    told = write(app, video, step=4, framesCount=9)
    assert platform.count("figures.bulk.add") == 2
    assert platform.count("annotation-objects.bulk.add") == 2
    assert (told["objects"], told["figures"]) == (len(video.objects), len(video.figures))


@pytest.mark.parametrize(
    "more",
    [{}, {"class_thresholds": {f"thing {number}": 0.5 for number in range(300)}}],
    ids=["few settings", "more settings than are kept"],
)
def test_a_run_that_was_cut_off_goes_on_where_it_was(app, api, platform, video, more):
    asked = {"framesCount": 9, "settings": {**SETTINGS, **more}}
    platform.faults.fail("figures.bulk.add", times=50, status=400)
    answer = app.post("inference_video_id", {"videoId": video.id, "upload_mode": "append", **asked})
    assert_refused(answer, 424, says="platform")
    assert len(video.objects) > 0
    looked_at = platform.count("videos.bulk.download-frame")
    platform.faults.statuses.clear()
    told = write(app, video, **asked)
    assert platform.count("videos.bulk.download-frame") == looked_at
    assert (told["objects"], told["figures"]) == (len(video.objects), len(video.figures))
    [run] = runs_of(api, project_of(platform.state, video).id)
    assert (run.run, run.state) == (told["run"], "done")


def test_objects_that_got_no_tags_are_not_there_twice_once_the_run_went_on(app, platform, video):
    platform.faults.fail("annotation-objects.tags.bulk.add", times=50, status=400)
    asked = {"videoId": video.id, "settings": SETTINGS, "upload_mode": "append", "framesCount": 9}
    assert_refused(app.post("inference_video_id", asked), 424, says="platform")
    assert len(video.objects) > 0
    platform.faults.statuses.clear()
    assert write(app, video, framesCount=9)["objects"] == len(video.objects)


def test_a_request_for_the_one_class_is_another_one(app, api, platform, video):
    asked = {"framesCount": 2, "settings": {**SETTINGS, "classes": ["object"]}}
    platform.faults.fail("figures.bulk.add", times=50, status=400)
    answer = app.post("inference_video_id", {"videoId": video.id, "upload_mode": "append", **asked})
    assert_refused(answer, 424, says="platform")
    platform.faults.statuses.clear()
    write(app, video, videoId=None, video_id=video.id, **asked)
    assert len(runs_of(api, project_of(platform.state, video).id)) == 2


def test_the_newer_client_has_numbers_too_and_sends_files(model_api, clip_path, platform):
    with model_api.predict_detached(
        input=str(clip_path), tracking=True, start_frame=4, num_frames=7, stride=3, **SETTINGS
    ) as session:
        predictions = list(session)
        result = session.final_result
    assert [one.frame_index for one in predictions] == [4, 7, 10]
    assert all(len(one.track_ids) == len(one.annotation.labels) > 0 for one in predictions)
    found = sly.VideoAnnotation.from_json(result["video_ann"], model_api.get_model_meta())
    assert {figure.frame_index for figure in found.figures} == set(range(4, 11))
    numbers = {number for one in predictions for number in one.track_ids}
    assert {int(figure.track_id) for figure in found.figures} == numbers
    assert platform.calls == []


def test_frames_without_numbers_are_those_that_a_single_image_would_get(model_api, video):
    predictions = list(model_api.predict(video_id=video.id, num_frames=2, **SETTINGS))
    assert [one.video_id for one in predictions] == [video.id] * 2
    assert [one.track_ids for one in predictions] == [None, None]
    made = video_annotation_from_predictions(
        predictions, model_api.get_model_meta(), frame_size=(240, 320)
    )
    assert len(made.figures) == sum(len(one.annotation.labels) for one in predictions) > 0


def test_the_synchronous_client_gets_annotations_in_order_also_backwards(session, video):
    forward = session.inference_video_id(video.id, 2, 3, tracker="botsort")
    backward = session.inference_video_id(video.id, 4, 3, "backward", tracker="botsort")
    assert [classes(one) for one in backward] == [classes(one) for one in reversed(forward)]
    assert [one.custom_data for one in backward] == [one.custom_data for one in reversed(forward)]


def classes(annotation: sly.Annotation) -> list[str]:
    return [label.obj_class.name for label in annotation.labels]


def test_clients_are_told_that_objects_are_followed(model_api, session):
    assert session.get_session_info()["tracking_on_videos_support"] is True
    assert model_api.get_tracking_settings() == {}


def test_a_run_ends_where_it_is_stopped(app, api, video, platform):
    state = {"videoId": video.id, "settings": SETTINGS, "batch_size": 1}
    for mode in ({"tracker": "botsort"}, {"upload_mode": "append"}):
        uuid = app.post("inference_video_id_async", {**state, **mode}).json()
        uuid = uuid["inference_request_uuid"]
        while (
            app.post("get_inference_progress", {"inference_request_uuid": uuid}).json()["progress"][
                "current"
            ]
            < 2
        ):
            pass
        app.post("stop_inference", {"inference_request_uuid": uuid})
        progress, entries = app.finished(uuid)
        assert (progress["stopped"], progress["exception"]) == (True, None)
        assert len(entries) < CLIP.num_frames
        result = app.post("get_inference_result", {"inference_request_uuid": uuid}).json()
        if "tracker" in mode:
            assert len(result["video_ann"]["frames"]) <= len(entries)
        else:
            assert "the same request goes on there" in result["notes"][0]
            stopped = result["run"]
    assert (video.objects, video.figures) == ([], [])
    assert write(app, video, batch_size=1)["run"] == stopped


@pytest.mark.soak
def test_a_run_of_an_app_that_is_killed_goes_on_in_the_next_one(platform, dataset_id, tmp_path):
    clip = make_clip(5, seconds=20.0, fps=25)
    write_clip(clip, tmp_path / "clip.mp4")
    content = (tmp_path / "clip.mp4").read_bytes()
    video = add_video(platform.state, dataset_id, "clip.mp4", content)
    env = {**SDK_ENVIRONMENT, "SERVER_ADDRESS": platform.address, "API_TOKEN": TOKEN}
    asked = {"videoId": video.id, "settings": SETTINGS, "upload_mode": "append", "batch_size": 4}
    kinds = ". ".join(dict.fromkeys(mover.kind for mover in clip.movers))
    asked["settings"] = {"text": kinds, "num_beams": 1}
    counts = []
    for is_last in (False, True):
        server = AppServer(tmp_path, env)
        server.start()
        try:
            app = App(server.url)
            uuid = app.post("inference_video_id_async", asked).json()["inference_request_uuid"]
            if is_last:
                progress, _ = app.finished(uuid)
                assert progress["exception"] is None
            else:
                while not any("/frames-" in path for path in platform.state.files):
                    assert not threading.Event().wait(0.5)
                server.kill()
        finally:
            server.stop()
        [run] = runs_of(sly.Api(platform.address, TOKEN), project_of(platform.state, video).id)
        counts.append((run.run, run.state, run.counts["frames"], len(video.objects)))
    (first, *before), (second, *after) = counts
    assert first == second
    assert before == ["running", 0, 0]
    assert after[:2] == ["done", clip.num_frames]
    places = [(one["objectId"], one["meta"]["frame"]) for one in video.figures]
    assert len(set(places)) == len(places) > clip.num_frames


def test_a_download_that_is_stopped_ends_the_run_without_an_error(app, platform, video):
    with platform.faults.held("videos.download"):
        answer = app.post("inference_video_id_async", {"videoId": video.id, "settings": SETTINGS})
        uuid = answer.json()["inference_request_uuid"]
        app.post("stop_inference", {"inference_request_uuid": uuid})
    progress, entries = app.finished(uuid)
    assert (progress["stopped"], progress["exception"], entries) == (True, None, [])


HOSTILE = {
    "a negative start": {"startFrameIndex": -1},
    "a start behind the end": {"startFrameIndex": 20},
    "a start that no video has": {"startFrameIndex": 10**400},
    "a start in words": {"start_frame": "5"},
    "no frames": {"framesCount": 0},
    "a negative count": {"framesCount": -3},
    "an empty range": {"startFrameIndex": 5, "endFrameIndex": 5},
    "half a frame": {"framesCount": 1.5},
    "a list": {"frames_count": [1]},
    "yes": {"step": True},
    "no step": {"step": 0},
    "a step in words": {"stride": "all"},
    "a direction that is none": {"framesDirection": "sideways"},
    "no seconds": {"duration": 0},
    "seconds in words": {"duration": "1"},
    "a batch too large": {"batch_size": 10**6},
    "a tracker that nobody has": {"tracker": "deepsort"},
    "a tracker that is a number": {"tracker": 5},
    "labels in place of others": {"upload_mode": "replace"},
    "labels elsewhere": {"output_project_id": 3},
    "captions that are followed": {"tracker": "botsort", "settings": {"task_prompt": "<CAPTION>"}},
    "captions as objects": {"upload_mode": "append", "settings": {"task_prompt": "<CAPTION>"}},
    "settings that are none": {"settings": {"num_beams": "many"}},
    "a deadline in words": {"timeout_s": "soon"},
}


@pytest.mark.parametrize("state", HOSTILE.values(), ids=HOSTILE)
def test_what_a_video_cannot_be_asked_is_refused_in_a_sentence(app, video, state):
    state = {"videoId": video.id, "settings": SETTINGS, **state}
    for path in ("inference_video_id", "inference_video_id_async"):
        refused_now_or_later(app, path, state)
    assert (video.objects, video.figures) == ([], [])


def test_a_huge_count_or_step_means_the_whole_video_or_one_frame(app, video):
    assert frames_of(app, videoId=video.id, startFrameIndex=18, framesCount=10**30) == [18, 19]
    assert frames_of(app, videoId=video.id, startFrameIndex=3, step=10**30) == [3]
    answer = app.post(
        "inference_video_id",
        {"videoId": video.id, "settings": SETTINGS, "tracker": "botsort", "step": 10**400},
    )
    assert [entry["frame_index"] for entry in answer.json()["ann"]] == [0]


def test_a_video_that_is_not_there_is_not_found(app, video):
    body = assert_refused(app.post("inference_video_id", {"videoId": 999}), 404, says="video 999")
    assert body["code"] == "not_found"


def test_a_damaged_video_is_refused_and_of_a_cut_one_what_is_there_is_given(
    app, api, platform, dataset_id, tmp_path
):
    state, settings = platform.state, {"settings": SETTINGS}
    words = add_video(state, dataset_id, "words.mp4", text_file(tmp_path / "a").read_bytes(), 99)
    body = assert_refused(app.post("inference_video_id", {"videoId": words.id, **settings}), 400)
    assert body["code"] == "bad_video"
    content = cut_streamable(tmp_path / "cut.mp4").read_bytes()
    cut = add_video(state, dataset_id, "cut.mp4", content, 24)
    answer = app.post("inference_video_id", {"videoId": cut.id, **settings})
    assert_refused(answer, 422, says="cut or damaged")
    progress, entries = app.done("inference_video_id_async", {"videoId": cut.id, **settings})
    assert 0 < len(entries) < 24
    assert "cannot be decoded" in progress["exception"]["message"]
    huge = claiming_file(tmp_path / "huge.avi").read_bytes()
    sent = app.upload("inference_video_async", [("huge.avi", huge)], SETTINGS).json()
    progress, _ = app.finished(sent["inference_request_uuid"])
    assert "20000x20000; scale the video down" in progress["exception"]["message"]
    empty = app.upload("inference_video_async", [("a.mp4", b"")], SETTINGS).json()
    assert (
        "cannot be opened"
        in app.finished(empty["inference_request_uuid"])[0]["exception"]["message"]
    )


@pytest.mark.parametrize("mode", ["append", "replace_own"])
def test_where_no_frame_can_be_decoded_nothing_is_written_and_nothing_is_taken_away(
    app, api, platform, video, dataset_id, mode
):
    told = write(app, video, framesCount=3)
    video.frames_count = 99
    asked = {"videoId": video.id, "settings": SETTINGS, "startFrameIndex": 30, "upload_mode": mode}
    assert_refused(app.post("inference_video_id", asked), 400, says="None of the frames")
    assert len(video.objects) == told["objects"] > 0
    states = [one.state for one in runs_of(api, project_of(platform.state, video).id)]
    assert sorted(states) == ["done", "failed"]


def test_an_annotation_tool_gets_figures_of_its_track_and_is_told(app, api, platform, video):
    state = {"videoId": video.id, "settings": SETTINGS, "startFrameIndex": 2, "framesCount": 6}
    context = {"trackId": "of-the-tool"}
    answer = app.post("tracking_by_detection", state, context=context)
    assert answer.json() == {"message": "Track task started."}
    told = rows_of(platform.state).told
    wait = threading.Event()
    while not (video.figures and told and told[-1]["data"]["progress"]["current"] == 6):
        assert not wait.wait(0.05)
    assert {one["trackId"] for one in video.figures} == {"of-the-tool"}
    assert told[-1]["data"]["frameRange"] == [2, 7]


UNTRACKABLE = {
    "a video that is gone": ({"videoId": 999}, "There is no video 999"),
    "a range that it does not have": ({"startFrameIndex": 20}, "at least one frame"),
    "captions": ({"settings": {"task_prompt": "<CAPTION>"}}, "have none"),
}


@pytest.mark.parametrize(("asked", "says"), UNTRACKABLE.values(), ids=UNTRACKABLE)
def test_an_annotation_tool_is_told_why_nothing_comes(app, platform, video, asked, says):
    state = {"videoId": video.id, "settings": SETTINGS, **asked}
    app.post("tracking_by_detection", state, context={"trackId": "of-the-tool"})
    told, wait = rows_of(platform.state).told, threading.Event()
    while not (errors := [one for one in told if one["type"] == "videos:tracking-error"]):
        assert not wait.wait(0.05)
    assert errors[0]["data"]["trackId"] == "of-the-tool"
    assert says in errors[0]["data"]["error"]["message"]


def test_figures_are_there_also_where_the_annotation_tool_cannot_be_told(app, api, platform, video):
    platform.faults.fail("videos.notify-annotation-tool", times=50, status=400)
    state = {"videoId": video.id, "settings": SETTINGS, "framesCount": 3}
    app.post("tracking_by_detection", state, context={"trackId": "of-the-tool"})
    # The last that is written of a run.
    over, wait = b'"is_released": true', threading.Event()
    while not any(over in one.content for one in platform.state.files.values()):
        assert not wait.wait(0.05)
    [run] = runs_of(api, project_of(platform.state, video).id)
    assert (run.state, bool(video.figures)) == ("done", True)

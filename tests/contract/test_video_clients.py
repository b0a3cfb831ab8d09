"""The platform's applications for videos: what their users have at the end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from platform_videos import add_video, add_video_project
from public_clients import ApplyToVideos, PredictApp, run_video

from florence2_demo.clips import make_clip, write_clip
from serve.sdk import sly

CLIP = make_clip(3, seconds=1.0, fps=8)
KINDS = sorted({mover.kind for mover in CLIP.movers})
PROMPT = ". ".join(KINDS)
LAST = CLIP.num_frames - 1


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_clip(CLIP, path)
    return path.read_bytes()


@pytest.fixture
def video_id(platform, content) -> int:
    _, dataset_id = add_video_project(platform.state)
    return add_video(platform.state, dataset_id, "clip.mp4", content).id


@pytest.fixture
def client(api, running_app, video_id) -> ApplyToVideos:
    """Connected after its classes were asked for once, as its page offers them then."""
    settings = {"mapping": {kind: kind for kind in KINDS}, "num_beams": 1}
    asked = ApplyToVideos(api)
    asked.send("inference_video_id", videoId=video_id, framesCount=1, settings=settings)
    asked.connect()
    asked.edit(text=PROMPT, num_beams=1)
    return asked


def classes_in(annotation: sly.VideoAnnotation) -> list[str]:
    return sorted({figure.video_object.obj_class.name for figure in annotation.figures})


@pytest.mark.parametrize("tracker", ["botsort", None])
def test_a_video_is_labeled_with_the_classes_that_were_ticked(client, video_id, tracker):
    assert {one.name for one in client.meta.obj_classes} >= set(KINDS)
    found = client.annotate(video_id, (2, LAST), KINDS, tracker)
    assert classes_in(found) == KINDS
    assert {figure.frame_index for figure in found.figures} == set(range(2, LAST + 1))
    some = client.annotate(video_id, (0, 2), KINDS[:1], tracker)
    assert classes_in(some) == KINDS[:1]


def test_the_preview_shows_a_frame(client, video_id):
    assert client.preview(video_id, LAST).labels


def test_every_label_has_the_confidence_that_its_own_tracker_reads(client, video_id):
    labels = client.preview(video_id, 3).labels
    assert all(0 < label.tags.get("confidence").value <= 1 for label in labels)


def test_a_video_that_is_gone_is_an_error_with_a_sentence_and_no_wait(client, video_id):
    with pytest.raises((requests.HTTPError, RuntimeError), match="999999"):
        client.preview(999999, 0)


def test_the_same_video_twice_at_once_has_the_same_labels(client, video_id):
    def boxes(_):
        found = client.annotate(video_id, (0, 3), KINDS, None)
        return sorted(
            (one.frame_index, one.video_object.obj_class.name, str(one.geometry.to_json()))
            for one in found.figures
        )

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(boxes, range(2))
    assert first == second != []


@pytest.fixture
def app_of_predictions(api, running_app, video_id) -> PredictApp:
    client = PredictApp(api)
    client.connect()
    client.settings |= {"text": PROMPT, "num_beams": 1}
    return client


def test_predict_app_has_the_objects_of_the_whole_video(app_of_predictions, video_id):
    came, result = run_video(app_of_predictions, video_id, tracking=True)
    assert [one.frame_index for one in came] == list(range(CLIP.num_frames))
    meta = app_of_predictions.model.get_model_meta()
    found = sly.VideoAnnotation.from_json(result["video_ann"], meta)
    assert classes_in(found) == KINDS
    assert isinstance(app_of_predictions.model.get_tracking_settings(), dict)


def test_predict_app_may_leave_in_the_middle(app_of_predictions, video_id):
    came, _ = run_video(app_of_predictions, video_id, tracking=False, stop_after=1)
    assert came[0].annotation.labels
    came, _ = run_video(app_of_predictions, video_id, tracking=False)
    assert len(came) == CLIP.num_frames


@pytest.mark.parametrize("tracker", ["botsort", None])
def test_where_nothing_but_object_is_ticked_everything_is_one(client, video_id, tracker):
    assert classes_in(client.annotate(video_id, (0, 3), ["object"], tracker)) == ["object"]

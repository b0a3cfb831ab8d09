"""``api.nn.connect`` and ``ModelAPI``: the SDK's newer client, by task and by url."""

from __future__ import annotations

import pytest
import requests
from contract_calls import CITY, STREET, rows_of_labels
from platform_double import TASK_ID
from platform_seed import IMAGES

import serve.sdk  # noqa: F401  (before the SDK itself)

# isort: split
from supervisely.nn.model import prediction_session as sdk_prediction_session
from supervisely.nn.model.model_api import ModelAPI


@pytest.fixture(params=["by url", "by task"])
def model_api(request, api, running_app, seeded):
    if request.param == "by url":
        return ModelAPI(api, url=running_app.url)
    return api.nn.connect(TASK_ID)


@pytest.fixture
def by_task(api, running_app, seeded):
    return api.nn.connect(TASK_ID)


def classes(prediction):
    return sorted(label.obj_class.name for label in prediction.annotation.labels)


def test_the_model_is_ready_and_says_what_it_is(model_api):
    info = model_api.get_info()

    assert model_api.is_deployed() is True
    assert info["device"] == "cpu"
    assert info["task_type"] == "prompt-based object detection"
    assert model_api.status()["is_deployed"] is True


def test_it_lists_the_published_models_with_equal_columns(model_api):
    names = model_api.list_pretrained_models()
    rows = model_api.list_pretrained_model_infos()

    assert set(names) >= {"Florence-2-base", "Florence-2-large"}
    assert [row["meta"]["model_name"] for row in rows] == names
    assert len({tuple(row) for row in rows}) == 1


def test_its_classes_are_those_of_its_meta(model_api):
    assert "object" in model_api.get_classes()
    assert model_api.get_model_meta().get_tag_meta("confidence") is not None


def test_its_settings_come_as_yaml(model_api):
    assert "task_prompt" in model_api.get_settings()


def test_a_file_is_predicted_with_settings_as_keywords(model_api):
    [prediction] = model_api.predict(input=str(CITY), text="car", conf=0.3, show_progress=False)

    assert classes(prediction) == ["car", "car"]
    assert len(prediction.boxes) == 2
    assert min(prediction.scores) > 0.3


def test_a_folder_is_predicted_image_by_image_in_order(model_api, tmp_path):
    for path in (STREET, CITY):
        (tmp_path / path.name).write_bytes(path.read_bytes())

    predictions = model_api.predict(input=str(tmp_path), show_progress=False)

    alone = {
        path: classes(model_api.predict(input=str(path), show_progress=False)[0])
        for path in (CITY, STREET)
    }
    assert sorted(map(classes, predictions)) == sorted(alone.values())


def test_images_by_id_are_predicted_in_order(model_api, seeded):
    ids = [seeded.image_ids["scene_street.jpg"], seeded.image_ids["scene_city.jpg"]]

    predictions = model_api.predict(image_id=ids, task_prompt="<OD>", show_progress=False)

    assert [prediction.image_id for prediction in predictions] == ids
    [city] = model_api.predict(input=str(CITY), task_prompt="<OD>", show_progress=False)
    assert rows_of_labels(predictions[1].annotation) == rows_of_labels(city.annotation)


def test_a_project_is_predicted_without_being_changed(model_api, platform, seeded):
    before = platform.state.image(seeded.labeled_id).annotation

    predictions = model_api.predict(project_id=seeded.project_id, show_progress=False)

    assert {one.image_id for one in predictions} == set(seeded.image_ids.values())
    assert platform.state.image(seeded.labeled_id).annotation is before
    assert platform.count("annotations.bulk.add") == 0


def test_only_the_classes_that_are_asked_for_are_returned(model_api):
    [prediction] = model_api.predict(input=str(CITY), classes=["moon"], show_progress=False)

    assert classes(prediction) == ["moon"]


def test_the_class_object_sent_back_by_clients_drops_nothing(model_api):
    [prediction] = model_api.predict(
        input=str(CITY), classes=model_api.get_classes(), text="car", show_progress=False
    )

    assert classes(prediction) == ["car", "car"]


def test_a_detached_prediction_can_be_stopped(model_api, app, platform, seeded, monkeypatch):
    # The client does not return before the first image is done; here it is held.
    monkeypatch.setattr(
        sdk_prediction_session.PredictionSession,
        "_wait_for_inference_start",
        lambda self, **_: (self._get_inference_progress(), True),
    )
    with platform.faults.held("images.bulk.download"):
        detached = model_api.predict_detached(project_id=seeded.project_id)
        detached.stop()

    progress = app.finished(detached.inference_request_uuid)
    assert (progress["stopped"], progress["exception"]) == (True, None)


def test_a_failed_image_raises_and_says_why(model_api, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")

    with pytest.raises((RuntimeError, requests.HTTPError), match="image"):
        model_api.predict(input=str(broken), show_progress=False)


def test_freezing_answers_and_the_next_prediction_works(model_api):
    assert "message" in model_api.freeze_model()

    [prediction] = model_api.predict(input=str(CITY), text="car", show_progress=False)
    assert classes(prediction) == ["car", "car"]


def test_a_model_is_deployed_again_while_the_app_runs(by_task):
    by_task.load("demo", device="cpu")

    assert by_task.is_deployed() is True
    [prediction] = by_task.predict(input=str(CITY), text="car", show_progress=False)
    assert classes(prediction) == ["car", "car"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        pytest.param({"model": "no-such-model"}, "no-such-model", id="unknown model"),
        pytest.param({"model": "demo", "device": "cuda:7"}, "cuda:7", id="missing device"),
        pytest.param({"model": "demo", "runtime": "TensorRT"}, "TensorRT", id="other runtime"),
    ],
)
def test_a_deployment_that_fails_says_why_and_leaves_the_model_running(by_task, options, sentence):
    with pytest.raises(requests.HTTPError, match=sentence) as raised:
        by_task.load(**options)

    assert 400 <= raised.value.response.status_code < 500
    assert by_task.is_deployed() is True
    [prediction] = by_task.predict(input=str(CITY), text="car", show_progress=False)
    assert classes(prediction) == ["car", "car"]


def test_every_demo_image_can_be_predicted_in_one_request(by_task):
    predictions = by_task.predict(input=str(IMAGES), show_progress=False)

    assert len(predictions) == len(list(IMAGES.iterdir()))

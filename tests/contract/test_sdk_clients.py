"""The SDK's clients ``Session`` and ``ModelAPI``, by url and by task."""

from __future__ import annotations

import pytest
import requests
from contract_calls import CITY, HOME, STREET, classes_in_labels, rows_of_labels
from platform_double import TASK_ID
from platform_seed import IMAGES

from serve.sdk import sly

# isort: split
from supervisely.nn.model import prediction_session as sdk_prediction_session
from supervisely.nn.model.model_api import ModelAPI

Session, SessionJSON = sly.nn.inference.Session, sly.nn.inference.SessionJSON
KIND = "prompt-based object detection"


@pytest.fixture(params=["by url", "by task"])
def session(request, api, running_app, seeded):
    if request.param == "by url":
        return Session(api, session_url=running_app.url)
    return Session(api, task_id=TASK_ID)


@pytest.fixture
def json_session(api, session_url, seeded):
    return SessionJSON(api, session_url=session_url)


def test_the_session_says_what_it_serves(session):
    info = session.get_session_info()
    assert info["app_name"] == "Serve Florence-2"
    assert info["task type"] == KIND
    assert info["batch_inference_support"] is True
    assert info["number_of_classes"] >= 1
    assert "Model name" in session.get_human_readable_info()


def test_the_deployment_says_what_runs(session):
    info = session.get_deploy_info()
    assert (info.device, info.runtime, info.task_type) == ("cpu", "PyTorch", KIND)
    assert info.checkpoint_name


def test_the_model_meta_has_classes_and_every_tag_that_answers_may_have(session):
    meta = session.get_model_meta()
    assert meta.get_obj_class("object") is not None
    assert {tag.name for tag in meta.tag_metas} >= {"confidence", "text", "caption", "ocr_text"}


def test_default_settings_are_yaml_and_its_keys_may_be_sent_back(session):
    settings = session.get_default_inference_settings()
    assert {"task_prompt", "text", "mapping", "confidence_threshold"} <= set(settings)
    session.set_inference_settings(settings)
    assert session.inference_image_path(str(CITY)).labels


def test_the_sdk_is_told_which_setting_it_misspelt(session):
    with pytest.raises(ValueError, match="'confidence_treshold' is not acceptable"):
        session.set_inference_settings({"confidence_treshold": 0.5})


def test_an_image_by_path_gives_an_annotation(session):
    session.set_inference_settings({"text": "car"})
    assert classes_in_labels(session.inference_image_path(str(CITY))) == ["car", "car"]


def test_an_image_by_id_gives_what_its_file_gives(session, seeded):
    session.set_inference_settings({"task_prompt": "<OD>"})
    by_id = session.inference_image_id(seeded.image_ids["scene_city.jpg"])
    assert rows_of_labels(by_id) == rows_of_labels(session.inference_image_path(str(CITY)))
    assert len(by_id.labels) == 3


def test_images_by_ids_are_answered_in_order(session, seeded):
    names = ["scene_street.jpg", "scene_city.jpg", "scene_home.jpg"]
    annotations = session.inference_image_ids([seeded.image_ids[name] for name in names])
    found = list(map(classes_in_labels, annotations))
    alone = [session.inference_image_id(seeded.image_ids[name]) for name in names]
    assert found == list(map(classes_in_labels, alone))
    assert len(set(map(tuple, found))) == 3


def test_several_paths_are_answered_in_order(session):
    found = session.inference_image_paths([str(STREET), str(CITY)])
    alone = [session.inference_image_path(str(path)) for path in (STREET, CITY)]
    assert list(map(classes_in_labels, found)) == list(map(classes_in_labels, alone))


def test_a_caption_arrives_as_a_tag_of_the_image(session):
    session.set_inference_settings({"task_prompt": "<CAPTION>"})
    annotation = session.inference_image_path(str(HOME))
    assert "moon" in annotation.img_tags.get("caption").value
    assert annotation.labels == []


def test_an_outline_arrives_as_a_polygon_of_the_phrase(session):
    task = "<REFERRING_EXPRESSION_SEGMENTATION>"
    session.set_inference_settings({"task_prompt": task, "text": "car"})
    annotation = session.inference_image_path(str(STREET))
    assert set(classes_in_labels(annotation)) == {"car"}
    assert {label.geometry.geometry_name() for label in annotation.labels} == {"polygon"}


def test_images_by_ids_in_the_background_come_out_with_names_and_in_order(json_session, seeded):
    ids = seeded.in_dataset("outside")
    results = list(json_session.inference_image_ids_async(ids, batch_size=2))
    names = [name for name, image_id in seeded.image_ids.items() if image_id in ids]
    assert [result["image_id"] for result in results] == ids
    assert [result["image_name"] for result in results] == names
    assert all(result["annotation"]["objects"] for result in results)


def test_a_project_in_the_background_gives_every_image_once(session, seeded):
    found = session.inference_project_id(seeded.project_id)
    assert sorted(info.image_id for info in found) == sorted(seeded.image_ids.values())
    assert all(info.annotation["objects"] for info in found)


def test_chosen_datasets_of_a_project_are_all_that_is_labeled(json_session, seeded):
    datasets = [seeded.dataset_ids["inside"]]
    found = json_session.inference_project_id(seeded.project_id, dataset_ids=datasets)
    assert [one["image_id"] for one in found] == seeded.in_dataset("inside")


def test_labels_for_another_project_go_there_with_copies_of_the_images(
    json_session, api, platform, seeded
):
    target = platform.state.add_project("labeled by the model")
    json_session.inference_project_id(seeded.project_id, output_project_id=target.id)
    copies = [
        image for row in api.dataset.get_list(target.id) for image in api.image.get_list(row.id)
    ]
    assert {image.name for image in copies} == set(seeded.image_ids)
    assert all(image.labels_count > 0 for image in copies)
    assert platform.state.image(seeded.labeled_id).to_json(1)["labelsCount"] == 1


def test_a_run_that_is_stopped_ends_without_an_error(app, platform, seeded):
    with platform.faults.held("images.bulk.download"):
        answer = app.post("inference_project_id_async", {"projectId": seeded.project_id})
        uuid = answer.json()["inference_request_uuid"]
        stopped = app.post("stop_inference", {"inference_request_uuid": uuid})
        assert stopped.json()["success"] is True

    progress, results = app.finished(uuid)
    assert (progress["stopped"], progress["exception"], results) == (True, None, [])
    cleared = app.post("clear_inference_request", {"inference_request_uuid": uuid})
    assert cleared.json()["success"] is True


@pytest.fixture(params=["by url", "by task"])
def model_api(request, api, running_app, seeded):
    if request.param == "by url":
        return ModelAPI(api, url=running_app.url)
    return api.nn.connect(TASK_ID)


@pytest.fixture
def by_task(api, running_app, seeded):
    return api.nn.connect(TASK_ID)


def predict(model_api, path=None, **settings):
    source = {} if path is None else {"input": str(path)}
    return model_api.predict(**source, **settings, show_progress=False)


def classes(prediction):
    return classes_in_labels(prediction.annotation)


def finds_both_cars(model_api, **settings):
    [prediction] = predict(model_api, CITY, text="car", **settings)
    return classes(prediction) == ["car", "car"]


def test_the_model_is_ready_and_says_what_it_is(model_api):
    info = model_api.get_info()
    assert model_api.is_deployed() is True
    assert (info["device"], info["task_type"]) == ("cpu", KIND)
    assert model_api.status()["is_deployed"] is True
    assert "object" in model_api.get_classes()
    assert model_api.get_model_meta().get_tag_meta("confidence") is not None
    assert "task_prompt" in model_api.get_settings()


def test_it_lists_the_published_models_with_equal_columns(model_api):
    names = model_api.list_pretrained_models()
    rows = model_api.list_pretrained_model_infos()
    assert set(names) >= {"Florence-2-base", "Florence-2-large"}
    assert [row["meta"]["model_name"] for row in rows] == names
    assert len({tuple(row) for row in rows}) == 1


def test_a_file_is_predicted_with_settings_as_keywords(model_api):
    [prediction] = predict(model_api, CITY, text="car", conf=0.3)
    assert classes(prediction) == ["car", "car"]
    assert len(prediction.boxes) == 2
    assert min(prediction.scores) > 0.3


def test_a_folder_is_predicted_image_by_image(model_api, tmp_path):
    for path in (STREET, CITY):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    alone = [classes(predict(model_api, path)[0]) for path in (CITY, STREET)]
    assert sorted(map(classes, predict(model_api, tmp_path))) == sorted(alone)


def test_images_by_id_are_predicted_in_order(model_api, seeded):
    ids = [seeded.image_ids["scene_street.jpg"], seeded.image_ids["scene_city.jpg"]]
    predictions = predict(model_api, image_id=ids, task_prompt="<OD>")
    [city] = predict(model_api, CITY, task_prompt="<OD>")
    assert [prediction.image_id for prediction in predictions] == ids
    assert rows_of_labels(predictions[1].annotation) == rows_of_labels(city.annotation)


def test_a_project_is_predicted_without_being_changed(model_api, platform, seeded):
    before = platform.state.image(seeded.labeled_id).annotation
    predictions = predict(model_api, project_id=seeded.project_id)
    assert {one.image_id for one in predictions} == set(seeded.image_ids.values())
    assert platform.state.image(seeded.labeled_id).annotation is before
    assert platform.count("annotations.bulk.add") == 0


def test_only_the_classes_that_are_asked_for_are_returned(model_api):
    [prediction] = predict(model_api, CITY, classes=["moon"])
    assert classes(prediction) == ["moon"]


def test_classes_that_only_later_images_have_are_known_to_the_first(model_api, seeded):
    prompts = {"celestial body": "moon", "motor": "car"}
    ids = [seeded.image_ids[name] for name in ("scene_home.jpg", "scene_city.jpg")]
    predictions = predict(
        model_api, image_id=ids, batch_size=1, inference_settings={"mapping": prompts}
    )
    names = [sorted(set(prediction.classes)) for prediction in predictions]
    assert names == [["celestial body"], ["celestial body", "motor"]]
    assert len(set(map(int, predictions[1].class_idxs))) == 2


def test_the_class_object_sent_back_by_clients_drops_nothing(model_api):
    assert finds_both_cars(model_api, classes=model_api.get_classes())


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
    progress, _ = app.finished(detached.inference_request_uuid)
    assert (progress["stopped"], progress["exception"]) == (True, None)


def test_a_failed_image_raises_and_says_why(model_api, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    with pytest.raises((RuntimeError, requests.HTTPError), match="image"):
        predict(model_api, broken)


def test_freezing_answers_and_the_next_prediction_works(model_api):
    assert "message" in model_api.freeze_model()
    assert finds_both_cars(model_api)


def test_a_model_is_deployed_again_while_the_app_runs(by_task):
    by_task.load("demo", device="cpu")
    assert by_task.is_deployed() is True
    assert finds_both_cars(by_task)


FAILING = {
    "unknown model": ({"model": "no-such-model"}, "no-such-model"),
    "missing device": ({"model": "demo", "device": "cuda:7"}, "cuda:7"),
    "other runtime": ({"model": "demo", "runtime": "TensorRT"}, "TensorRT"),
}


@pytest.mark.parametrize(("options", "sentence"), FAILING.values(), ids=FAILING)
def test_a_deployment_that_fails_says_why_and_leaves_the_model_running(by_task, options, sentence):
    with pytest.raises(requests.HTTPError, match=sentence) as raised:
        by_task.load(**options)
    assert 400 <= raised.value.response.status_code < 500
    assert by_task.is_deployed() is True
    assert finds_both_cars(by_task)


def test_every_demo_image_can_be_predicted_in_one_request(by_task):
    assert len(predict(by_task, IMAGES)) == len(list(IMAGES.iterdir()))

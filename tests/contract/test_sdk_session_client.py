"""``sly.nn.inference.Session``, straight to the app and through the platform."""

from __future__ import annotations

import pytest
from contract_calls import CITY, HOME, STREET, rows_of_labels
from platform_double import TASK_ID

from serve.sdk import sly

Session, SessionJSON = sly.nn.inference.Session, sly.nn.inference.SessionJSON


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
    assert info["task type"] == "prompt-based object detection"
    assert info["batch_inference_support"] is True
    assert info["number_of_classes"] >= 1
    assert "Model name" in session.get_human_readable_info()


def test_the_deployment_says_what_runs(session):
    info = session.get_deploy_info()

    assert info.device == "cpu"
    assert info.runtime == "PyTorch"
    assert info.task_type == "prompt-based object detection"
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


def test_an_image_by_path_gives_an_annotation(session):
    session.set_inference_settings({"text": "car"})

    annotation = session.inference_image_path(str(CITY))

    assert [label.obj_class.name for label in annotation.labels] == ["car", "car"]


def test_an_image_by_id_gives_what_its_file_gives(session, seeded):
    session.set_inference_settings({"task_prompt": "<OD>"})

    by_id = session.inference_image_id(seeded.image_ids["scene_city.jpg"])

    assert rows_of_labels(by_id) == rows_of_labels(session.inference_image_path(str(CITY)))
    assert len(by_id.labels) == 3


def test_images_by_ids_are_answered_in_order(session, seeded):
    names = ["scene_street.jpg", "scene_city.jpg", "scene_home.jpg"]

    annotations = session.inference_image_ids([seeded.image_ids[name] for name in names])

    alone = [session.inference_image_id(seeded.image_ids[name]) for name in names]
    assert [classes(one) for one in annotations] == [classes(one) for one in alone]
    assert len({tuple(classes(one)) for one in annotations}) == 3


def test_several_paths_are_answered_in_order(session):
    annotations = session.inference_image_paths([str(STREET), str(CITY)])

    assert [classes(one) for one in annotations] == [
        classes(session.inference_image_path(str(path))) for path in (STREET, CITY)
    ]


def classes(annotation):
    return sorted(label.obj_class.name for label in annotation.labels)


def test_a_caption_arrives_as_a_tag_of_the_image(session):
    session.set_inference_settings({"task_prompt": "<CAPTION>"})

    annotation = session.inference_image_path(str(HOME))

    assert "moon" in annotation.img_tags.get("caption").value
    assert annotation.labels == []


def test_an_outline_arrives_as_a_polygon_of_the_phrase(session):
    session.set_inference_settings(
        {"task_prompt": "<REFERRING_EXPRESSION_SEGMENTATION>", "text": "car"}
    )

    annotation = session.inference_image_path(str(STREET))

    assert {label.obj_class.name for label in annotation.labels} == {"car"}
    assert {label.geometry.geometry_name() for label in annotation.labels} == {"polygon"}


def test_images_by_ids_in_the_background_come_out_with_names_and_in_order(json_session, seeded):
    ids = seeded.in_dataset("outside")

    results = list(json_session.inference_image_ids_async(ids, batch_size=2))

    assert [result["image_id"] for result in results] == ids
    assert [result["image_name"] for result in results] == [
        name for name, image_id in seeded.image_ids.items() if image_id in ids
    ]
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

    progress = app.finished(uuid)
    assert (progress["stopped"], progress["exception"]) == (True, None)
    popped = app.post("pop_inference_results", {"inference_request_uuid": uuid}).json()
    assert popped["pending_results"] == []
    cleared = app.post("clear_inference_request", {"inference_request_uuid": uuid})
    assert cleared.json()["success"] is True


def test_the_sdk_is_told_which_setting_it_misspelt(session):
    with pytest.raises(ValueError, match="'confidence_treshold' is not acceptable"):
        session.set_inference_settings({"confidence_treshold": 0.5})

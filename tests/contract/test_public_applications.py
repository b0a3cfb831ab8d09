"""The platform's public applications against the running app: what their users have at the end."""

from __future__ import annotations

import base64
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import yaml
from contract_calls import (
    CITY,
    HOME,
    STREET,
    annotation_of,
    classes_in,
    classes_in_labels,
    meta_of,
    rows_of,
)
from platform_double import TASK_ID, TOKEN
from platform_seed import DATASETS
from platform_state import WORKSPACE_ID
from public_clients import AnnotationTool, ApplyFlorence, ApplyToImages, PredictApp

from serve.sdk import sly

BATCH = 16


@pytest.fixture
def send(api, running_app, seeded):
    """A request to the task, the way applications send it."""

    def request(command, **state):
        return api.task.send_request(TASK_ID, command, state, raise_error=True)

    return request


@pytest.fixture
def city(seeded):
    return seeded.image_ids["scene_city.jpg"]


def connected(client):
    client.connect()
    return client


def labels_by_name(api, project_id):
    """What each image of a project is labeled with, by the image's name."""
    images = [
        image
        for row in api.dataset.get_list(project_id, recursive=True)
        for image in api.image.get_list(row.id)
    ]
    return {image.name: annotation_of(api, image.id).labels for image in images}


@contextmanager
def held_from(platform, method, call):
    """Calls of a method from the n-th on are answered only after the block."""
    gate, number = threading.Event(), itertools.count(1)
    platform.faults.gates[method] = SimpleNamespace(
        wait=lambda seconds: next(number) < call or gate.wait(seconds)
    )
    try:
        yield
    finally:
        gate.set()
        platform.faults.gates.pop(method)


def by_the_model(labels):
    return [label for label in labels if label.tags.get("confidence") is not None]


TYPED = {
    "a list": "text:\n- car\n- moon\n",
    "a phrase in quotes": "text: 'car; moon'\n",
    "several lines": "text: |\n  car\n  moon\n",
    "classes with prompts": "mapping: {car: car, moon: [moon]}\n",
    "nothing else, and a comment": "# mine\ntext: car. moon  # both\n",
}


IN_PROJECT = {
    "no such tag": [],
    "a tag of another value": [sly.TagMeta("text", sly.TagValueType.NONE)],
    "a tag of images": [
        sly.TagMeta(
            "text", sly.TagValueType.ANY_STRING, applicable_to=sly.TagApplicableTo.IMAGES_ONLY
        )
    ],
}


def add_tags(api, project_id, *tags):
    api.project.update_meta(project_id, meta_of(api, project_id).add_tag_metas(tags))


class TestAnnotationTool:
    """NN Image Labeling: connect, then one image at a time in the annotation tool."""

    @pytest.fixture
    def tool(self, api, running_app, seeded):
        return connected(AnnotationTool(api))

    def test_it_may_offer_windows_and_shows_who_it_talks_to(self, tool):
        assert tool.info["sliding_window_support"] not in (None, False, "none")
        assert tool.info["app_name"] == "Serve Florence-2"

    def test_the_settings_as_they_came_label_the_image_beside_what_was_there(self, tool, api, city):
        tool.press(city)
        labels = annotation_of(api, city).labels
        assert (tool.error, len(labels)) == ("", 1 + 3)
        assert sorted(label.obj_class.name for label in by_the_model(labels)) == [
            "car", "car", "moon"
        ]  # fmt: skip

    def test_settings_that_the_user_edited_are_followed(self, tool, api, city):
        tool.edit(text="car", confidence_threshold=0.2)
        tool.press(city, add_mode="replace")
        labels = annotation_of(api, city).labels
        assert [label.obj_class.name for label in labels] == ["car", "car"]
        assert all(label.tags.get("confidence").value > 0.2 for label in labels)

    @pytest.mark.parametrize("typed", TYPED.values(), ids=TYPED)
    def test_whatever_yaml_the_user_types_is_understood(self, tool, api, city, typed):
        tool.text = typed
        tool.press(city, add_mode="replace")
        assert {label.obj_class.name for label in annotation_of(api, city).labels} == {
            "car", "moon"
        }  # fmt: skip

    def test_an_empty_editor_asks_as_the_settings_that_came(self, tool, api, city):
        tool.text = "# nothing\n"
        found = tool.press(city, add_mode="replace")
        assert classes_in_labels(found) == ["car", "car", "moon"]

    def test_a_selected_object_becomes_the_reference_and_text_is_asked_again_later(
        self, tool, api, city
    ):
        tool.press(city, add_mode="replace")
        car = next(one for one in annotation_of(api, city).labels if one.obj_class.name == "car")
        comment = next(line for line in tool.text.splitlines() if line.startswith("#"))

        assert tool.press(city, figure_id=car.geometry.sly_id) is None
        assert comment in tool.text
        assert set(classes_in_labels(tool.press(city, add_mode="replace"))) == {"car"}

        tool.edit(mode="text_prompt", text="moon")
        assert set(classes_in_labels(tool.press(city, add_mode="replace"))) == {"moon"}

    def test_a_class_of_another_shape_keeps_its_shape(self, tool, api, seeded, city):
        tool.edit(mapping={"outline": "car"})
        tool.press(city, add_mode="replace")
        meta = meta_of(api, seeded.project_id)
        assert meta.get_obj_class("outline").geometry_type is sly.Polygon
        assert {label.obj_class.name for label in annotation_of(api, city).labels} == {
            "outline_pred"
        }

    def test_text_that_was_read_arrives_where_the_project_has_a_tag_for_it(
        self, tool, api, seeded, city
    ):
        add_tags(api, seeded.project_id, tool.meta.get_tag_meta("text"))
        tool.edit(task_prompt="<OCR_WITH_REGION>")
        tool.press(city, add_mode="replace")
        labels = annotation_of(api, city).labels
        assert {label.geometry.geometry_name() for label in labels} == {"polygon"}
        assert all(label.tags.get("text").value for label in labels)

    @pytest.mark.parametrize("add_mode", ["merge", "replace"])
    @pytest.mark.parametrize("in_project", IN_PROJECT.values(), ids=IN_PROJECT)
    def test_text_that_was_read_is_a_description_where_the_project_does_not_take_its_tag(
        self, tool, api, seeded, city, in_project, add_mode
    ):
        add_tags(api, seeded.project_id, *in_project)
        tool.edit(task_prompt="<OCR_WITH_REGION>")
        tool.press(city, add_mode=add_mode)
        labels = annotation_of(api, city).labels
        read = [one for one in labels if one.obj_class.name == "text"]
        assert tool.error == ""
        assert read
        assert all(one.description and one.tags.get("text") is None for one in read)
        assert len(labels) - len(read) == (1 if add_mode == "merge" else 0)

    def test_a_score_goes_where_the_project_means_something_else_by_confidence(
        self, tool, api, seeded, city
    ):
        add_tags(api, seeded.project_id, sly.TagMeta("confidence", sly.TagValueType.ANY_STRING))
        tool.press(city, add_mode="replace")
        labels = annotation_of(api, city).labels
        assert classes_in_labels(annotation_of(api, city)) == ["car", "car", "moon"]
        assert not any(label.tags.get("confidence") for label in labels)

    @pytest.mark.parametrize("key", ["unknown_tags: tag", ""], ids=["asked for", "key left out"])
    def test_tags_stay_tags_for_whoever_reads_them(self, tool, send, city, key):
        settings = yaml.safe_load(f"task_prompt: <OCR_WITH_REGION>\n{key}\n")
        entry = send("inference_image_id", image_id=city, settings=settings)
        objects = entry["annotation"]["objects"]
        assert objects
        assert all("text" in [tag["name"] for tag in one["tags"]] for one in objects)

    def test_labels_come_as_they_are_where_the_tags_of_the_project_cannot_be_read(
        self, tool, platform, send, city
    ):
        whole = send("inference_image_id", image_id=city, settings={})
        platform.faults.fail("projects.meta", times=50, status=403)
        entry = send("inference_image_id", image_id=city, settings=yaml.safe_load(tool.text))
        assert rows_of(entry["annotation"]) == rows_of(whole["annotation"]) != []

    def test_a_caption_without_a_tag_for_it_is_told_and_arrives_once_there_is_one(
        self, tool, api, seeded, city
    ):
        before = annotation_of(api, city)
        tool.edit(task_prompt="<CAPTION>")
        tool.press(city)
        assert "has no tag 'caption'" in tool.error
        assert rows(annotation_of(api, city)) == rows(before)

        add_tags(api, seeded.project_id, tool.meta.get_tag_meta("caption"))
        tool.error = ""
        tool.press(city)
        assert tool.error == ""
        assert annotation_of(api, city).img_tags.get("caption").value

    def test_objects_beside_a_caption_arrive_without_a_tag_for_it(self, tool, api, city):
        tool.edit(task_prompt="<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>")
        tool.press(city, add_mode="replace")
        found = annotation_of(api, city)
        assert tool.error == ""
        assert found.labels
        assert found.img_description

    def test_labels_of_a_run_of_ours_stay_as_they_are(self, tool, api, send, city):
        run = PredictApp(api)
        run.connect()
        run.run([city], "append")
        before = [one for one in annotation_of(api, city).labels if one.tags.get("florence2_run")]
        tool.edit(task_prompt="<OCR_WITH_REGION>")
        tool.press(city)
        after = [one for one in annotation_of(api, city).labels if one.tags.get("florence2_run")]
        assert len(before) == len(after) > 0

    def test_outlines_of_a_class_that_was_asked_for_before_connecting_arrive(
        self, api, running_app, seeded
    ):
        street = seeded.image_ids["scene_street.jpg"]
        outlines = {"task_prompt": "<REFERRING_EXPRESSION_SEGMENTATION>", "text": "car"}
        AnnotationTool(api).send("inference_image_id", image_id=street, settings=outlines)
        tool = connected(AnnotationTool(api))
        tool.edit(**outlines)
        found = tool.press(street)
        assert {label.geometry.geometry_name() for label in found.labels} == {"polygon"}

    def test_a_key_that_is_misspelt_is_named_and_the_image_stays_as_it_was(self, tool, api, city):
        before = annotation_of(api, city)
        tool.text = "confidence_treshold: 0.5\n"
        tool.press(city)
        assert "confidence_threshold" in tool.error
        assert rows(annotation_of(api, city)) == rows(before)

    def test_pressing_it_twice_at_once_finds_the_same_twice(self, tool, city):
        settings = yaml.safe_load(tool.text)

        def ask(_):
            return tool.send("inference_image_id", image_id=city, settings=settings)

        with ThreadPoolExecutor(2) as pool:
            first, second = (rows_of(one["annotation"]) for one in pool.map(ask, range(2)))
        assert first == second != []


def rows(annotation):
    return sorted(
        (label.obj_class.name, str(label.geometry.to_json()["points"]))
        for label in annotation.labels
    )


class TestARectangle:
    """What applications send as ROI: a label's bounding box, beside the settings."""

    def test_it_limits_the_look_and_labels_stay_in_it(self, send, city):
        settings = yaml.safe_load(send("get_custom_inference_settings")["settings"])
        found = rows_of(send("inference_image_id", image_id=city, settings=settings)["annotation"])
        _, _, left, top, right, bottom = next(row for row in found if row[0] == "moon")
        roi = sly.Rectangle(max(0, top - 20), max(0, left - 20), bottom + 20, right + 20)

        answer = send(
            "inference_image_id", image_id=city, settings=settings, rectangle=roi.to_json()
        )

        inside = rows_of(answer["annotation"])
        assert inside
        corners = [
            (sly.PointLocation(row, col))
            for _, _, c1, r1, c2, r2 in inside
            for row, col in ((r1, c1), (r2, c2))
        ]
        assert all(map(roi.contains_point_location, corners))


WINDOW = {"windowHeight": 256, "windowWidth": 256, "overlapY": 64, "overlapX": 64}
WINDOW |= {"borderStrategy": "shift_window", "naive": False}


class TestApplyToImages:
    """Apply NN to Images Project: a project made anew, two images at a time, or in windows."""

    @pytest.fixture
    def client(self, api, running_app, seeded):
        return connected(ApplyToImages(api))

    def test_a_dataset_is_labeled_in_a_project_made_anew(self, client, api, seeded):
        result = client.apply(seeded.project_id, seeded.dataset_ids["outside"])
        labels = labels_by_name(api, result)
        assert set(labels) == set(DATASETS["outside"])
        assert all(map(by_the_model, labels.values()))
        [drawn] = [one for one in labels["scene_city.jpg"] if one.tags.get("reviewed")]
        assert drawn.obj_class.name == "car"
        assert len(annotation_of(api, seeded.labeled_id).labels) == 1

    def test_labels_that_are_there_already_are_not_added_again(self, client, api, seeded, city):
        AnnotationTool.press(connected(AnnotationTool(api)), city, add_mode="replace")
        client.edit(existing_objects_iou_thresh=0.9)
        result = client.apply(seeded.project_id, seeded.dataset_ids["outside"])
        assert len(labels_by_name(api, result)["scene_city.jpg"]) == 3

    def test_text_that_was_read_is_a_description_where_the_project_has_no_tag_for_it(
        self, client, api, seeded
    ):
        client.edit(task_prompt="<OCR_WITH_REGION>")
        result = client.apply(seeded.project_id, seeded.dataset_ids["outside"], add_mode="replace")
        labels = [one for found in labels_by_name(api, result).values() for one in found]
        assert labels
        assert all(one.description and one.obj_class.name == "text" for one in labels)

    def test_a_damaged_image_of_two_costs_itself_alone(self, client, api, platform, seeded):
        platform.faults.damage(seeded.image_ids["scene_street.jpg"])
        result = client.apply(seeded.project_id, seeded.dataset_ids["outside"])
        found = {
            name: len(by_the_model(labels)) for name, labels in labels_by_name(api, result).items()
        }
        assert found["scene_street.jpg"] == 0
        assert found["scene_city.jpg"] == 3

    def test_a_sliding_window_in_the_background_is_there_with_its_last_progress(
        self, client, api, seeded
    ):
        client.window = WINDOW
        result = client.apply(seeded.project_id, seeded.dataset_ids["inside"])
        labels = labels_by_name(api, result)
        assert set(labels) == set(DATASETS["inside"])
        assert all(map(by_the_model, labels.values()))

    def test_the_film_of_a_sliding_window_shows_each_window_and_all_at_the_end(
        self, api, client, city
    ):
        AnnotationTool(api).send("inference_image_id", image_id=city, settings={})
        client.connect()
        client.window = WINDOW
        *windows, before, after = client.preview_windows(city)
        entry = client.send("inference_image_id", image_id=city, settings=client._settings())
        assert len(windows) > 2
        assert len(before["labels"]) == len(after["labels"]) == len(entry["annotation"]["objects"])
        assert sum(len(slide["labels"]) for slide in windows) >= len(after["labels"]) > 0
        assert after["rectangle"]["points"]["exterior"][0] == [0, 0]

    def test_an_image_by_its_id_in_the_background_may_be_fetched_as_any_other(self, send, city):
        started = send("inference_image_id_async", image_id=city, settings={})
        uuid = started["inference_request_uuid"]
        while not (progress := send("get_inference_progress", inference_request_uuid=uuid))[
            "finished"
        ]:
            assert progress["is_inferring"] is True
            assert {"current", "total"} <= set(progress["progress"])
        [popped] = send("pop_inference_results", inference_request_uuid=uuid)["pending_results"]
        assert (
            progress["result"]
            == popped
            == send("get_inference_result", inference_request_uuid=uuid)
        )


class TestApplyFlorence:
    """Apply Florence-2 to Images: text prompts, and classes that end with ``_bbox``."""

    def test_a_dataset_gets_boxes_and_the_next_model_their_names(self, api, running_app, seeded):
        client = connected(ApplyFlorence(api))
        result, asked = client.apply(seeded.project_id, seeded.dataset_ids["outside"], "car. moon")
        labels = by_the_model(labels_by_name(api, result)["scene_city.jpg"])
        assert sorted(label.obj_class.name for label in labels) == [
            "car_bbox", "car_bbox", "moon_bbox"
        ]  # fmt: skip
        assert {name for name, _ in asked} == {"car", "moon"}
        assert all(len(corners) == 2 for _, corners in asked)

    def test_whatever_is_asked_the_ending_is_the_same(self, send, city):
        settings = {"mapping": None, "mode": "text_prompt", "text": ""}
        answer = send("inference_image_id", image_id=city, settings=settings)
        assert set(classes_in(answer["annotation"])) == {"car_bbox", "moon_bbox"}
        settings = {"mapping": {"vehicle": "car"}, "mode": "text_prompt", "text": None}
        answer = send("inference_image_id", image_id=city, settings=settings)
        assert set(classes_in(answer["annotation"])) == {"vehicle_bbox"}

    def test_another_client_with_the_same_words_gets_them_as_they_are(self, send, city):
        settings = {"mode": "text_prompt", "text": "car"}

        for more in ({}, {"num_beams": 1}, {"mapping": None, "confidence_threshold": 0.1}):
            answer = send("inference_image_id", image_id=city, settings={**settings, **more})
            assert set(classes_in(answer["annotation"])) == {"car"}


# Labels that stay, labels that are new, and whether a second run adds them again.
ADDED = {"append": (1, 3, True), "iou_merge": (1, 3, False), "replace": (0, 3, False)}


class TestPredictApp:
    """The SDK's Predict App: its own settings, the model's classes, an upload mode."""

    @pytest.fixture
    def client(self, api, running_app, seeded):
        return connected(PredictApp(api))

    @pytest.mark.parametrize(("mode", "expected"), ADDED.items(), ids=ADDED)
    def test_its_run_labels_the_images_and_a_second_one_adds_what_its_mode_says(
        self, client, api, seeded, city, mode, expected
    ):
        kept, found, adds_again = expected
        ids = seeded.in_dataset("outside")

        predictions = client.run(ids, mode)

        assert [one.image_id for one in predictions] == ids
        assert len(annotation_of(api, city).labels) == kept + found
        assert all(by_the_model(annotation_of(api, image_id).labels) for image_id in ids)
        client.run(ids, mode)
        assert len(annotation_of(api, city).labels) == kept + found * (1 + adds_again)

    def test_a_class_that_the_project_has_in_another_shape_gets_the_suffix_of_the_page(
        self, client, api, city
    ):
        client.settings |= {"mapping": {"outline": "car"}}
        client.run([city], "append")
        found = by_the_model(annotation_of(api, city).labels)
        assert {label.obj_class.name for label in found} == {"outline_model"}

    def test_stop_in_the_middle_keeps_what_is_done_and_ends_the_rest(
        self, client, api, platform, app, seeded
    ):
        dataset_id, content = seeded.dataset_ids["inside"], HOME.read_bytes()
        names = [f"{number}.jpg" for number in range(5 * BATCH)]
        ids = [platform.state.add_image(dataset_id, name, content).id for name in names]
        client.settings |= {"text": "moon", "num_beams": 1}
        with held_from(platform, "annotations.bulk.add", call=2):
            came = client.run(ids, "append", stop_after=1)
        assert by_the_model(annotation_of(api, came[0].image_id).labels)
        # A request that comes later is answered once this one has ended.
        app.done("inference_batch_ids_async", {"image_ids": ids[:1], "upload_mode": "append"})
        labeled = [image_id for image_id in ids if annotation_of(api, image_id).labels]
        assert BATCH <= len(labeled) < len(ids)


FOUND = {
    "all": ({}, 1),
    "of the framework": ({"framework": "Florence-2"}, 1),
    "of the model": ({"model": "Florence-2/demo"}, 1),
    "of the kind": ({"task_type": "prompt-based object detection"}, 1),
    "of another kind": ({"task_type": "instance segmentation"}, 0),
    "of another model": ({"model": "Florence-2/other"}, 0),
}


class TestScripts:
    """``api.nn``: an agent is looked for, the app started there, a model deployed in it."""

    def test_a_model_is_deployed_by_its_framework_and_name(
        self, api, running_app, platform, seeded, monkeypatch
    ):
        # The SDK makes another client of its own on the way.
        monkeypatch.setenv("SERVER_ADDRESS", platform.address)
        monkeypatch.setenv("API_TOKEN", TOKEN)
        model = api.nn.deploy("Florence-2/demo", device="cpu", workspace_id=WORKSPACE_ID)
        assert model.is_deployed() is True
        [prediction] = model.predict(str(CITY), text="car", show_progress=False)
        assert classes_in_labels(prediction.annotation) == ["car", "car"]

    @pytest.mark.parametrize(("wanted", "count"), FOUND.values(), ids=FOUND)
    def test_what_is_deployed_is_found(self, api, running_app, seeded, wanted, count):
        found = api.nn.list_deployed_models(**wanted, workspace_id=WORKSPACE_ID)
        assert [one["task_info"]["id"] for one in found] == [TASK_ID] * count


class TestQuestions:
    """Scripts for visual questions, as the documentation shows them."""

    def test_an_image_of_the_platform(self, send, city, model):
        answer = send("visual_question_answering", image_id=city, text_prompt="<CAPTION>")
        assert answer == {"answer": model.run("<CAPTION>", CITY).text}

    @pytest.mark.parametrize("prefix", ["", "data:image/jpeg;base64,"])
    def test_an_encoded_image(self, send, model, prefix):
        encoded = prefix + base64.b64encode(HOME.read_bytes()).decode()
        answer = send("visual_question_answering", image_encoding=encoded, text_prompt="<OCR>")
        assert answer == {"answer": model.run("<OCR>", HOME).text}

    def test_a_task_that_gives_boxes_still_answers_with_text(self, send):
        encoded = base64.b64encode(STREET.read_bytes()).decode()
        answer = send("visual_question_answering", image_encoding=encoded, text_prompt="<OD>")
        assert isinstance(answer["answer"], str)
        assert "car" in answer["answer"]

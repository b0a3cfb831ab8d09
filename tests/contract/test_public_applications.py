"""The exact requests of the platform's public applications, and what those do with the answers."""

from __future__ import annotations

import base64

import pytest
import yaml
from contract_calls import CITY, HOME, STREET, classes_in, rows_of
from platform_double import TASK_ID

from serve.sdk import sly


@pytest.fixture
def send(api, running_app, seeded):
    """A request to the task, the way applications send it."""

    def request(command, **state):
        return api.task.send_request(TASK_ID, command, state, raise_error=True)

    return request


def finished(send, started):
    """The id of a request in the background that has ended, told by its progress."""
    uuid = started["inference_request_uuid"]
    while True:
        progress = send("get_inference_progress", inference_request_uuid=uuid)
        assert {"current", "total"} <= set(progress["progress"])
        if progress["finished"]:
            return uuid


@pytest.fixture
def city(seeded):
    return seeded.image_ids["scene_city.jpg"]


class TestImageLabeling:
    """NN Image Labeling: connect, then one image at a time in the annotation tool."""

    def connect(self, send):
        info = send("get_session_info")
        meta = sly.ProjectMeta.from_json(send("get_output_classes_and_tags"))
        settings = send("get_custom_inference_settings")["settings"]
        return info, meta, settings if isinstance(settings, str) else yaml.safe_dump(settings)

    def apply(self, send, image_id, text, **more):
        settings = yaml.safe_load(text)
        return send("inference_image_id", image_id=image_id, settings=settings, **more)

    def shown(self, info, meta, answer):
        """What the tool makes of an answer: it adds unknown classes, as boxes, and a tag."""
        annotation = answer["annotation"]
        if meta.get_tag_meta("confidence") is None:
            meta = meta.add_tag_meta(sly.TagMeta("confidence", sly.TagValueType.ANY_NUMBER))
        if info["task type"] == "prompt-based object detection":
            for item in annotation["objects"]:
                if meta.get_obj_class(item["classTitle"]) is None:
                    meta = meta.add_obj_class(sly.ObjClass(item["classTitle"], sly.Rectangle))
        return sly.Annotation.from_json(annotation, meta)

    def test_connecting_and_applying_the_settings_as_they_came_labels_the_image(self, send, city):
        info, meta, text = self.connect(send)
        shown = self.shown(info, meta, self.apply(send, city, text))
        assert len(shown.labels) == 3

    def test_settings_that_the_user_edited_are_followed(self, send, city):
        info, meta, text = self.connect(send)
        edited = yaml.safe_load(text) | {"text": "car", "confidence_threshold": 0.2}
        shown = self.shown(info, meta, self.apply(send, city, yaml.safe_dump(edited)))
        assert [label.obj_class.name for label in shown.labels] == ["car", "car"]
        assert all(label.tags.get("confidence").value > 0.2 for label in shown.labels)

    def test_a_selected_rectangle_limits_the_look_and_labels_stay_in_it(self, send, city):
        _, _, text = self.connect(send)
        rows = rows_of(self.apply(send, city, text)["annotation"])
        _, _, left, top, right, bottom = next(row for row in rows if row[0] == "moon")
        roi = sly.Rectangle(max(0, top - 20), max(0, left - 20), bottom + 20, right + 20)

        answer = self.apply(send, city, text, rectangle=roi.to_json())

        inside = rows_of(answer["annotation"])
        assert inside
        corners = [
            (sly.PointLocation(row, col))
            for _, _, c1, r1, c2, r2 in inside
            for row, col in ((r1, c1), (r2, c2))
        ]
        assert all(map(roi.contains_point_location, corners))

    def test_a_selected_object_becomes_the_reference(self, send, city):
        _, _, text = self.connect(send)
        rows = rows_of(self.apply(send, city, text)["annotation"])
        _, _, left, top, right, bottom = next(row for row in rows if row[0] == "car")
        reference = {
            "mode": "reference_image",
            "reference_image_id": city,
            "reference_class_name": "vehicle",
            "reference_bbox": [top, left, bottom, right],
        }

        answer = self.apply(send, city, yaml.safe_dump(yaml.safe_load(text) | reference))

        assert set(classes_in(answer["annotation"])) == {"vehicle"}

    def test_outlines_are_no_classes_that_the_tool_takes_for_boxes(self, send, city):
        info, meta, text = self.connect(send)
        edited = yaml.safe_load(text) | {"task_prompt": "<OCR_WITH_REGION>"}
        shown = self.shown(info, meta, self.apply(send, city, yaml.safe_dump(edited)))
        assert {label.geometry.geometry_name() for label in shown.labels} == {"polygon"}


PARAMS = {"windowHeight": 256, "windowWidth": 256, "overlapY": 64, "overlapX": 64}
WINDOWS = {"inference_mode": "sliding_window", "sliding_window_params": PARAMS}


class TestApplyToImages:
    """Apply NN to Images: two images at a time, or windows over large ones."""

    def test_two_images_at_a_time(self, send, seeded):
        settings = yaml.safe_load(send("get_custom_inference_settings")["settings"])
        settings |= {"classes": ["object"], "inference_mode": "full_image"}
        ids = seeded.in_dataset("outside")[:2]
        answers = send("inference_batch_ids", batch_ids=ids, settings=settings)
        assert [answer["image_id"] for answer in answers] == ids
        assert all(answer["annotation"]["objects"] for answer in answers)

    def test_a_sliding_window(self, send, city):
        settings = WINDOWS | {"sliding_window_params": {**PARAMS, "borderStrategy": "shift_window"}}
        answer = send("inference_image_id", image_id=city, settings=settings)
        assert answer["annotation"]["objects"]
        whole = send("inference_image_id", image_id=city, settings={})
        assert set(classes_in(whole["annotation"])) & set(classes_in(answer["annotation"]))

    def test_a_sliding_window_in_the_background_reports_progress(self, send, city):
        started = send("inference_image_id_async", image_id=city, settings=WINDOWS)
        uuid = finished(send, started)
        [popped] = send("pop_inference_results", inference_request_uuid=uuid)["pending_results"]
        assert popped["annotation"]["objects"]


class TestApplyFlorence:
    """Apply Florence-2 to Images: text prompts, and classes that end with ``_bbox``."""

    def test_the_request_of_the_application(self, send, city):
        settings = {"mapping": None, "mode": "text_prompt", "text": "car. moon"}
        answer = send("inference_image_id", image_id=city, settings=settings)
        assert classes_in(answer["annotation"]) == ["car_bbox", "car_bbox", "moon_bbox"]

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


class TestPredictApp:
    """The SDK's Predict App: its own settings, the model's classes, an upload mode."""

    def test_its_run_labels_the_images(self, send, api, seeded):
        settings = yaml.safe_load(send("get_custom_inference_settings")["settings"])
        meta = sly.ProjectMeta.from_json(send("get_output_classes_and_tags"))
        send("get_tracking_settings")
        ids = seeded.in_dataset("inside")

        started = send(
            "inference_batch_ids_async",
            image_ids=ids,
            settings=settings | {"classes": [one.name for one in meta.obj_classes]},
            upload_mode="append",
            model_prediction_suffix="_model",
        )

        uuid = finished(send, started)
        status = send("get_inference_status", inference_request_uuid=uuid)
        assert status["stage"] == "Finished"
        assert send("get_inference_result", inference_request_uuid=uuid) is None
        assert send("clear_inference_request", inference_request_uuid=uuid)["success"] is True
        assert all(api.image.get_info_by_id(image_id).labels_count for image_id in ids)


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

"""Images and settings to annotations, with the demo checkpoint behind a real scheduler."""

from __future__ import annotations

import pytest
from PIL import Image

from florence2.errors import RequestError
from florence2.records import Failure
from florence2.scheduler import BatchReport, Priority
from serve.deployment import Deployment, ModelChoice
from serve.http.metrics import Metrics
from serve.predictor import Call, Predicted, Predictor
from serve.settings.parse import parse_settings


@pytest.fixture
def bike(image_path):
    return image_path("scene_bike.png")


def classes_of(predicted: Predicted | Failure) -> list[str]:
    assert isinstance(predicted, Predicted), predicted
    return sorted(label.obj_class.name for label in predicted.annotation.labels)


def boxes_of(predicted: Predicted) -> list[tuple[int, int, int, int]]:
    return sorted(
        (box.left, box.top, box.right, box.bottom)
        for box in (label.geometry.to_bbox() for label in predicted.annotation.labels)
    )


def test_a_damaged_image_fails_alone(predictor, bike):
    good, bad, again = predictor.predict([bike, b"no image", bike], parse_settings({}))
    assert isinstance(bad, Failure)
    assert bad.code == "bad_image"
    assert classes_of(good) == classes_of(again) == ["arrow", "box", "star", "tree"]


def test_every_label_has_a_confidence_and_is_automatic(predictor, bike):
    [predicted] = predictor.predict([bike], parse_settings({}))
    for label in predicted.annotation.labels:
        assert 0 < label.tags.get("confidence").value <= 1
        assert label.to_json()["nnCreated"] is True
        assert label.to_json()["nnUpdated"] is True


def test_mapped_prompts_on_many_images_encode_each_image_once(demo_model, image_path):
    reports: list[BatchReport] = []
    deployment = Deployment(reports.append, load=lambda choice: demo_model)
    deployment.switch(ModelChoice("demo"))
    demo_model.engine.cache.clear()
    encoded = []
    tower = demo_model.engine.runtime.encode_images
    demo_model.engine.runtime.encode_images = lambda pixels: (
        encoded.append(len(pixels)),
        tower(pixels),
    )[1]
    try:
        settings = parse_settings({"mapping": {"plant": ["tree", "a green tree"], "sky": "star"}})
        images = [image_path(name) for name in ("scene_bike.png", "scene_home.jpg")]
        predicted = Predictor(deployment, Metrics()).predict(images, settings)
    finally:
        del demo_model.engine.runtime.encode_images
        deployment.current.scheduler.close()
    assert sum(encoded) == len(images)
    assert sum(report.prompts for report in reports) == len(images) * 3
    assert set(classes_of(predicted[0])) <= {"plant", "sky"}
    assert "plant" in classes_of(predicted[0])


def test_a_rectangle_gives_the_labels_of_the_cut_moved_back(predictor, bike):
    whole = Image.open(bike).convert("RGB")
    box = (320, 120, 520, 320)
    [in_cut] = predictor.predict([whole.crop(box)], parse_settings({}))
    [on_whole] = predictor.predict([whole], parse_settings({"rectangle": list(box)}))
    moved = [(x1 + 320, y1 + 120, x2 + 320, y2 + 120) for x1, y1, x2, y2 in boxes_of(in_cut)]
    assert moved
    assert boxes_of(on_whole) == sorted(moved)
    assert on_whole.annotation.img_size == (whole.height, whole.width)


def test_polygons_move_with_the_rectangle_too(predictor, bike):
    whole = Image.open(bike).convert("RGB")
    box = (320, 120, 520, 320)
    asked = {"task_prompt": "<REFERRING_EXPRESSION_SEGMENTATION>", "text": "star"}
    [in_cut] = predictor.predict([whole.crop(box)], parse_settings(asked))
    [on_whole] = predictor.predict([whole], parse_settings({**asked, "rectangle": list(box)}))
    cut_points = [
        (point.col + 320, point.row + 120)
        for label in in_cut.annotation.labels
        for point in label.geometry.exterior
    ]
    whole_points = [
        (point.col, point.row)
        for label in on_whole.annotation.labels
        for point in label.geometry.exterior
    ]
    assert cut_points
    assert whole_points == cut_points


def test_a_rectangle_outside_the_image_is_that_images_failure(predictor, bike):
    [failed] = predictor.predict([bike], parse_settings({"rectangle": [5000, 0, 5100, 90]}))
    assert isinstance(failed, Failure)
    assert "640x480" in failed.message


def test_tiles_find_what_the_whole_image_holds_once(predictor, bike):
    tiled = {"tiling": {"width": 400, "height": 400, "overlap": 160}}
    [predicted] = predictor.predict([bike], parse_settings(tiled))
    assert {"arrow", "box", "star", "tree"} <= set(classes_of(predicted))
    for name in ("box", "star"):
        assert classes_of(predicted).count(name) == 1


def test_a_caption_becomes_a_tag_of_the_image(predictor, bike):
    [predicted] = predictor.predict([bike], parse_settings({"task_prompt": "caption"}))
    assert [tag.name for tag in predicted.annotation.img_tags] == ["caption"]
    assert predicted.annotation.labels == []


def test_a_reference_on_the_image_itself_finds_its_like(predictor, bike):
    [everything] = predictor.predict([bike], parse_settings({}))
    star = next(x for x in everything.annotation.labels if x.obj_class.name == "star").geometry
    reference = {
        "mode": "reference_image",
        "reference_bbox": [star.top, star.left, star.bottom, star.right],
        "reference_class_name": "my star",
    }
    first, bad, second = predictor.predict([bike, b"junk", bike], parse_settings(reference))
    assert isinstance(bad, Failure)
    assert set(classes_of(first)) == set(classes_of(second)) == {"my star"}


def test_who_stops_waiting_gets_a_failure_that_says_so(predictor, bike):
    [failed] = predictor.predict([bike], parse_settings({}), Call(should_stop=lambda: True))
    assert isinstance(failed, Failure)
    assert failed.code == "cancelled"


def test_large_images_are_answered_in_parts(predictor, bike, monkeypatch):
    monkeypatch.setattr("serve.predictor.MAX_OPEN_PIXELS", 640 * 480 * 2)
    asked: list[int] = []
    ask = predictor.ask
    predictor.ask = lambda asks, call: (asked.append(len(asks)), ask(asks, call))[1]
    predicted = predictor.predict([bike, b"junk", bike, bike], parse_settings({}))
    assert asked == [2, 1]
    assert [type(one) for one in predicted] == [Predicted, Failure, Predicted, Predicted]


def test_outcomes_are_counted(deployment, bike, tmp_path):
    metrics = Metrics()
    blank = Image.new("RGB", (64, 64), (9, 9, 9))
    settings = parse_settings({"task_prompt": "<OD>", "confidence_threshold": 0.999})
    Predictor(deployment, metrics).predict([bike, blank, b"junk"], settings, Call(Priority.BULK))
    text = metrics.render()[0].decode()
    assert 'florence2_images_total{outcome="failed"} 1.0' in text
    assert 'florence2_images_total{outcome="empty"}' in text
    assert 'florence2_failures_total{code="bad_image"} 1.0' in text


def test_a_region_task_without_regions_is_refused_before_the_model():
    with pytest.raises(RequestError, match="region"):
        parse_settings({"task_prompt": "<REGION_TO_CATEGORY>"})

"""Images and settings to annotations, with the demo checkpoint behind a real scheduler."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from PIL import Image

from florence2.budget import Budget
from florence2.engine.ask import Ask
from florence2.engine.scheduler import BatchReport, Priority
from florence2.errors import NoRoomError
from florence2.records import Box, Failure, Result
from serve.http.metrics import Metrics
from serve.model_service import Deployment, ModelChoice
from serve.predict.predictor import AheadImage, Call, Predicted, Predictor
from serve.settings import parse_settings


@pytest.fixture
def bike(image_path):
    return image_path("scene_bike.png")


@pytest.fixture
def scheduler(deployment):
    """What the predictor asks."""
    return deployment.current.scheduler


def classes_of(predicted: Predicted | Failure) -> list[str]:
    assert isinstance(predicted, Predicted), predicted
    return sorted(label.obj_class.name for label in predicted.annotation.labels)


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


def corners_of(predicted: Predicted) -> list[tuple[int, int]]:
    """Of boxes and outlines alike, in the order of the labels."""
    shapes = [label.geometry for label in predicted.annotation.labels]
    outlines = [shape.exterior if hasattr(shape, "exterior") else shape.corners for shape in shapes]
    return [(point.col, point.row) for outline in outlines for point in outline]


STAR = {"task_prompt": "<REFERRING_EXPRESSION_SEGMENTATION>", "text": "star"}


@pytest.mark.parametrize("asked", [{}, STAR], ids=["boxes", "polygons"])
def test_a_rectangle_gives_the_labels_of_the_cut_moved_back(predictor, bike, asked):
    whole = Image.open(bike).convert("RGB")
    box = (320, 120, 520, 320)
    [in_cut] = predictor.predict([whole.crop(box)], parse_settings(asked))
    [on_whole] = predictor.predict([whole], parse_settings({**asked, "rectangle": list(box)}))
    moved = [(x + 320, y + 120) for x, y in corners_of(in_cut)]
    assert moved
    assert sorted(corners_of(on_whole)) == sorted(moved)
    assert on_whole.annotation.img_size == (whole.height, whole.width)


def test_where_one_class_is_known_everything_is_an_object_with_its_category(predictor, bike):
    settings = parse_settings({"text": "star. tree"})
    [as_asked] = predictor.predict([bike], settings)
    [as_objects] = predictor.predict([bike], settings.model_copy(update={"is_one_class": True}))
    assert set(classes_of(as_objects)) == {"object"}
    assert classes_of(as_asked) == sorted(
        label.tags.get("category").value for label in as_objects.annotation.labels
    )


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


@pytest.mark.parametrize(
    ("scene", "side", "overlap"),
    [("scene_bike.png", 256, 64), ("scene_arrows.jpg", 200, 60), ("scene_night.jpg", 200, 60)],
)
def test_small_tiles_leave_no_fragments_in_what_was_seen_whole(
    predictor, image_path, scene, side, overlap
):
    """The first of these scenes had 10 objects instead of 4."""
    tiled = {"tiling": {"width": side, "height": side, "overlap": overlap}}
    picture = image_path(scene)
    [whole] = predictor.predict([picture], parse_settings({}))
    [small] = predictor.predict([picture], parse_settings(tiled))
    assert classes_of(small) == classes_of(whole)


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        pytest.param({}, ["car"], id="the whole one is shown"),
        pytest.param({"confidence_threshold": 0.3}, ["truck"], id="not sure enough"),
        pytest.param({"max_box_area": 0.4}, ["truck"], id="too large"),
        pytest.param({"classes": ["truck"]}, ["truck"], id="not wanted"),
    ],
)
def test_a_fragment_goes_only_for_a_whole_object_that_becomes_a_label(
    predictor, scheduler, monkeypatch, settings, labels
):
    size = (180, 100)

    def seen(*boxes: Box) -> Result:
        return Result("<OD>", size, boxes, None, "", (), False)

    whole = seen(Box((5.0, 5.0, 170.0, 95.0), "car", 0.2))
    left = seen(Box((60.0, 25.0, 99.0, 60.0), "truck", 0.9))
    monkeypatch.setattr(scheduler, "run", lambda asks, **options: [whole, left, seen()])
    tiling = {"tiling": {"width": 100, "height": 100, "overlap": 20}, **settings}
    [predicted] = predictor.predict([Image.new("RGB", size)], parse_settings(tiling))
    assert classes_of(predicted) == labels


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


def seen_by_model(scheduler, monkeypatch, look) -> list[int]:
    """What ``look`` tells of each batch of questions when the model is asked."""
    run, seen = scheduler.run, list[int]()
    monkeypatch.setattr(
        scheduler, "run", lambda asks, **options: (seen.append(look(asks)), run(asks, **options))[1]
    )
    return seen


def input_pixels(deployment) -> int:
    """Of an image as the network takes it."""
    return deployment.current.model.engine.checkpoint.image_processor.size_wh[0] ** 2


def test_large_images_are_answered_in_parts(deployment, predictor, scheduler, bike, monkeypatch):
    monkeypatch.setattr("serve.predict.predictor.MAX_OPEN_PIXELS", input_pixels(deployment) * 2)
    asked = seen_by_model(scheduler, monkeypatch, len)
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


class Recorded(Budget):
    """Notes the most that was held."""

    def __init__(self, capacity):
        super().__init__(capacity, "pixels")
        self.most = 0

    def _change(self, amount):
        super()._change(amount)
        self.most = max(self.most, self.held)


def blank(width, height):
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


PIXELS = 2_000 * 1_000
TILED = {"tiling": {"width": 1_000, "height": 1_000, "overlap": 100}}
WAYS = {
    "the whole image": {},
    "a rectangle": {"rectangle": [0, 0, 900, 900]},
    "tiles": TILED,
    "a region": {"task_prompt": "<REGION_TO_CATEGORY>", "region": [9, 9, 500, 500]},
}


@pytest.mark.parametrize("capacity", [PIXELS + PIXELS // 2, PIXELS // 2], ids=["one fits", "none"])
@pytest.mark.parametrize("asked", WAYS.values(), ids=WAYS)
def test_images_of_many_requests_share_one_budget(deployment, asked, capacity):
    """Four at once took four times the memory of one; nobody waits for one who waits for him."""
    budget = Recorded(capacity)
    predictor = Predictor(deployment, Metrics(), budget)
    image, settings = blank(2_000, 1_000), parse_settings({**asked, "max_new_tokens": 3})
    calls = [Call(Priority.BULK), Call()] * 2
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(predictor.predict, [image, image], settings, call) for call in calls]
        answers = [one for answer in waiting for one in answer.result(60)]
    assert [one for one in answers if isinstance(one, Failure)] == []
    small = capacity - capacity // 4 if capacity > PIXELS else capacity // 4
    assert PIXELS <= budget.most <= PIXELS + small
    assert (budget.held, budget.num_waiting) == (0, 0)


def test_of_an_image_that_waits_for_the_model_only_what_it_needs_is_held(
    deployment, scheduler, monkeypatch
):
    budget = Recorded(10 * PIXELS)
    predictor = Predictor(deployment, Metrics(), budget)
    seen = seen_by_model(scheduler, monkeypatch, lambda asks: budget.held)
    predictor.predict([blank(2_000, 1_000)] * 2, parse_settings({"max_new_tokens": 3}))
    assert seen == [2 * input_pixels(deployment)]


def busy():
    budget = Budget(100, "pixels")
    budget.hold(90)
    return budget


def test_an_image_without_room_is_refused_for_now_and_not_failed(deployment, monkeypatch):
    monkeypatch.setattr("serve.predict.predictor.WAIT_S", 0.01)
    predictor = Predictor(deployment, Metrics(), busy())
    with pytest.raises(NoRoomError):
        predictor.predict([blank(90, 90)], parse_settings({}))
    with pytest.raises(NoRoomError):
        predictor.ask([Ask(blank(90, 90), "<CAPTION>")])


@pytest.mark.parametrize(
    ("call", "code"),
    [(Call(should_stop=lambda: True), "cancelled"), (Call(deadline_s=0.01), "deadline")],
    ids=["its client left", "its time is over"],
)
def test_who_stops_waiting_for_room_gets_a_failure_that_says_so(deployment, call, code):
    predictor = Predictor(deployment, Metrics(), busy())
    [failed] = predictor.predict([blank(90, 90)], parse_settings({}), call)
    assert isinstance(failed, Failure)
    assert failed.code == code


SMALL_TILES = {"width": 32, "height": 32, "overlap": 0}
NOT_LABELED = {
    "damaged": (lambda: blank(90, 90)[:60], {}, "bad_image"),
    "no image": (lambda: b"x", {}, "bad_image"),
    "a rectangle outside": (lambda: blank(90, 90), {"rectangle": [500, 0, 510, 9]}, "bad_request"),
    "many tiles": (lambda: blank(1_200, 1_200), {"tiling": SMALL_TILES}, "bad_request"),
}


@pytest.mark.parametrize(("image", "asked", "code"), NOT_LABELED.values(), ids=NOT_LABELED)
def test_an_image_that_fails_holds_nothing(deployment, image, asked, code):
    budget = Recorded(10**7)
    predictor = Predictor(deployment, Metrics(), budget)
    [failed] = predictor.predict([image()], parse_settings(asked))
    assert isinstance(failed, Failure)
    assert (failed.code, budget.held) == (code, 0)


def test_a_model_that_fails_leaves_nothing_held(deployment, scheduler, monkeypatch):
    budget = Recorded(10**6)

    def fails(asks, **options):
        raise TypeError("nobody foresaw this")

    monkeypatch.setattr(scheduler, "run", fails)
    with pytest.raises(TypeError):
        Predictor(deployment, Metrics(), budget).predict([blank(90, 90)], parse_settings({}))
    assert budget.held == 0


AHEAD = {
    "the whole image": ({}, True),
    "a rectangle": ({"rectangle": [320, 120, 520, 320]}, True),
    "a region": ({"task_prompt": "<REGION_TO_CATEGORY>", "region": [9, 9, 500, 300]}, True),
    "tiles": ({"tiling": {"width": 300, "height": 300, "overlap": 30}}, False),
    "a reference": ({"mode": "reference_image", "reference_bbox": [9, 9, 200, 300]}, False),
}


@pytest.mark.parametrize(("asked", "is_ahead"), AHEAD.values(), ids=AHEAD)
def test_an_image_that_is_made_ready_ahead_gets_the_same_labels_and_holds_nothing(
    deployment, bike, asked, is_ahead
):
    budget = Recorded(10**7)
    predictor = Predictor(deployment, Metrics(), budget)
    images, settings = [bike.read_bytes(), b"junk"], parse_settings(asked)
    ready = predictor.prepare(images, settings, Call(Priority.BULK))
    assert [isinstance(one, AheadImage) for one in ready] == [is_ahead, False]
    assert (budget.most > 0, budget.held) == (is_ahead, 0)
    [first, failed], [labeled, other] = (
        predictor.predict(one, settings, Call(Priority.BULK)) for one in (images, ready)
    )
    assert isinstance(labeled, Predicted)
    assert labeled.annotation.to_json() == first.annotation.to_json()
    assert labeled.views_xyxy == first.views_xyxy
    assert failed.code == other.code == "bad_image"
    assert budget.held == 0


def test_what_cannot_be_made_ready_ahead_is_left_and_another_model_opens_the_file_itself(
    deployment, bike
):
    files, settings = [bike.read_bytes(), Failure("not_found", "gone"), 7], parse_settings({})
    assert Predictor(deployment, Metrics(), busy()).prepare(files, settings, Call()) == files
    predictor = Predictor(deployment, Metrics())
    [ready, *rest] = predictor.prepare(files, settings, Call())
    assert rest == files[1:]
    other = replace(ready, preparer=object(), opened=None)
    [same, labeled] = predictor.predict([ready, other], settings)
    assert labeled.annotation.to_json() == same.annotation.to_json()
    deployment.stop()
    assert predictor.prepare(files, settings, Call()) == files

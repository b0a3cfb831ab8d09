"""Whatever is passed by mistake gets one plain sentence, and what is nearly right is accepted."""

from __future__ import annotations

import numpy as np
import pytest

from florence2 import Ask, Failure, Florence2, FlorenceError, Result
from florence2.errors import CheckpointError, DeviceError, RequestError
from florence2.records import Region
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene

CATEGORY = "<REGION_TO_CATEGORY>"


@pytest.fixture(scope="module")
def picture():
    return draw_scene(make_scene(21))


ODD_ASKS = {
    "a word among the numbers": {"task": CATEGORY, "region": (1, 2, "x", 4)},
    "numbers as words": {"task": CATEGORY, "region": Region(("1", "2", "3", "4"))},
    "one number": {"task": CATEGORY, "region": 5},
    "a number too large": {"task": CATEGORY, "region": (1, 2, 10**400, 4)},
    "no task": {"task": None},
    "a task of another kind": {"task": 7},
    "a custom task of another kind": {"task": None, "is_custom": True},
    "beams as a fraction": {"task": "<CAPTION>", "num_beams": np.float32(1.5)},
    "beams as a list": {"task": "<CAPTION>", "num_beams": [1]},
    "stopping as an array": {"task": "<CAPTION>", "early_stopping": np.array(["a", "b"])},
    "a huge penalty": {"task": "<CAPTION>", "length_penalty": 10**400},
    "text as a number": {"task": "<OPEN_VOCABULARY_DETECTION>", "text": 5},
    "a spelled region for a caption": {"task": "<CAPTION>", "region": "<loc_1>" * 4},
    "a spelled region and a text": {"task": CATEGORY, "region": "<loc_1>" * 4, "text": "a"},
}


@pytest.mark.parametrize("name", ODD_ASKS)
def test_one_odd_ask_fails_in_a_sentence_and_the_others_are_answered(model, picture, name):
    good = Ask(picture, "<CAPTION>", max_new_tokens=3)
    first, odd, last = model.run_many([good, Ask(picture, **ODD_ASKS[name]), good])
    assert isinstance(first, Result)
    assert isinstance(last, Result)
    assert isinstance(odd, Failure)
    assert odd.code == "bad_request"
    assert "\n" not in odd.message
    with pytest.raises(RequestError):
        model.run(image=picture, **ODD_ASKS[name])


def test_what_is_no_ask_fails_alone(model, picture):
    odd, good = model.run_many([None, Ask(picture, "<CAPTION>", max_new_tokens=3)])
    assert odd.message.startswith("A question is an Ask, and NoneType was received")
    assert isinstance(good, Result)
    with pytest.raises(RequestError, match="takes a list of Ask"):
        model.run_many(Ask(picture, "<CAPTION>"))


def test_asks_may_come_from_a_generator(model, picture):
    results = model.run_many(Ask(picture, "<CAPTION>", max_new_tokens=3) for _ in range(2))
    assert [type(result) for result in results] == [Result, Result]


@pytest.mark.parametrize(
    ("method", "keywords"),
    [
        ("detect_objects", {"classes": [1]}),
        ("detect_objects", {"classes": 5}),
        ("detect_objects", {"classes": "car"}),
        ("detect_objects", {"classes": ["car"], "labels_mode": "captions"}),
        ("detect_objects", {"labels_mode": ["classes"]}),
        ("caption_image", {"granularity": None}),
        ("ocr_image_region", {"region": 5}),
    ],
)
def test_an_odd_argument_of_a_method_is_refused_in_a_sentence(model, picture, method, keywords):
    with pytest.raises(RequestError) as caught:
        getattr(model, method)(picture, **keywords)
    assert "\n" not in str(caught.value)


def test_a_custom_prompt_needs_a_token(model, picture):
    with pytest.raises(RequestError, match="A task is a name"):
        model.run_custom(None, picture)


@pytest.mark.parametrize("keywords", [{"device": None}, {"runtime": None}, {"precision": 16}])
def test_a_device_of_another_kind_is_refused_in_a_sentence(checkpoint_folder, keywords):
    with pytest.raises(DeviceError, match="Unknown"):
        Florence2.load(checkpoint_folder, **keywords)


@pytest.mark.parametrize("name", ["", "  ", None, 5])
def test_a_checkpoint_needs_a_name(name):
    with pytest.raises(CheckpointError, match="A checkpoint is a name"):
        Florence2.load(name, device="cpu")


def test_numbers_of_numpy_are_numbers(model, picture):
    plain = model.run(
        CATEGORY,
        picture,
        region=(20, 30, 150, 170),
        num_beams=2,
        max_new_tokens=4,
        length_penalty=0.5,
    )
    numpy = model.run(
        CATEGORY,
        picture,
        region=np.array([20, 30, 150, 170], np.float32),
        num_beams=np.int64(2),
        max_new_tokens=np.int32(4),
        length_penalty=np.float32(0.5),
    )
    assert plain.token_ids == numpy.token_ids


def test_a_region_may_be_spelled_in_the_models_own_tokens(model, picture):
    spelled = "<loc_100><loc_150><loc_700><loc_800>"
    by_text = model.run(CATEGORY, picture, spelled, max_new_tokens=4)
    assert model.run(CATEGORY, picture, region=spelled, max_new_tokens=4).objects == by_text.objects
    by_method = model.classify_image_region(picture, spelled, max_new_tokens=4)
    assert by_method.token_ids == by_text.token_ids
    with pytest.raises(RequestError, match="such as <loc_10>"):
        model.run(CATEGORY, picture, region="1, 2, 3, 4")


def test_a_failure_given_back_as_an_image_keeps_its_reason(model, picture):
    encoded = model.encode([picture, "nowhere.jpg"])
    good, failure = model.run("<CAPTION>", encoded, max_new_tokens=3)
    assert isinstance(good, Result)
    assert failure == encoded[1]
    with pytest.raises(FlorenceError, match="There is no image"):
        model.run("<CAPTION>", encoded[1])

"""What each method asks, and that whatever is passed by mistake gets one plain sentence."""

from __future__ import annotations

import numpy as np
import pytest
from engine_tools import REGION, assert_close, captions, codes, picture

from florence2 import Ask, Florence2, FlorenceError, Result
from florence2.errors import CheckpointError, DeviceError, RequestError
from florence2.records import Region

METHODS = {
    "caption_image": ((), {"granularity": "detailed"}, "<DETAILED_CAPTION>"),
    "detect_objects": ((), {}, "<OD>"),
    "ground_phrase": (("a car",), {}, "<CAPTION_TO_PHRASE_GROUNDING>"),
    "segment_phrase": (("a car",), {}, "<REFERRING_EXPRESSION_SEGMENTATION>"),
    "ocr_image": ((), {}, "<OCR>"),
    "parse_document": ((), {}, "<OCR_WITH_REGION>"),
    "segment_region": ((REGION,), {}, "<REGION_TO_SEGMENTATION>"),
    "classify_image_region": ((REGION,), {}, "<REGION_TO_CATEGORY>"),
    "caption_image_region": ((REGION,), {}, "<REGION_TO_DESCRIPTION>"),
    "ocr_image_region": ((REGION,), {}, "<REGION_TO_OCR>"),
    "propose_regions": ((), {}, "<REGION_PROPOSAL>"),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_asks_its_task_of_an_image_and_of_a_list(model, method):
    arguments, keywords, task = METHODS[method]
    ability = getattr(model, method)
    single = ability(picture(16), *arguments, **keywords, max_new_tokens=4)
    assert single.task == task
    several = ability([picture(16), picture(17)], *arguments, **keywords, max_new_tokens=4)
    assert [result.task for result in several] == [task, task]
    assert_close(several[0], single)


def test_detecting_named_classes_grounds_them(model):
    result = model.detect_objects(picture(16), classes=["car", "tree"], max_new_tokens=4)
    assert result.task == "<CAPTION_TO_PHRASE_GROUNDING>"
    with pytest.raises(RequestError, match="name at least one"):
        model.detect_objects(picture(16), classes=[])
    with pytest.raises(FlorenceError, match="Unknown labels_mode"):
        model.detect_objects(picture(16), labels_mode="boxes")


def test_a_fine_tunes_own_prompt_goes_through_as_it_is_and_comes_back_as_text(model):
    result = model.run_custom("<DocVQA>", picture(16), "What is the total?", max_new_tokens=6)
    expected = model.engine.checkpoint.vocabulary.answer_text(result.token_ids)
    assert result.task == "<DocVQA>"
    assert result.text == expected
    with pytest.raises(RequestError, match="Unknown task"):
        model.run("<DocVQA>", picture(16), "What is the total?")
    with pytest.raises(RequestError):
        model.run_custom("<OD>", picture(16))


CATEGORY = "<REGION_TO_CATEGORY>"
DETECT = "<OPEN_VOCABULARY_DETECTION>"
SPELLED = "<loc_1>" * 4

ODD_ASKS = {
    # name: (the ask, what is said)
    "an unknown task": ({"task": "<ODD>"}, "Did you mean '<OD>'"),
    "no task": ({"task": None}, "A task is a name"),
    "a task of another kind": ({"task": 7}, "A task is a name"),
    "a custom task of another kind": ({"task": None, "is_custom": True}, "A task is a name"),
    "text missing": ({"task": DETECT}, "needs a text"),
    "text unwanted": ({"task": "<CAPTION>", "text": "a car"}, "takes no text"),
    "text as a number": ({"task": DETECT, "text": 5}, "must be a string"),
    "a very long prompt": ({"task": DETECT, "text": "car " * 2500}, "at most"),
    "another task's token": ({"task": DETECT, "text": "a <OD> car"}, "<OD>"),
    "a cascade of two captions": ({"task": "<CAPTION>+<OCR>"}, "takes neither"),
    "a text that the first step does not take": (
        {"task": "<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>", "text": "a zebra"},
        "<CAPTION> takes no text, and 'a zebra' was received",
    ),
    "a region that the first step does not take": (
        {"task": "<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>", "region": (1, 2, 30, 40)},
        "<CAPTION> takes no region",
    ),
    "a region after a region": (
        {"task": f"{CATEGORY}+<REGION_TO_OCR>", "region": REGION},
        "does not give",
    ),
    "region missing": ({"task": CATEGORY}, "needs a region"),
    "a region outside": ({"task": CATEGORY, "region": (500, 500, 600, 600)}, "lie on the image"),
    "a region of three": ({"task": CATEGORY, "region": (1, 2, 3)}, "four numbers"),
    "a region of one": ({"task": CATEGORY, "region": 5}, "four numbers"),
    "a word among the numbers": ({"task": CATEGORY, "region": (1, 2, "x", 4)}, "four numbers"),
    "numbers as words": (
        {"task": CATEGORY, "region": Region(("1", "2", "3", "4"))},
        "four numbers",
    ),
    "a number too large": ({"task": CATEGORY, "region": (1, 2, 10**400, 4)}, "four numbers"),
    "a region in words": ({"task": CATEGORY, "region": "1, 2, 3, 4"}, "such as <loc_10>"),
    "a spelled region for a caption": ({"task": "<CAPTION>", "region": SPELLED}, "no region"),
    "a spelled region and a text": (
        {"task": CATEGORY, "region": SPELLED, "text": "a"},
        "takes a region and no text, and 'a' was received besides",
    ),
    "no beams": ({"task": "<CAPTION>", "num_beams": 0}, "num_beams"),
    "beams as a fraction": ({"task": "<CAPTION>", "num_beams": np.float32(1.5)}, "num_beams"),
    "beams as a list": ({"task": "<CAPTION>", "num_beams": [1]}, "num_beams"),
    "too many tokens": ({"task": "<CAPTION>", "max_new_tokens": 5000}, "at most 128"),
    "stopping as an array": (
        {"task": "<CAPTION>", "early_stopping": np.array(["a", "b"])},
        "early_stopping",
    ),
    "a huge penalty": ({"task": "<CAPTION>", "length_penalty": 10**400}, "length_penalty"),
}


@pytest.mark.parametrize(("odd", "said"), ODD_ASKS.values(), ids=ODD_ASKS)
def test_one_odd_ask_fails_in_a_sentence_and_the_others_are_answered(model, odd, said):
    [good] = captions(21, max_new_tokens=3)
    first, failure, last = model.run_many([good, Ask(picture(21), **odd), good])
    assert codes([first, failure, last]) == [None, "bad_request", None]
    assert said in failure.message
    assert "\n" not in failure.message
    with pytest.raises(RequestError) as caught:
        model.run(image=picture(21), **odd)
    assert str(caught.value) == failure.message


def test_what_is_no_ask_fails_alone_and_asks_may_come_from_a_generator(model):
    [ask] = captions(21, max_new_tokens=3)
    odd, good = model.run_many(one for one in (None, ask))
    assert odd.message.startswith("A question is an Ask, and NoneType was received")
    assert isinstance(good, Result)
    with pytest.raises(RequestError, match="takes a list of Ask"):
        model.run_many(ask)


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
def test_an_odd_argument_of_a_method_is_refused_in_a_sentence(model, method, keywords):
    with pytest.raises(RequestError) as caught:
        getattr(model, method)(picture(21), **keywords)
    assert "\n" not in str(caught.value)


DEVICES = {
    "a device": ({"device": "gpu"}, "Unknown device 'gpu'"),
    "a device's number": ({"device": "cuda:x"}, "Unknown device"),
    "no device": ({"device": None}, "Unknown device"),
    "a runtime": ({"runtime": "onnx"}, "Unknown runtime 'onnx'"),
    "no runtime": ({"runtime": None}, "Unknown runtime"),
    "a precision": ({"device": "cpu", "precision": "int4"}, "Unknown precision"),
    "a precision as a number": ({"precision": 16}, "Unknown precision"),
    "a precision of another device": ({"device": "cpu", "precision": "fp16"}, "is for GPUs"),
}


@pytest.mark.parametrize(("keywords", "said"), DEVICES.values(), ids=DEVICES)
def test_a_device_that_is_not_there_gets_one_sentence(checkpoint_folder, keywords, said):
    with pytest.raises(DeviceError, match=said):
        Florence2.load(checkpoint_folder, **keywords)


@pytest.mark.parametrize("name", ["", "  ", None, 5])
def test_a_checkpoint_needs_a_name(name):
    with pytest.raises(CheckpointError, match="A checkpoint is a name"):
        Florence2.load(name, device="cpu")


def test_numbers_of_numpy_are_numbers(model):
    plain = {"num_beams": 2, "max_new_tokens": 4, "length_penalty": 0.5}
    numpy = {name: np.asarray(value)[()] for name, value in plain.items()}
    assert all(isinstance(value, np.generic) for value in numpy.values())
    by_plain = model.run(CATEGORY, picture(21), region=REGION, **plain)
    by_numpy = model.run(CATEGORY, picture(21), region=np.array(REGION, np.float32), **numpy)
    assert by_plain.token_ids == by_numpy.token_ids


def test_a_region_may_be_spelled_in_the_models_own_tokens(model):
    spelled = "<loc_100><loc_150><loc_700><loc_800>"
    by_text = model.run(CATEGORY, picture(21), spelled, max_new_tokens=4)
    by_region = model.run(CATEGORY, picture(21), region=spelled, max_new_tokens=4)
    by_method = model.classify_image_region(picture(21), spelled, max_new_tokens=4)
    assert by_text.objects == by_region.objects
    assert by_text.token_ids == by_method.token_ids


def test_a_failure_given_back_as_an_image_keeps_its_reason(model):
    encoded = model.encode([picture(21), "nowhere.jpg"])
    good, failure = model.run("<CAPTION>", encoded, max_new_tokens=3)
    assert isinstance(good, Result)
    assert failure == encoded[1]
    with pytest.raises(FlorenceError, match="There is no image"):
        model.run("<CAPTION>", encoded[1])

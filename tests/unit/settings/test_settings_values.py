"""What single keys may say, and the sentence for what they may not."""

from __future__ import annotations

import pytest

from florence2.errors import RequestError
from serve.sdk import sly
from serve.settings import Reference, Tiling, parse_settings

GROUNDING = "<CAPTION_TO_PHRASE_GROUNDING>"
BOX = (10, 20, 200, 180)
REFERENCE = {"mode": "reference_image", "reference_bbox": [20, 10, 39, 59]}


def parsed(raw, *fields):
    settings = parse_settings(raw)
    return tuple(getattr(settings, field) for field in fields)


@pytest.mark.parametrize(
    ("raw", "task"),
    [
        pytest.param({}, "<OD>", id="nothing said"),
        pytest.param({"text": "dog"}, GROUNDING, id="text"),
        pytest.param({"prompt": "dog"}, GROUNDING, id="prompt"),
        pytest.param({"mapping": {"dog": None}}, GROUNDING, id="mapping"),
        pytest.param({"regions": [BOX]}, "<REGION_TO_CATEGORY>", id="regions"),
        pytest.param(REFERENCE, GROUNDING, id="reference"),
        pytest.param(REFERENCE | {"task": "<OCR>"}, GROUNDING, id="reference with a wordless task"),
        pytest.param(
            REFERENCE | {"task": "referring segmentation"},
            "<REFERRING_EXPRESSION_SEGMENTATION>",
            id="reference with a task that takes text",
        ),
        pytest.param({"task": "od"}, "<OD>", id="token without brackets"),
        pytest.param({"task": "object detection"}, "<OD>", id="friendly name"),
        pytest.param(
            {"task_prompt": "caption + phrase_grounding"},
            "<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>",
            id="cascade",
        ),
        pytest.param(
            {"task": "OD+region_category"}, "<OD>+<REGION_TO_CATEGORY>", id="later region step"
        ),
    ],
)
def test_the_task_is_named_or_follows_from_what_is_given(raw, task):
    assert parse_settings(raw).task_prompt == task


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        pytest.param({"conf": "0.3"}, {"confidence_threshold": 0.3}, id="digits in a text"),
        pytest.param({"confidence": 1}, {"confidence_threshold": 1.0}, id="whole number"),
        pytest.param(
            {"confidence_threshold": {"dog": 0.4, " big  cat ": "0.2"}},
            {"class_thresholds": {"dog": 0.4, "big cat": 0.2}},
            id="thresholds by class",
        ),
        pytest.param(
            {"conf": 0.2, "class_thresholds": {"dog": 0.4}},
            {"confidence_threshold": 0.2, "class_thresholds": {"dog": 0.4}},
            id="both thresholds",
        ),
        pytest.param(
            {"confidence_threshold": {"reference_image": 0.9, "text_prompt": 0.1}},
            {"confidence_threshold": 0.1},
            id="thresholds by mode in a mapping",
        ),
        pytest.param({"conf": 0.3, "box_threshold": 0.3}, {"confidence_threshold": 0.3}, id="one"),
        pytest.param({"iou": False}, {"nms_threshold": None}, id="YAML's off is false"),
        pytest.param({"nms_threshold": "Off"}, {"nms_threshold": None}, id="off"),
        pytest.param({"containment_threshold": 0.8}, {"containment_threshold": 0.8}, id="share"),
        pytest.param({"classes": "all"}, {"classes": None}, id="all classes"),
        pytest.param({"classes": []}, {"classes": None}, id="no class is all classes"),
        pytest.param({"classes": ["dog", "dog ", 7]}, {"classes": ("dog", "7")}, id="each once"),
        pytest.param({"classes": ["object"]}, {"classes": None}, id="an echo"),
        pytest.param({"classes": ["text", "object"]}, {"classes": None}, id="an echo of both"),
        pytest.param({"classes": ["object", "dog"]}, {"classes": ("object", "dog")}, id="no echo"),
        pytest.param(
            {"classes": ["object"], "mapping": {"object": "dog", "other": "cat"}},
            {"classes": ("object",), "mapping": {"object": ("dog",), "other": ("cat",)}},
            id="object was asked for",
        ),
        pytest.param(
            {"mapping": '{"dog": ["puppy"], "cat": "kitten. tom"}'},
            {"mapping": {"dog": ("puppy",), "cat": ("kitten", "tom")}},
            id="mapping in JSON",
        ),
        pytest.param(
            {"mapping": {"dog ": "puppy", "dog": ["hound", "The Puppy"], 3: ["number three."]}},
            {"mapping": {"dog": ("puppy", "hound"), "3": ("number three.",)}},
            id="classes of one name are joined",
        ),
        pytest.param(
            {"task": "od", "mapping": {"vehicle": ["car", "truck"]}},
            {"task_prompt": "<OD>", "mapping": {"vehicle": ("car", "truck")}},
            id="a mapping renames what detection finds",
        ),
        pytest.param({"text": " dog \r\n\n cat\x07 "}, {"text": "dog\n\ncat"}, id="clean text"),
        pytest.param({"text": "a \ud800 dog"}, {"text": "a   dog"}, id="half a character"),
        pytest.param({"tiling": 512}, {"tiling": Tiling(size_wh=(512, 512), overlap_wh=(128, 128))},
                     id="one number for a window"),
        pytest.param(
            {"tiling": {"width": 400, "overlap": [10, 20], "full_image": False}},
            {"tiling": Tiling(size_wh=(400, 768), overlap_wh=(10, 20), full_image=False)},
            id="windows in full",
        ),
        pytest.param({"tiling": "off"}, {"tiling": None}, id="no windows"),
        pytest.param(
            {"tiling": 512, "inference_mode": "full_image", "sliding_window_params": {"naive": 1}},
            {"tiling": Tiling(size_wh=(512, 512), overlap_wh=(128, 128))},
            id="windows beside a client's full image",
        ),
        pytest.param(
            {"inference_mode": "sliding window"},
            {"tiling": Tiling(size_wh=(768, 768), overlap_wh=(0, 0), full_image=False)},
            id="sliding window of no size",
        ),
        pytest.param({"rectangle": list(BOX)}, {"rectangle": BOX}, id="a part of the image"),
        pytest.param(
            {"rectangle": sly.Rectangle(20, 10, 179, 199).to_json()},
            {"rectangle": BOX},
            id="the SDK's rectangle includes its last pixels",
        ),
        pytest.param(
            {"rectangle": {"points": {"exterior": [[199, 20], [10, 179]], "interior": []}}},
            {"rectangle": BOX},
            id="corners in any order",
        ),
        pytest.param(
            {"task": "region_ocr", "rectangle": list(BOX)},
            {"regions": (BOX,), "rectangle": None},
            id="the rectangle is the region",
        ),
        pytest.param(
            {"task": "region_ocr", "region": "10, 20, 200, 180", "rectangle": [0, 0, 300, 300]},
            {"regions": (BOX,), "rectangle": (0, 0, 300, 300)},
            id="a region within the rectangle",
        ),
        pytest.param(
            {"rectangles": [sly.Rectangle(20, 10, 179, 199).to_json(), list(BOX)]},
            {"regions": (BOX, BOX)},
            id="regions of both kinds",
        ),
        pytest.param(
            {"reference_bbox": "20,10,39,59", "reference_class_name": " bolt "},
            {"reference": Reference(image_id=None, box_xyxy=(10, 20, 60, 40), class_name="bolt")},
            id="a reference on the image itself",
        ),
        pytest.param(
            {"mode": "text_prompt", "reference_bbox": "junk", "text_queries": ["dog"]},
            {"reference": None, "text": "dog"},
            id="a reference that is not meant",
        ),
        pytest.param({"geometry": "Bitmap"}, {"geometry": "bitmap"}, id="bitmap"),
        pytest.param({"class_suffix": " (auto)"}, {"class_suffix": " (auto)"}, id="suffix"),
        pytest.param({"num_beams": "1", "max_new_tokens": 64.0},
                     {"num_beams": 1, "max_new_tokens": 64}, id="search"),
        pytest.param({"recursive": True, "batch_size": 0, "tracker_settings": {}}, {}, id="more"),
    ],
)  # fmt: skip
def test_a_value_is_read(raw, expected):
    assert parsed(raw, *expected) == tuple(expected.values())


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        pytest.param([1], "settings is a mapping", id="no mapping at all"),
        pytest.param({"conff": 1}, "Unknown setting 'conff'; did you mean 'conf'?", id="misspelt"),
        pytest.param({"zzz9": 1}, "Unknown setting 'zzz9'; remove it.", id="like nothing"),
        pytest.param({3: 1}, "Unknown setting 3; remove it.", id="no text for a key"),
        pytest.param({10**5000: 1}, "Unknown setting a very long number", id="digits for a key"),
        pytest.param({"conf": "high"}, "conf is a number from 0 to 1", id="word for a number"),
        pytest.param({"conf": True}, "True was received", id="flag for a number"),
        pytest.param({"conf": float("nan")}, "nan was received", id="not a number"),
        pytest.param({"conf": 1.5}, "1.5 was received", id="above the range"),
        pytest.param({"conf": -0.1}, "from 0 to 1", id="below the range"),
        pytest.param({"conf": 10**5000}, "a very long number", id="thousands of digits"),
        pytest.param({"conf": "0,5"}, "'0,5'", id="decimal comma"),
        pytest.param({"conf": 0.3, "box_threshold": 0.4}, "conf is 0.3 and box_threshold is 0.4",
                     id="two numbers"),
        pytest.param({"text": "a", "text_prompt": "b"}, "text is given once", id="two texts"),
        pytest.param({"conf": {"dog": 2}}, "threshold of 'dog'", id="threshold of a class"),
        pytest.param({"conf": {"dog": 0.1, "dog ": 0.2}}, "0.1 and 0.2", id="two of a class"),
        pytest.param({"conf": {"dog": 0.1}, "class_thresholds": {"dog": 0.2}}, "for 'dog'",
                     id="two places for a class"),
        pytest.param({"conf": [0.1]}, "a mapping of them", id="list of numbers"),
        pytest.param({"iou": True}, "or off", id="true is not off"),
        pytest.param({"max_box_area": "off"}, "max_box_area is a number", id="no off there"),
        pytest.param({"nms_across_classes": 1}, "true or false", id="number for a flag"),
        pytest.param({"geometry": "polygons"}, "did you mean 'polygon'?", id="geometry"),
        pytest.param({"mode": "bbox"}, "known are text_prompt, reference_image.", id="mode"),
        pytest.param({"inference_mode": "tiles"}, "full_image", id="inference mode"),
        pytest.param({"class_suffix": "a\nb"}, "at most 30 plain characters", id="suffix of lines"),
        pytest.param({"class_suffix": 7}, "7 was received", id="suffix of digits"),
        pytest.param({"task": 7}, "name of a task", id="number for a task"),
        pytest.param({"task": "<ODD>"}, "Did you mean '<OD>'?", id="unknown task"),
        pytest.param({"task": "<OD>+<OCR>"}, "takes neither", id="impossible cascade"),
        pytest.param({"task": "<OD>", "text": "dog"}, "takes no text and got 'dog'", id="text"),
        pytest.param({"task": GROUNDING}, "needs to be told", id="no text"),
        pytest.param({"task": "<REGION_TO_OCR>"}, "got none; add for example regions", id="region"),
        pytest.param({"regions": [BOX], "text": "dog"}, "takes no region", id="region and text"),
        pytest.param({"regions": [[1, 2, 3]]}, "[1, 2, 3] was received", id="three numbers"),
        pytest.param({"rectangle": [9, 2, 3, 4]}, "x1 < x2", id="box from right to left"),
        pytest.param({"rectangle": [0, 0, float("nan"), 4]}, "rectangle is a box", id="nan box"),
        pytest.param({"rectangle": [0, 0, 10**9, 4]}, "rectangle is a box", id="box beyond sense"),
        pytest.param({"rectangle": [0, 0, True, 4]}, "rectangle is a box", id="flag in a box"),
        pytest.param({"rectangle": {"points": {}}}, "rectangle is a box", id="no corners"),
        pytest.param({"regions": [BOX] * 1001}, "1001 were received", id="too many regions"),
        pytest.param({"text": True}, "True was received", id="flag for a text"),
        pytest.param({"text": {"a": 1}}, "text or a list of texts", id="mapping for a text"),
        pytest.param({"text": " . .. "}, "names none", id="only full stops"),
        pytest.param({"text": "x" * 1001}, "has 1001", id="long phrase"),
        pytest.param({"text": "x" * 200_000}, "200000 were received", id="long text"),
        pytest.param({"text": ". ".join(f"w{n}" for n in range(101))}, "got 101", id="phrases"),
        pytest.param({"text": "<OD> dog"}, "token '<OD>'", id="a task in the text"),
        pytest.param({"mapping": {"dog": "<loc_7>"}}, "token '<loc_7>'", id="token in a mapping"),
        pytest.param({"mapping": ["dog"]}, "mapping is a mapping", id="list for a mapping"),
        pytest.param({"mapping": "dog"}, "mapping is a mapping", id="word for a mapping"),
        pytest.param({"mapping": {"": "dog"}}, "A class in mapping is a name", id="nameless class"),
        pytest.param({"mapping": {"dog": [["puppy"]]}}, "prompt of 'dog'", id="nested prompts"),
        pytest.param({"mapping": {"a1": "dog", "b1": "The dog"}}, "'a1' and 'b1'", id="two owners"),
        pytest.param({"mapping": {f"c{n}": None for n in range(101)}}, "101", id="many classes"),
        pytest.param({"mapping": {"dog": [f"p{n}" for n in range(21)]}}, "21", id="many prompts"),
        pytest.param({"classes": [["dog"]]}, "A class in classes is a name", id="nested classes"),
        pytest.param({"classes": {"dog": 1}}, "a list of class names", id="mapping for classes"),
        pytest.param({"mode": "reference_image"}, "needs the box", id="reference without a box"),
        pytest.param(REFERENCE | {"reference_bbox": [1, 2, 3]}, "[top, left", id="reference of 3"),
        pytest.param(REFERENCE | {"reference_image_id": 0}, "whole number from 1", id="image id"),
        pytest.param({"tiling": {"size": 3}}, "Unknown entry of tiling 'size'", id="tiling entry"),
        pytest.param({"tiling": 8}, "tiling.width is a whole number from 32", id="tiny window"),
        pytest.param({"tiling": {"overlap": 768}}, "less than their size", id="overlap"),
        pytest.param({"tiling": 512, "inference_mode": "sliding_window"}, "leave out tiling",
                     id="windows of both kinds"),
        pytest.param({"num_beams": 99}, "whole number from 1 to 32", id="beams"),
        pytest.param({"max_new_tokens": 1.5}, "whole number", id="part of a token"),
    ],
)  # fmt: skip
def test_a_wrong_value_gets_one_sentence(raw, words):
    with pytest.raises(RequestError, match=r".") as error:
        parse_settings(raw)
    said = str(error.value)
    assert words in said
    assert "\n" not in said
    assert len(said) < 600


def test_the_prompts_of_settings_are_asked_with_their_classes():
    settings = parse_settings({"text": "puppy. car", "mapping": {"dog": ["puppy"]}})
    assert [(p.text, p.class_name) for p in settings.prompts] == [("puppy", "dog"), ("car", None)]
    assert settings.classes_by_phrase == {"puppy": "dog", "car": "car"}

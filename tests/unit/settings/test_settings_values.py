"""What single keys may say, and the sentence for what they may not."""

from __future__ import annotations

import pytest

from florence2.errors import RequestError
from serve.sdk import sly
from serve.settings import Reference, Tiling, check_placement, parse_settings

GROUNDING = "<CAPTION_TO_PHRASE_GROUNDING>"
BOX = (10, 20, 200, 180)
REFERENCE = {"mode": "reference_image", "reference_bbox": [20, 10, 39, 59]}
ADVERTISED = ["object", "text", "object (polygon)", "object (bitmap)"]

TASKS = {
    "nothing said": ({}, "<OD>"),
    "text": ({"text": "dog"}, GROUNDING),
    "prompt": ({"prompt": "dog"}, GROUNDING),
    "mapping": ({"mapping": {"dog": None}}, GROUNDING),
    "regions": ({"regions": [BOX]}, "<REGION_TO_CATEGORY>"),
    "reference": (REFERENCE, GROUNDING),
    "reference with a wordless task": (REFERENCE | {"task": "<OCR>"}, GROUNDING),
    "reference with a task that takes text": (
        REFERENCE | {"task": "referring segmentation"},
        "<REFERRING_EXPRESSION_SEGMENTATION>",
    ),
    "token without brackets": ({"task": "od"}, "<OD>"),
    "friendly name": ({"task": "object detection"}, "<OD>"),
    "cascade": (
        {"task_prompt": "caption + phrase_grounding"},
        "<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>",
    ),
    "later region step": ({"task": "OD+region_category"}, "<OD>+<REGION_TO_CATEGORY>"),
}

READ = {
    "digits in a text": ({"conf": "0.3"}, {"confidence_threshold": 0.3}),
    "whole number": ({"confidence": 1}, {"confidence_threshold": 1.0}),
    "thresholds by class": (
        {"confidence_threshold": {"dog": 0.4, " big  cat ": "0.2"}},
        {"class_thresholds": {"dog": 0.4, "big cat": 0.2}},
    ),
    "thresholds by class in several places": (
        {"conf": {"dog": 0.4}, "confidence": 0.2, "class_thresholds": {"cat": 0.3, "dog": 0.4}},
        {"confidence_threshold": 0.2, "class_thresholds": {"dog": 0.4, "cat": 0.3}},
    ),
    "thresholds in a list": (
        {"conf": [{"dog": 0.4}, {"cat": 0.2}]},
        {"class_thresholds": {"dog": 0.4, "cat": 0.2}},
    ),
    "both thresholds": (
        {"conf": 0.2, "class_thresholds": {"dog": 0.4}},
        {"confidence_threshold": 0.2, "class_thresholds": {"dog": 0.4}},
    ),
    "calibration": (
        {"calibration": {"dog": [[0.2, 0.1], [0.7, 0.9]], " big  cat ": [["0.5", 1]]}},
        {"calibration": {"dog": ((0.2, 0.1), (0.7, 0.9)), "big cat": ((0.5, 1.0),)}},
    ),
    "calibration as a text": (
        {"mapping": "dog: puppy", "calibration": "{Dog: [[0, 0.5], [1, 0.5]]}"},
        {"mapping": {"dog": ("puppy",)}, "calibration": {"Dog": ((0.0, 0.5), (1.0, 0.5))}},
    ),
    "calibration of a class that a reference is not": (
        REFERENCE | {"mapping": {"dog": None}, "calibration": {"dog": [[0.5, 0.5]]}},
        {"calibration": {"dog": ((0.5, 0.5),)}},
    ),
    "no calibration": ({"calibration": None}, {"calibration": {}}),
    "thresholds by mode in a mapping": (
        {"confidence_threshold": {"reference_image": 0.9, "text_prompt": 0.1}},
        {"confidence_threshold": 0.1},
    ),
    "one": ({"conf": 0.3, "box_threshold": 0.3}, {"confidence_threshold": 0.3}),
    "YAML's off is false": ({"iou": False}, {"nms_threshold": None}),
    "off": ({"nms_threshold": "Off"}, {"nms_threshold": None}),
    "share": ({"containment_threshold": 0.8}, {"containment_threshold": 0.8}),
    "all classes": ({"classes": "all"}, {"classes": None}),
    "no class is all classes": ({"classes": []}, {"classes": None}),
    "each once": ({"classes": ["dog", "dog ", 7]}, {"classes": ("dog", "7")}),
    "an echo": ({"classes": ["object"]}, {"classes": None}),
    "an echo of both": ({"classes": ["text", "object"]}, {"classes": None}),
    "an echo of the meta": ({"classes": ADVERTISED}, {"classes": None}),
    "an echo of the meta and what was seen": (
        {"classes": [*ADVERTISED, "star", "tree"]},
        {"classes": None},
    ),
    "an echo of a part": ({"classes": ["object (bitmap)", "text"]}, {"classes": None}),
    "a class that is no echo": ({"classes": ["star"]}, {"classes": ("star",)}),
    "object was named": ({"classes": ["object"], "text": "object. star"}, {"classes": ("object",)}),
    "no echo": ({"classes": ["object", "dog"]}, {"classes": ("object", "dog")}),
    "object was asked for": (
        {"classes": ["object"], "mapping": {"object": "dog", "other": "cat"}},
        {"classes": ("object",), "mapping": {"object": ("dog",), "other": ("cat",)}},
    ),
    "an adapter": ({"model": " cats "}, {"model": "cats"}),
    "no adapter": ({"model": ""}, {"model": None}),
    "mapping in JSON": (
        {"mapping": '{"dog": ["puppy"], "cat": "kitten. tom"}'},
        {"mapping": {"dog": ("puppy",), "cat": ("kitten", "tom")}},
    ),
    "classes of one name are joined": (
        {"mapping": {"dog ": "puppy", "dog": ["hound", "The Puppy"], 3: ["number three."]}},
        {"mapping": {"dog": ("puppy", "hound"), "3": ("number three.",)}},
    ),
    "a mapping renames what detection finds": (
        {"task": "od", "mapping": {"vehicle": ["car", "truck"]}},
        {"task_prompt": "<OD>", "mapping": {"vehicle": ("car", "truck")}},
    ),
    "clean text": ({"text": " dog \r\n\n cat\x07 "}, {"text": "dog\n\ncat"}),
    "half a character": ({"text": "a \ud800 dog"}, {"text": "a   dog"}),
    "one number for a window": ({"tiling": 512}, {"tiling": Tiling((512, 512), (128, 128))}),
    "windows in full": (
        {"tiling": {"width": 400, "overlap": [10, 20], "full_image": False}},
        {"tiling": Tiling((400, 768), (10, 20), full_image=False)},
    ),
    "an empty entry of windows": (
        {"tiling": {"width": 400, "full_image": ""}},
        {"tiling": Tiling((400, 768), (100, 128))},
    ),
    "no windows": ({"tiling": "off"}, {"tiling": None}),
    "windows beside a client's full image": (
        {"tiling": 512, "inference_mode": "full_image", "sliding_window_params": {"naive": 1}},
        {"tiling": Tiling((512, 512), (128, 128))},
    ),
    "sliding window of no size": (
        {"inference_mode": "sliding window"},
        {"tiling": Tiling((768, 768), (0, 0), full_image=False)},
    ),
    "a part of the image": ({"rectangle": list(BOX)}, {"rectangle": BOX}),
    "the SDK's rectangle includes its last pixels": (
        {"rectangle": sly.Rectangle(20, 10, 179, 199).to_json()},
        {"rectangle": BOX},
    ),
    "corners in any order": (
        {"rectangle": {"points": {"exterior": [[199, 20], [10, 179]], "interior": []}}},
        {"rectangle": BOX},
    ),
    "the rectangle is the region": (
        {"task": "region_ocr", "rectangle": list(BOX)},
        {"regions": (BOX,), "rectangle": None},
    ),
    "a region within the rectangle": (
        {"task": "region_ocr", "region": "10, 20, 200, 180", "rectangle": [0, 0, 300, 300]},
        {"regions": (BOX,), "rectangle": (0, 0, 300, 300)},
    ),
    "regions of both kinds": (
        {"rectangles": [sly.Rectangle(20, 10, 179, 199).to_json(), list(BOX)]},
        {"regions": (BOX, BOX)},
    ),
    "a reference on the image itself": (
        {"reference_bbox": "20,10,39,59", "reference_class_name": " bolt "},
        {"reference": Reference(None, (10, 20, 60, 40), "bolt")},
    ),
    "a reference that is not meant": (
        {"mode": "text_prompt", "reference_bbox": "junk", "text_queries": ["dog"]},
        {"reference": None, "text": "dog"},
    ),
    "bitmap": ({"geometry": "Bitmap"}, {"geometry": "bitmap"}),
    "suffix": ({"class_suffix": " (auto)"}, {"class_suffix": " (auto)"}),
    "search": ({"num_beams": "1", "max_new_tokens": 64.0}, {"num_beams": 1, "max_new_tokens": 64}),
    "more": ({"recursive": True, "batch_size": 0, "tracker_settings": {}}, {}),
    "what clients send along": (
        {"show_progress": True, "step": 1, "img_size": 640, "existing_objects_iou_thresh": 0.7}
        | {"sliding_window_mode": "basic", "model_prediction_suffix": "_nn", "text": "car"},
        {"text": "car"},
    ),
}

REFUSED = {
    "no mapping at all": ([1], "settings is a mapping"),
    "misspelt": ({"conff": 1}, "Unknown setting 'conff'; did you mean 'conf'?"),
    "like nothing": ({"zzz9": 1}, "Unknown setting 'zzz9'; remove it."),
    "a key of punctuation": ({"a; b": 1}, "Unknown setting 'a; b'; remove it."),
    "a record's name": ({"reference": {}}, "did you mean 'reference_bbox'?"),
    "no text for a key": ({3: 1}, "Unknown setting 3; remove it."),
    "digits for a key": ({10**5000: 1}, "Unknown setting a very long number"),
    "word for a number": ({"conf": "high"}, "conf is a number from 0 to 1"),
    "flag for a number": ({"conf": True}, "True was received"),
    "not a number": ({"conf": float("nan")}, "nan was received"),
    "above the range": ({"conf": 1.5}, "1.5 was received"),
    "below the range": ({"conf": -0.1}, "from 0 to 1"),
    "thousands of digits": ({"conf": 10**5000}, "a very long number"),
    "decimal comma": ({"conf": "0,5"}, "'0,5'"),
    "two numbers": ({"conf": 0.3, "box_threshold": 0.4}, "conf is 0.3 and box_threshold is 0.4"),
    "two texts": ({"text": "a", "text_prompt": "b"}, "text is given once"),
    "threshold of a class": ({"conf": {"dog": 2}}, "threshold of 'dog'"),
    "two of a class": ({"conf": {"dog": 0.1, "dog ": 0.2}}, "0.1 and 0.2"),
    "two places for a class": (
        {"conf": {"dog": 0.1}, "class_thresholds": {"dog": 0.2}},
        "for 'dog'",
    ),
    "curve that falls": ({"calibration": {"dog": [[0.2, 0.5], [0.7, 0.4]]}}, "shares do not fall"),
    "curve that goes back": ({"calibration": {"dog": [[0.2, 0.1], [0.2, 0.4]]}}, "raw scores rise"),
    "curve beyond 1": ({"calibration": {"dog": [[0.2, 1.1]]}}, "curve of 'dog' in calibration"),
    "curve of three": ({"calibration": {"dog": [[0.2, 0.1, 0.3]]}}, "a list of pairs"),
    "curve of one number": ({"calibration": {"dog": 0.5}}, "0.5 was received"),
    "curve of nothing": ({"calibration": {"dog": []}}, "[] was received"),
    "curve without classes": ({"calibration": [[0.2, 0.1]]}, "calibration is a mapping"),
    "curve too long": ({"calibration": {"dog": [[0, 0]] * 1001}}, "at most 1000 pairs"),
    "two curves": ({"calibration": {"dog": [[0, 0]], "Dog": [[0, 1]]}}, "two for 'Dog'"),
    "curve of a class that is not asked for": (
        {"text": "cat", "calibration": {"dog": [[0.2, 0.1]]}},
        "'dog' is none of ['cat']; leave it out",
    ),
    "list of numbers": ({"conf": [0.1]}, "a mapping of them"),
    "true is not off": ({"iou": True}, "or off"),
    "no off there": ({"max_box_area": "off"}, "max_box_area is a number"),
    "number for a flag": ({"nms_across_classes": 1}, "true or false"),
    "geometry": ({"geometry": "polygons"}, "did you mean 'polygon'?"),
    "half a character": ({"mode": "\ud800"}, "Unknown mode '\\ud800'; known are"),
    "mode": ({"mode": "bbox"}, "known are text_prompt, reference_image."),
    "inference mode": ({"inference_mode": "tiles"}, "full_image"),
    "number for an adapter": ({"model": 7}, "model is a name, and 7 was received"),
    "suffix of lines": ({"class_suffix": "a\nb"}, "at most 30 plain characters"),
    "suffix of digits": ({"class_suffix": 7}, "7 was received"),
    "number for a task": ({"task": 7}, "name of a task"),
    "unknown task": ({"task": "<ODD>"}, "Did you mean '<OD>'?"),
    "impossible cascade": ({"task": "<OD>+<OCR>"}, "takes neither"),
    "text": ({"task": "<OD>", "text": "dog"}, "takes no text and got 'dog'"),
    "no text": ({"task": GROUNDING}, "needs to be told"),
    "region": ({"task": "<REGION_TO_OCR>"}, "got none; add for example regions"),
    "region and text": ({"regions": [BOX], "text": "dog"}, "takes no region"),
    "three numbers": ({"regions": [[1, 2, 3]]}, "[1, 2, 3] was received"),
    "box from right to left": ({"rectangle": [9, 2, 3, 4]}, "x1 < x2"),
    "nan box": ({"rectangle": [0, 0, float("nan"), 4]}, "rectangle is a box"),
    "box beyond sense": ({"rectangle": [0, 0, 10**9, 4]}, "rectangle is a box"),
    "flag in a box": ({"rectangle": [0, 0, True, 4]}, "rectangle is a box"),
    "no corners": ({"rectangle": {"points": {}}}, "rectangle is a box"),
    "too many regions": ({"regions": [BOX] * 1001}, "1001 were received"),
    "flag for a text": ({"text": True}, "True was received"),
    "mapping for a text": ({"text": {"a": 1}}, "text or a list of texts"),
    "only full stops": ({"text": " . .. "}, "names none"),
    "long phrase": ({"text": "x" * 1001}, "has 1001"),
    "long text": ({"text": "x" * 200_000}, "200000 were received"),
    "phrases": ({"text": ". ".join(f"w{n}" for n in range(101))}, "got 101"),
    "a task in the text": ({"text": "<OD> dog"}, "token '<OD>'"),
    "token in a mapping": ({"mapping": {"dog": "<loc_7>"}}, "token '<loc_7>'"),
    "list for a mapping": ({"mapping": ["dog"]}, "mapping is a mapping"),
    "word for a mapping": ({"mapping": "dog"}, "mapping is a mapping"),
    "half a mapping": ({"mapping": "{a: ["}, "mapping is a mapping"),
    "a prompt of no word": (
        {"mapping": {"dog": ["."]}},
        "prompt of 'dog' in mapping is at least",
    ),
    "nameless class": ({"mapping": {"": "dog"}}, "A class in mapping is a name"),
    "nested prompts": ({"mapping": {"dog": [["puppy"]]}}, "prompt of 'dog'"),
    "two owners": ({"mapping": {"a1": "dog", "b1": "The dog"}}, "'a1' and 'b1'"),
    "many classes": ({"mapping": {f"c{n}": None for n in range(101)}}, "101"),
    "many prompts": ({"mapping": {"dog": [f"p{n}" for n in range(21)]}}, "21"),
    "nested classes": ({"classes": [["dog"]]}, "A class in classes is a name"),
    "mapping for classes": ({"classes": {"dog": 1}}, "a list of class names"),
    "reference without a box": ({"mode": "reference_image"}, "needs the box"),
    "reference of 3": (REFERENCE | {"reference_bbox": [1, 2, 3]}, "[top, left"),
    "image id": (REFERENCE | {"reference_image_id": 0}, "whole number from 1"),
    "tiling entry": ({"tiling": {"size": 3}}, "Unknown entry of tiling 'size'"),
    "tiny window": ({"tiling": 8}, "tiling.width is a whole number from 32"),
    "overlap": ({"tiling": {"overlap": 768}}, "less than their size"),
    "windows of both kinds": (
        {"tiling": 512, "inference_mode": "sliding_window"},
        "leave out tiling",
    ),
    "beams": ({"num_beams": 99}, "whole number from 1 to 32"),
    "part of a token": ({"max_new_tokens": 1.5}, "whole number"),
}


@pytest.mark.parametrize("case", TASKS)
def test_the_task_is_named_or_follows_from_what_is_given(case):
    raw, task = TASKS[case]
    assert parse_settings(raw).task_prompt == task


@pytest.mark.parametrize("case", READ)
def test_a_value_is_read(case):
    raw, expected = READ[case]
    settings = parse_settings(raw)
    assert {field: getattr(settings, field) for field in expected} == expected


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_value_gets_one_sentence(case):
    raw, words = REFUSED[case]
    with pytest.raises(RequestError, match=r".") as error:
        parse_settings(raw)
    said = str(error.value)
    assert words in said
    assert "\n" not in said
    assert len(said) < 600


def test_of_several_mistakes_the_first_on_the_page_is_told():
    with pytest.raises(RequestError, match=r"^Unknown geometry"):
        parse_settings({"tiling": 8, "geometry": "x", "text": "dog", "task": "<OD>"})


def test_settings_beside_the_settings_are_refused():
    check_placement({"classes": ["dog"], "rectangle": [1, 2, 3, 4], "image_id": 7})
    with pytest.raises(RequestError, match="text is one of the settings"):
        check_placement({"text": "dog", "settings": {}})


def test_the_prompts_of_settings_are_asked_with_their_classes():
    settings = parse_settings({"text": "puppy. car", "mapping": {"dog": ["puppy"]}})
    assert [(p.text, p.class_name) for p in settings.prompts] == [("puppy", "dog"), ("car", None)]
    assert settings.classes_by_phrase == {"puppy": "dog", "car": "car"}

from __future__ import annotations

import math

import pytest

from florence2.records import Box, Polygon, Quad, Region, Result, Text
from serve.predict.annotations import Answered, LabelRules, annotation_from_answers

SIZE = (100, 80)
BOX, NEAR, INNER = (10.0, 10.0, 50.0, 50.0), (10.0, 10.0, 50.0, 44.0), (12.0, 12.0, 30.0, 30.0)
RING = (60.0, 10.0, 90.0, 10.0, 90.0, 40.0, 60.0, 40.0)
SECOND = (60.0, 50.0, 90.0, 50.0, 90.0, 70.0)
SENTENCE = "a small red car beside a tree"


def result(task, *objects, text=None, steps=()):
    return Result(task, SIZE, tuple(objects), text, "", (), False, (), steps)


def build(*answers, **rules):
    answered = [a if isinstance(a, Answered) else Answered(a) for a in answers]
    return annotation_from_answers(answered, LabelRules(**rules), SIZE)[0]


def classes(*answers, **rules):
    return [label.obj_class.name for label in build(*answers, **rules).labels]


def detected(*objects):
    return result("<OD>", *objects)


TWO = detected(Box(BOX, "cat", 0.4), Box(BOX, "dog", 0.6))


# Half of what a score is, and all the same above 0.6.
CURVE = {"Cat": ((0.0, 0.0), (0.6, 0.3))}


@pytest.mark.parametrize(
    ("answer", "rules", "names"),
    [
        pytest.param(TWO, {"threshold": 0.5}, ["dog"], id="threshold"),
        pytest.param(
            TWO, {"threshold": 0.5, "class_thresholds": {"cat": 0.3}}, ["cat", "dog"],
            id="a class's own threshold is lower",
        ),
        pytest.param(
            TWO, {"class_thresholds": {" dog\n": 0.7}}, ["cat"], id="or higher, by the clean name"
        ),
        pytest.param(
            TWO, {"calibration": CURVE, "threshold": 0.3}, ["dog"],
            id="a threshold is about the calibrated score",
        ),
        pytest.param(
            TWO, {"calibration": CURVE, "class_thresholds": {"cat": 0.2}}, ["cat", "dog"],
            id="so is that of a class",
        ),
        pytest.param(
            detected(Box(BOX, "cat", 0.9), Box(NEAR, "dog", 0.5)),
            {"calibration": CURVE, "across_classes": True}, ["dog"],
            id="of two classes the surer by the calibration",
        ),
        pytest.param(TWO, {"whitelist": frozenset({" cat "})}, ["cat"], id="whitelist, cleaned"),
        pytest.param(TWO, {"whitelist": frozenset({"Cat"})}, ["cat"], id="whitelist in any case"),
        pytest.param(
            TWO, {"class_thresholds": {"CAT": 0.5}}, ["dog"], id="thresholds in any case"
        ),
        pytest.param(TWO, {"whitelist": frozenset()}, [], id="empty whitelist"),
        pytest.param(
            TWO, {"whitelist": frozenset({"cat"}), "class_suffix": "_bbox"}, ["cat_bbox"],
            id="whitelist without the suffix",
        ),
        pytest.param(
            TWO, {"whitelist": frozenset({"cat_bbox"}), "class_suffix": "_bbox"}, ["cat_bbox"],
            id="whitelist with the suffix",
        ),
        pytest.param(
            TWO, {"whitelist": frozenset({"Cat"}), "classes": {"cat": "Cat"}}, ["Cat"],
            id="whitelist of the user's classes",
        ),
        pytest.param(
            detected(Box(BOX, "cat", 0.9), Box(NEAR, "dog", 0.8)),
            {"whitelist": frozenset({"dog"}), "across_classes": True}, ["dog"],
            id="what is not wanted makes nothing else superfluous",
        ),
        pytest.param(
            detected(Box((0, 0, 100, 80), "whole", 0.9), Box((0, 0, 50, 80), "half", 0.9)),
            {"max_box_area": 0.5}, ["half"], id="boxes above the largest share go",
        ),
        pytest.param(
            detected(Box((0, 0, 100, 80), "whole", 0.9)), {}, ["whole"], id="all shares by default"
        ),
        pytest.param(
            Answered(result("<REGION_TO_CATEGORY>", Text("car", 0.5), text="car"),
                     region=Region((0.0, 0.0, 100.0, 80.0))),
            {"max_box_area": 0.5}, ["object"], id="a region that was asked about may be large",
        ),
        pytest.param(
            detected(Box(BOX, "cat", 0.9), Box(NEAR, "cat", 0.8)), {}, ["cat"], id="nms"
        ),
        pytest.param(
            detected(Box(BOX, "cat", 0.9), Box(NEAR, "cat", 0.8)), {"nms_threshold": None},
            ["cat", "cat"], id="no nms",
        ),
        pytest.param(
            detected(Box(BOX, "cat", 0.9), Box(INNER, "cat", 0.8)), {"containment_threshold": 0.9},
            ["cat"], id="containment",
        ),
        pytest.param(
            detected(Box(BOX, "cat", 0.7), Box(NEAR, "dog", 0.8)), {"across_classes": True},
            ["dog"], id="across classes",
        ),
        pytest.param(
            result("<DENSE_REGION_CAPTION>", Box(BOX, "a", 0.9), Box(NEAR, "b", 0.8)), {},
            ["object", "object"], id="two sentences about one place both stay",
        ),
        pytest.param(
            result("<DENSE_REGION_CAPTION>", Box(BOX, SENTENCE, 0.9)),
            {"sentences_as_classes": True}, [SENTENCE], id="a class per sentence, if wanted",
        ),
        pytest.param(
            Answered(result("<REGION_TO_DESCRIPTION>", text=SENTENCE), region=Region(BOX)),
            {"sentences_as_classes": True}, [SENTENCE], id="also of a region",
        ),
        pytest.param(
            Answered(result("<REGION_TO_OCR>", text="STOP"), region=Region(BOX)),
            {"sentences_as_classes": True}, ["object"], id="but what is read is no class",
        ),
        pytest.param(
            result("<OPEN_VOCABULARY_DETECTION>", Polygon((RING,), "cat", 0.8),
                   Box(BOX, "cat", 0.9)),
            {"class_suffix": "_nn"}, ["cat (polygon)_nn", "cat_nn"], id="one class, two shapes",
        ),
        pytest.param(
            result("<OPEN_VOCABULARY_DETECTION>", Polygon((RING,), "cat", 0.8)),
            {"whitelist": frozenset({"cat (polygon)"})}, ["cat"],
            id="whitelist of what the class may be called",
        ),
        pytest.param(
            detected(Box(BOX, "x" * 200, 0.9)), {"class_suffix": "_bbox"}, ["x" * 95 + "_bbox"],
            id="long",
        ),
        pytest.param(
            result("<REGION_TO_SEGMENTATION>", Polygon((RING,), "", 0.8)), {"fixed_shapes": {}},
            ["object"], id="no fixed shapes",
        ),
    ],
)  # fmt: skip
def test_which_objects_become_labels_and_of_which_class(answer, rules, names):
    assert classes(answer, **rules) == names


@pytest.mark.parametrize(
    ("score", "curve", "confidence", "raw_score"),
    [
        (0.4, CURVE["Cat"], 0.2, 0.4),
        (0.9, CURVE["Cat"], 0.3, 0.9),
        (0.1, ((0.5, 0.25), (0.9, 0.8)), 0.25, 0.1),
        (0.7, ((0.5, 0.25), (0.9, 0.8)), 0.525, 0.7),
        (0.4, ((0.0, 0.0), (1.0, 1.0)), 0.4, None),
        (math.nan, CURVE["Cat"], None, None),
        (None, CURVE["Cat"], None, None),
    ],
)
def test_a_confidence_is_the_calibrated_score_and_the_models_is_kept(
    score, curve, confidence, raw_score
):
    answer = Answered(detected(Box(BOX, "cat", score)))
    rules = LabelRules(calibration={"cat": curve})
    annotation, [found] = annotation_from_answers([answer], rules, SIZE)
    tag = annotation.labels[0].tags.get("confidence")
    assert (tag.value if tag else None) == (confidence and pytest.approx(confidence))
    assert found.raw_score == raw_score


def test_of_two_that_a_calibration_makes_equal_the_models_own_score_decides():
    answer = detected(Box(NEAR, "cat", 0.7), Box(BOX, "cat", 0.9))
    (label,) = build(answer, calibration=CURVE).labels
    assert label.geometry.bottom == 49


def test_two_regions_that_were_asked_about_both_have_their_label():
    said = [
        Answered(result("<REGION_TO_CATEGORY>", text=word), region=Region(box))
        for word, box in (("car", BOX), ("wheel", NEAR))
    ]
    tags = [label.tags.get("category").value for label in build(*said).labels]
    assert tags == ["car", "wheel"]


def test_lines_of_text_in_one_place_are_the_same_only_when_they_say_the_same():
    quad = (0.0, 0.0, 50.0, 0.0, 50.0, 20.0, 0.0, 20.0)
    lines = [Quad(quad, words, 0.9) for words in ("STOP", "GO", "STOP")]
    assert len(build(result("<OCR_WITH_REGION>", *lines), across_classes=True).labels) == 2


def test_outlines_of_two_prompts_on_one_object_leave_the_surer():
    task = "<REFERRING_EXPRESSION_SEGMENTATION>"
    answers = [
        Answered(result(task, Polygon((RING,), "", score)), class_name="dog")
        for score in (0.3, 0.6)
    ]
    (label,) = build(*answers).labels
    assert label.tags.get("confidence").value == 0.6


def test_the_rings_of_one_object_are_one_bitmap():
    task = "<REFERRING_EXPRESSION_SEGMENTATION>"
    answer = result(task, Polygon((RING, SECOND), "cat", 0.9), Polygon((SECOND,), "dog", 0.8))
    annotation = build(answer, geometry="bitmap")
    found = [(label.obj_class.name, label.geometry.geometry_name()) for label in annotation.labels]
    assert found == [("cat", "bitmap"), ("dog", "bitmap")]
    first, second = (label.geometry for label in annotation.labels)
    assert (first.origin.row, first.origin.col) == (10, 60)
    assert first.data.sum() == 31 * 31 + second.data.sum()
    assert all(label.binding_key is None for label in annotation.labels)


def test_a_mask_without_pixels_is_no_label_and_lines_of_text_stay_polygons():
    far = tuple(value + 500 for value in RING)
    task = "<REFERRING_EXPRESSION_SEGMENTATION>"
    assert build(result(task, Polygon((far,), "cat", 0.9)), geometry="bitmap").labels == []
    quad = Quad((0, 0, 50, 0, 50, 20, 0, 20), "STOP", 0.9)
    (line,) = build(result("<OCR_WITH_REGION>", quad), geometry="bitmap").labels
    assert line.geometry.geometry_name() == "polygon"


def test_two_prompts_with_one_caption_give_one_tag():
    task = "<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>"
    same, other = result(task, text=SENTENCE), result(task, text="another")
    values = [tag.value for tag in build(same, same, other).img_tags]
    assert values == [SENTENCE, "another"]

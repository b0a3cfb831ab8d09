from __future__ import annotations

import json
import math

import numpy as np
import pytest
from label_fakes import result

from florence2.records import Box, Polygon, Quad, Region, Text
from serve.predict.annotations import Answered, LabelRules, annotation_from_answers

SIZE = (64, 48)
SENTENCE = "a small red car beside a tree"


def build(*answers, classes=None, threshold=0.0):
    answered = [a if isinstance(a, Answered) else Answered(a) for a in answers]
    return annotation_from_answers(answered, LabelRules(classes or {}, threshold), SIZE)[0]


def seen(annotation):
    return [
        (
            label.obj_class.name,
            label.geometry.geometry_name(),
            {tag.name: tag.value for tag in label.tags},
        )
        for label in annotation.labels
    ]


BOX = (4.0, 4.0, 20.0, 20.0)
RING = (1.0, 1.0, 9.0, 1.0, 9.0, 9.0)
QUAD = (1.0, 1.0, 30.0, 1.0, 30.0, 9.0, 1.0, 9.0)
REGION = Region(BOX)


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        pytest.param(
            result("<OD>", Box(BOX, "car", 0.5)), [("car", "rectangle", {"confidence": 0.5})],
            id="box",
        ),
        pytest.param(
            result("<REGION_PROPOSAL>", Box(BOX, "", 0.5)),
            [("object", "rectangle", {"confidence": 0.5})], id="proposal",
        ),
        pytest.param(
            result("<DENSE_REGION_CAPTION>", Box(BOX, SENTENCE, 0.5)),
            [("object", "rectangle", {"confidence": 0.5, "description": SENTENCE})],
            id="dense caption: no class per sentence",
        ),
        pytest.param(
            result("<REFERRING_EXPRESSION_SEGMENTATION>", Polygon((RING,), "car", 0.5)),
            [("car", "polygon", {"confidence": 0.5})], id="polygon",
        ),
        pytest.param(
            result("<OCR_WITH_REGION>", Quad(QUAD, "STOP", 0.5)),
            [("text", "polygon", {"confidence": 0.5, "text": "STOP"})], id="line of text",
        ),
        pytest.param(
            Answered(result("<REFERRING_EXPRESSION_SEGMENTATION>", Polygon((RING,), "", 0.5)),
                     phrase="the dog"),
            [("the dog", "polygon", {"confidence": 0.5})], id="polygon without a label: the phrase",
        ),
        pytest.param(
            Answered(result("<REGION_TO_SEGMENTATION>", Polygon((RING,), "", 0.5)), region=REGION),
            [("object (polygon)", "polygon", {"confidence": 0.5})], id="region's outline",
        ),
        pytest.param(
            Answered(result("<REGION_TO_CATEGORY>", Text("car", 0.5), text="car"), region=REGION),
            [("object", "rectangle", {"confidence": 0.5, "category": "car"})], id="region category",
        ),
        pytest.param(
            Answered(result("<REGION_TO_DESCRIPTION>", text=SENTENCE), region=REGION),
            [("object", "rectangle", {"description": SENTENCE})], id="region description, no score",
        ),
        pytest.param(
            Answered(result("<REGION_TO_OCR>", Text("STOP", 0.5), text="STOP"), region=REGION),
            [("object", "rectangle", {"confidence": 0.5, "text": "STOP"})], id="region text",
        ),
        pytest.param(
            Answered(result("<REGION_TO_OCR>", text=""), region=REGION), [], id="no text in region"
        ),
        pytest.param(
            result("<OD>+<REGION_TO_DESCRIPTION>", Box(BOX, SENTENCE, 0.5),
                   steps=(result("<OD>", Box(BOX, "car", 0.9)),)),
            [("car", "rectangle", {"confidence": 0.9, "description": SENTENCE})],
            id="cascade: class and score are those of what was detected",
        ),
        pytest.param(
            result("<DENSE_REGION_CAPTION>+<REGION_TO_CATEGORY>", Box(BOX, "car", 0.5),
                   steps=(result("<DENSE_REGION_CAPTION>", Box(BOX, SENTENCE, 0.9)),)),
            [("object", "rectangle", {"confidence": 0.9, "category": "car"})],
            id="cascade: a sentence is no class",
        ),
        pytest.param(result("<OD>", Box((math.nan,) * 4, "car", 0.5)), [], id="not a number"),
        pytest.param(
            result("<OD>", Box(BOX, "car", math.nan)), [("car", "rectangle", {})], id="no score"
        ),
        pytest.param(
            result("<OD>", Box(BOX, "car", np.float32(0.25))),
            [("car", "rectangle", {"confidence": 0.25})], id="a score of numpy's",
        ),
    ],
)  # fmt: skip
def test_what_each_output_becomes(answer, labels):
    assert seen(build(answer)) == labels


@pytest.mark.parametrize(
    ("task", "tag"),
    [
        ("<CAPTION>", "caption"),
        ("<DETAILED_CAPTION>", "caption"),
        ("<MORE_DETAILED_CAPTION>", "caption"),
        ("<OCR>", "ocr_text"),
        ("<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>", "caption"),
    ],
)
def test_words_about_the_image_are_a_tag_of_the_image(task, tag):
    annotation = build(result(task, Text(SENTENCE, 0.9), text=SENTENCE))
    assert [(t.name, t.value) for t in annotation.img_tags] == [(tag, SENTENCE)]
    assert annotation.labels == []


def test_every_label_is_of_status_auto_and_survives_json():
    annotation = build(result("<OD>", Box(BOX, "car", np.float64(0.123456))))
    stored = json.loads(json.dumps(annotation.to_json()))
    assert stored["objects"][0]["nnCreated"]
    assert stored["objects"][0]["nnUpdated"]
    assert stored["objects"][0]["tags"] == [{"name": "confidence", "value": 0.1235}]
    assert stored["size"] == {"width": 64, "height": 48}


def test_rings_of_one_object_share_a_key_and_of_two_do_not():
    two = (RING, (20.0, 20.0, 29.0, 20.0, 29.0, 29.0))
    task = "<REFERRING_EXPRESSION_SEGMENTATION>"
    annotation = build(result(task, Polygon(two, "a", 0.9), Polygon(two, "b", 0.8)))
    keys = [label.binding_key for label in annotation.labels]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    assert None not in keys


def test_the_threshold_drops_objects_below_it_and_keeps_those_on_it():
    boxes = [Box(BOX, "low", 0.29), Box(BOX, "on", 0.3)]
    assert [name for name, *_ in seen(build(result("<OD>", *boxes), threshold=0.3))] == ["on"]


def test_two_prompts_of_one_class_on_one_object_leave_the_surer_box():
    near = (4.0, 4.0, 21.0, 20.0)
    puppy = Answered(result("<OD>", Box(BOX, "puppy", 0.4)), class_name="dog")
    hound = Answered(result("<OD>", Box(near, "hound", 0.8)), class_name="dog")
    expected = [("dog", "rectangle", {"confidence": 0.8})]
    assert seen(build(puppy, hound)) == seen(build(hound, puppy)) == expected


def test_overlapping_objects_stay_and_two_classes_may_share_a_box():
    beside = Box((12.0, 4.0, 28.0, 20.0), "cat", 0.8)
    twins = result("<OD>", Box(BOX, "cat", 0.9), Box(BOX, "cat", 0.7), beside)
    assert [tags["confidence"] for *_, tags in seen(build(twins))] == [0.9, 0.8]
    both = [Answered(result("<OD>", Box(BOX, n, 0.9)), class_name=n) for n in ("cat", "dog")]
    assert len(seen(build(*both))) == 2


def test_labels_take_the_users_class_for_their_phrase():
    answer = result("<OD>", Box(BOX, "A Red car", 0.9), Box((30, 30, 40, 40), "wheel", 0.9))
    names = [name for name, *_ in seen(build(answer, classes={"red car": "Red Car"}))]
    assert names == ["Red Car", "wheel"]


def cascade(found, answers, *, last="<REGION_TO_DESCRIPTION>", first="<OD>", empties=True):
    """A cascade's result: every region's answer, or only those that are not empty."""
    before = result(first, *found)
    objects = [
        Box(BOX, text, box.score if empties else 0.5)
        for box, text in zip(found, answers, strict=True)
        if text or empties
    ]
    steps = (before, *(result(last, text=text) for text in answers))
    return result(f"{first}+{last}", *objects, steps=steps)


@pytest.mark.parametrize("empties", [True, False])
def test_two_detections_of_one_box_keep_their_own_labels_in_a_cascade(empties):
    found = [Box(BOX, "cat", 0.9), Box(BOX, "dog", 0.8)]
    assert seen(build(cascade(found, ["one", "two"], empties=empties))) == [
        ("cat", "rectangle", {"confidence": 0.9, "description": "one"}),
        ("dog", "rectangle", {"confidence": 0.8, "description": "two"}),
    ]
    late = seen(build(cascade(found, ["", "two"], empties=empties)))
    assert late[-1] == ("dog", "rectangle", {"confidence": 0.8, "description": "two"})
    assert len(late) == (2 if empties else 1)


def test_the_users_class_holds_in_a_cascade_too():
    step = cascade([Box(BOX, "puppy", 0.9)], ["it runs"], first="<OPEN_VOCABULARY_DETECTION>")
    mapped = Answered(step, class_name="dog", phrase="puppy")
    assert [name for name, *_ in seen(build(mapped))] == ["dog"]
    unnamed = cascade([Box(BOX, "", 0.9)], ["it runs"], first="<OPEN_VOCABULARY_DETECTION>")
    assert [name for name, *_ in seen(build(Answered(unnamed, phrase="cat")))] == ["cat"]


def test_outlines_and_lines_of_text_name_their_regions_in_a_cascade():
    line = cascade([Quad(QUAD, "STOP", 0.9)], ["a sign"], first="<OCR_WITH_REGION>")
    assert [name for name, *_ in seen(build(line))] == ["text (rectangle)"]
    task = "<OPEN_VOCABULARY_DETECTION>"
    outline = cascade([Polygon((RING,), "kite", 0.9)], ["it flies"], first=task)
    assert [name for name, *_ in seen(build(outline))] == ["kite"]


def test_outlines_of_a_cascade_take_class_and_score_from_their_detections():
    found = result("<DENSE_REGION_CAPTION>", Box(BOX, SENTENCE, 0.9), Box(BOX, "b", 0.3))
    outlines = [Polygon((RING,), "", 0.1)]
    answers = [result("<REGION_TO_SEGMENTATION>", *outlines), result("<REGION_TO_SEGMENTATION>")]
    task = "<DENSE_REGION_CAPTION>+<REGION_TO_SEGMENTATION>"
    joined = result(task, Polygon((RING,), SENTENCE, 0.1), steps=(found, *answers))
    assert seen(build(joined, threshold=0.6)) == [
        ("object (polygon)", "polygon", {"confidence": 0.9, "description": SENTENCE})
    ]


def test_a_detection_without_area_is_no_label_and_shifts_no_label():
    flat = Box((4.0, 4.0, 4.0, 9.0), "line", 0.9)
    found = result("<OD>", flat, Box(BOX, "car", 0.8))
    answer = result("<REGION_TO_SEGMENTATION>", Polygon((RING,), "", 0.1))
    task = "<OD>+<REGION_TO_SEGMENTATION>"
    joined = result(task, Polygon((RING,), "car", 0.1), steps=(found, answer))
    assert seen(build(joined)) == [("car", "polygon", {"confidence": 0.8})]
    said = result("<REGION_TO_CATEGORY>", text="vehicle")
    texts = (Box(flat.box_xyxy, "", 0.9), Box(BOX, "vehicle", 0.8))
    joined = result("<OD>+<REGION_TO_CATEGORY>", *texts, steps=(found, said))
    assert [name for name, *_ in seen(build(joined))] == ["car"]


@pytest.mark.parametrize("empties", [True, False])
def test_the_threshold_looks_at_the_detection_and_not_at_the_sentence(empties):
    step = cascade([Box(BOX, "car", 0.9), Box(BOX, "x", 0.55)], ["red", "blue"], empties=empties)
    assert [name for name, *_ in seen(build(step, threshold=0.6))] == ["car"]

"""What is taught: prompts that are asked later, answers that are read as what is there."""

from __future__ import annotations

import numpy as np
import pytest

from florence2.engine.ask import prompt_sentence
from florence2.errors import RequestError
from florence2.finetune.targets import (
    MOST_POINTS,
    Vocabulary,
    outline,
    pair_question,
    questions_about,
    sampled_questions,
)
from florence2.labeled.records import LabeledImage, LabeledObject, WantedAnswer
from florence2.postprocess import parse_answer_text
from florence2.records import Region
from florence2.tasks import find_task

SIZE = (400, 200)
BIN = (0.4, 0.2)
"""What one of a thousand bins is in pixels."""


def thing(label, *box, rings=(), **texts):
    return LabeledObject(label, tuple(map(float, box)), rings, texts)


TRIANGLE = (10.0, 100.0, 60.0, 20.0, 110.0, 100.0)
SQUARE = (200.0, 20.0, 260.0, 20.0, 260.0, 80.0, 200.0, 80.0)
QUAD = (300.0, 110.0, 390.0, 120.0, 388.0, 150.0, 298.0, 140.0)
DOG = thing("dog", 200, 20, 260, 80, rings=(SQUARE,), description="a grey dog")
CAT = thing("cat", 10, 20, 110, 100, rings=(TRIANGLE,), description="a cat asleep")
OTHER_DOG = thing("dog", 300, 10, 380, 90)
SIGN = thing("sign", 298, 110, 390, 150, rings=(QUAD,), text="STOP", description="a sign")
LOW_SIGN = thing("sign", 20, 160, 90, 190, text="GO")
IMAGE = LabeledImage(
    "x.png", "x.png", SIZE, (DOG, CAT, OTHER_DOG, SIGN, LOW_SIGN), {"caption": "Animals."}
)
EMPTY = LabeledImage("y.png", "y.png", SIZE)
VOCABULARY = Vocabulary(("cat", "dog", "horse", "sign"), {"dog": "a small dog"})


def asked(task, image=IMAGE, vocabulary=VOCABULARY):
    return questions_about(image, [find_task(task)], vocabulary)


def boxes(*things):
    return [one.box_xyxy for one in things]


def read(question):
    return parse_answer_text(question.task, question.answer, SIZE)


def assert_near(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(np.subtract(one, other)).max() <= max(BIN)


@pytest.mark.parametrize(
    ("task", "sentence", "labels", "things"),
    [
        (
            "<OD>",
            "Locate the objects with category name in the image.",
            ["sign", "cat", "dog", "dog", "sign"],
            [LOW_SIGN, CAT, DOG, OTHER_DOG, SIGN],
        ),
        (
            "<REGION_PROPOSAL>",
            "Locate the region proposals in the image.",
            [""] * 5,
            [LOW_SIGN, CAT, DOG, OTHER_DOG, SIGN],
        ),
        (
            "<DENSE_REGION_CAPTION>",
            "Locate the objects in the image, with their descriptions.",
            ["sign", "a cat asleep", "a grey dog", "dog", "a sign"],
            [LOW_SIGN, CAT, DOG, OTHER_DOG, SIGN],
        ),
        (
            "<CAPTION_TO_PHRASE_GROUNDING>",
            "Locate the phrases in the caption: cat. a small dog. horse. sign",
            ["cat", "a small dog", "a small dog", "sign", "sign"],
            [CAT, DOG, OTHER_DOG, LOW_SIGN, SIGN],
        ),
    ],
)
def test_a_detection_is_read_back_as_the_labels_within_a_bin(task, sentence, labels, things):
    [question] = asked(task)
    assert question.sentence == sentence
    found = read(question)
    assert [one.label for one in found.objects] == labels
    assert_near(boxes(*found.objects), boxes(*things))
    assert not found.notes


def test_each_class_is_asked_for_and_one_that_is_not_there_is_answered_with_nothing():
    questions = asked("<OPEN_VOCABULARY_DETECTION>")
    assert [one.text for one in questions] == ["cat", "a small dog", "horse", "sign"]
    assert [len(read(one).objects) for one in questions] == [1, 2, 0, 2]
    assert questions[2].answer == ""
    assert_near(boxes(*read(questions[1]).objects), boxes(DOG, OTHER_DOG))


@pytest.mark.parametrize("task", ["<OD>", "<REGION_PROPOSAL>", "<CAPTION_TO_PHRASE_GROUNDING>"])
def test_an_image_without_objects_teaches_to_say_nothing(task):
    [question] = asked(task, EMPTY)
    assert question.answer == ""


def test_outlines_are_asked_for_where_all_things_of_a_class_have_them():
    questions = {one.text: one for one in asked("<REFERRING_EXPRESSION_SEGMENTATION>")}
    assert list(questions) == ["cat"]
    [found] = read(questions["cat"]).objects
    # Clockwise from the top.
    assert_near(found.rings_xy, [(60, 20, 110, 100, 10, 100)])


def test_several_outlines_of_a_class_stay_apart():
    twice = LabeledImage(
        "z.png", "z.png", SIZE, (DOG, thing("dog", 10, 20, 110, 100, rings=(TRIANGLE,)))
    )
    [question] = asked("<REFERRING_EXPRESSION_SEGMENTATION>", twice)
    assert_near(
        [ring for one in read(question).objects for ring in one.rings_xy],
        [(60, 20, 110, 100, 10, 100), SQUARE],
    )


REGION_TASKS = {
    "<REGION_TO_CATEGORY>": ["sign", "cat", "dog", "dog", "sign"],
    "<REGION_TO_DESCRIPTION>": ["a cat asleep", "a grey dog", "a sign"],
    "<REGION_TO_OCR>": ["GO", "STOP"],
}


@pytest.mark.parametrize("task", REGION_TASKS)
def test_a_region_is_asked_about_where_its_answer_is_known(task):
    questions = asked(task)
    assert [read(one).text for one in questions] == REGION_TASKS[task]
    for one in questions:
        region = Region(one.region_xyxy)
        assert one.sentence == prompt_sentence(find_task(task), None, region, SIZE)
        # The region is repeated behind the words, as published.
        assert one.answer.count("<loc_") == 4


def test_a_region_has_the_outline_of_its_object():
    questions = asked("<REGION_TO_SEGMENTATION>")
    assert_near([one.region_xyxy for one in questions], boxes(CAT, DOG, SIGN))
    [found] = read(questions[1]).objects
    assert_near(found.rings_xy, [SQUARE])


def test_text_is_read_from_top_to_bottom_with_its_corners():
    [whole] = asked("<OCR>")
    [placed] = asked("<OCR_WITH_REGION>")
    assert whole.answer == "STOP\nGO"
    found = read(placed).objects
    assert [one.label for one in found] == ["STOP", "GO"]
    assert_near([one.quad_xy for one in found], [QUAD, (20, 160, 90, 160, 90, 190, 20, 190)])


@pytest.mark.parametrize(
    ("tags", "task", "answers"),
    [
        ({"caption": "Animals."}, "<CAPTION>", ["Animals."]),
        ({"caption": "Animals."}, "<DETAILED_CAPTION>", ["Animals."]),
        ({"caption": "A", "detailed_caption": "B"}, "<DETAILED_CAPTION>", ["B"]),
        ({"caption": None}, "<CAPTION>", []),
        ({}, "<MORE_DETAILED_CAPTION>", []),
    ],
)
def test_captions_are_the_tags_of_the_image(tags, task, answers):
    image = LabeledImage("x.png", "x.png", SIZE, (), tags)
    assert [one.answer for one in asked(task, image)] == answers


@pytest.mark.parametrize(
    ("prefix", "sentence", "task"),
    [
        ("<OD>", "Locate the objects with category name in the image.", "<OD>"),
        (
            "<CAPTION_TO_PHRASE_GROUNDING> a dog",
            "Locate the phrases in the caption: a dog",
            "<CAPTION_TO_PHRASE_GROUNDING>",
        ),
        ("<DocVQA>How much?", "<DocVQA>How much?", "<DocVQA>"),
        ("What is it?", "What is it?", ""),
    ],
)
def test_a_pair_is_asked_as_it_is_written_and_its_answer_is_not_touched(prefix, sentence, task):
    question = pair_question(prefix, "dog<loc_1000>")
    assert (question.sentence, question.task, question.answer) == (sentence, task, "dog<loc_1000>")


def test_a_pair_takes_the_place_of_its_images_objects():
    image = LabeledImage("x.png", "x.png", SIZE, (DOG,), answers=(WantedAnswer("<OD>", "a"),))
    assert [one.answer for one in asked("<REGION_PROPOSAL>", image)] == ["a"]


def test_a_pair_with_a_text_for_a_task_that_takes_none_is_refused():
    with pytest.raises(RequestError, match="<OD> takes no text"):
        pair_question("<OD> dogs", "dog")


def test_a_step_asks_something_else_each_time_and_the_same_again_for_the_same_number():
    tasks = [find_task(name) for name in ("<OD>", "<CAPTION_TO_PHRASE_GROUNDING>")]

    def of(seed, count=2):
        rng = np.random.default_rng(seed)
        return sampled_questions(IMAGE, tasks, VOCABULARY, rng, count)

    assert of(1) == of(1)
    captions = {one.text for seed in range(20) for one in of(seed) if one.text}
    assert len(captions) > 8
    assert {one.task for one in of(3)} == {task.token for task in tasks}
    assert len(of(3, 1)) == 1
    asked_for = {name for text in captions for name in text.split(". ")}
    assert asked_for == {"cat", "a small dog", "horse", "sign"}


def test_a_long_outline_keeps_its_shape_with_few_points():
    angles = np.linspace(0, 2 * np.pi, 500, endpoint=False)
    circle = np.stack([100 + 50 * np.cos(angles), 100 + 50 * np.sin(angles)], axis=1)
    ring = outline(tuple(circle.ravel()))
    assert 10 <= len(ring) // 2 <= MOST_POINTS
    radii = np.hypot(*(np.reshape(ring, (-1, 2)) - 100).T)
    assert np.abs(radii - 50).max() < 1
    assert ring[1] < 55

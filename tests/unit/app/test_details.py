"""What a request for details is told: tokens, raw answers, seconds, in the demo's real answers."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from florence2.records import Box, Result, Text, Timings
from serve.predict.annotations import Answered, Found
from serve.predict.details import details_of
from serve.predict.predictor import Predicted
from serve.sdk import sly
from serve.settings import parse_settings

STAR = "<OPEN_VOCABULARY_DETECTION>"
TILES = {"tiling": {"width": 400, "height": 400, "overlap": 160}}
REGION = {"task_prompt": "<REGION_TO_CATEGORY>", "regions": [[320, 120, 520, 320]]}


@pytest.fixture
def details(predictor, deployment, image_path):
    """Those of settings about one image that was not seen before."""

    def ask(**settings):
        deployment.current.model.engine.cache.clear()
        [predicted] = predictor.predict([image_path("scene_bike.png")], parse_settings(settings))
        found = details_of(predicted)
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        return predicted, found

    return ask


def confidences(predicted: Predicted) -> list[float]:
    return [label.tags.get("confidence").value for label in predicted.annotation.labels]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"confidence_threshold": 0.985},
        {"mapping": {"plant": ["tree", "a green tree"], "sky": "star"}},
        {"task_prompt": "<OCR_WITH_REGION>"},
        {"task_prompt": "<REFERRING_EXPRESSION_SEGMENTATION>", "text": "star. tree"},
        {
            "task_prompt": "<REFERRING_EXPRESSION_SEGMENTATION>",
            "text": "star",
            "geometry": "bitmap",
        },
        {"task_prompt": "<OD>+<REGION_TO_DESCRIPTION>"},
        {"task_prompt": "<OD>+<REGION_TO_SEGMENTATION>"},
        {"task_prompt": "<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>"},
        REGION,
        TILES,
    ],
    ids=json.dumps,
)
def test_every_label_has_its_exact_score_and_its_tokens(details, settings):
    predicted, found = details(**settings)
    assert len(found["objects"]) == len(predicted.annotation.labels) > 0
    assert [round(one["score"], 4) for one in found["objects"]] == confidences(predicted)
    assert all(0 <= t["probability"] <= 1 for one in found["objects"] for t in one["tokens"])
    assert all(one["tokens"] for one in found["objects"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nms_threshold": 0.3, "nms_across_classes": True},
        {"containment_threshold": 0.5},
        {"nms_threshold": 0.3, "calibration": {"house": [[0.5, 0.3], [0.9, 0.7]]}},
        {"nms_threshold": "off", "max_box_area": 0.2},
        {"task_prompt": "<DENSE_REGION_CAPTION>"},
        {"task_prompt": STAR, "mapping": {"round": ["ball", "moon"], "house": ["house", "box"]}},
        {"task_prompt": "<OD>+<REGION_TO_SEGMENTATION>", "geometry": "bitmap"},
    ],
    ids=json.dumps,
)
def test_a_threshold_leaves_what_is_left_of_an_answer_without_one(predictor, image_path, settings):
    """So the page may filter an answer that it has."""

    def labels(name: str, **threshold) -> list[tuple[str, str, float]]:
        [found] = predictor.predict([image_path(name)], parse_settings({**settings, **threshold}))
        scores = [one["score"] for one in details_of(found)["objects"]]
        return [
            (label.obj_class.name, json.dumps(label.geometry.to_json(), sort_keys=True), score)
            for label, score in zip(found.annotation.labels, scores, strict=True)
        ]

    for name in ("scene_home.jpg", "photo_table.jpg"):
        everything = labels(name)
        for threshold in (0.4, 0.8, 0.95):
            left = [one for one in everything if one[-1] >= threshold]
            found = labels(name, confidence_threshold=threshold)
            assert [one[:-1] for one in found] == [one[:-1] for one in left]
            # Batches of a busy machine are of other sizes, and differ in the last digits.
            scores = [one[-1] for one in left]
            assert [one[-1] for one in found] == pytest.approx(scores, abs=1e-5)


def test_a_calibrated_score_has_the_models_own_beside_it(details):
    task = {"task_prompt": STAR, "mapping": {"sky": "star", "plant": "tree"}}
    plain = details(**task)[1]["objects"]
    predicted, found = details(**task, calibration={"sky": [[0.0, 0.1], [1.0, 0.6]]})
    for label, before, after in zip(
        predicted.annotation.labels, plain, found["objects"], strict=True
    ):
        if label.obj_class.name == "plant":
            assert after == before
        else:
            assert after["score"] == pytest.approx(0.1 + before["score"] / 2)
            assert after == {**before, "score": after["score"], "raw_score": before["score"]}


def test_a_score_is_made_of_the_probabilities_that_are_told(details):
    _, found = details()
    for one in found["objects"]:
        label, *place = one["tokens"]
        assert "near_probability" not in label
        near = [token["near_probability"] for token in place]
        score = label["probability"] * math.prod(near) ** (1 / 4)
        assert one["score"] == pytest.approx(score, abs=1e-4)


def test_the_tokens_spell_the_label_and_the_place(details):
    predicted, found = details()
    [answer] = found["answers"]
    spelled = ["".join(token["text"] for token in one["tokens"]) for one in found["objects"]]
    assert all(one in answer["answer"] for one in spelled)
    names = [label.obj_class.name for label in predicted.annotation.labels]
    assert [text.split("<loc_")[0] for text in spelled] == names
    assert (answer["task"], answer["is_truncated"]) == ("<OD>", False)


def test_a_text_about_the_image_has_its_tag_and_tokens(details):
    predicted, found = details(task_prompt="<CAPTION>")
    [tag], [text] = predicted.annotation.img_tags, found["texts"]
    assert (text["tag"], text["text"]) == (tag.name, tag.value)
    assert "".join(token["text"] for token in text["tokens"]).strip() == tag.value
    assert 0 < text["score"] <= 1
    assert (found["objects"], found["answers"][0]["answer"]) == ([], tag.value)


@pytest.mark.parametrize(
    ("settings", "answers"),
    [
        ({"task_prompt": STAR, "text": "star. box"}, [(STAR, "star"), (STAR, "box")]),
        ({"task_prompt": STAR, "mapping": {"sky": "star"}}, [(STAR, "star")]),
        (
            {"task_prompt": "<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>"},
            [("<CAPTION>", None), ("<CAPTION_TO_PHRASE_GROUNDING>", None)],
        ),
        (
            {"task_prompt": "<OD>+<REGION_TO_CATEGORY>"},
            [("<OD>", None), *[("<REGION_TO_CATEGORY>", None)] * 4],
        ),
    ],
)
def test_every_answer_of_the_model_is_told_with_its_prompt(details, settings, answers):
    _, found = details(**settings)
    assert [(one["task"], one["text"]) for one in found["answers"]] == answers
    assert all(one["answer"] for one in found["answers"])


def test_an_answer_names_the_class_and_the_region_it_was_asked_for(details):
    [mapped] = details(task_prompt=STAR, mapping={"sky": "star"})[1]["answers"]
    assert (mapped["class"], mapped["region"]) == ("sky", None)
    [about] = details(**REGION)[1]["answers"]
    assert (about["class"], about["region"]) == (None, [320, 120, 520, 320])


def test_the_second_question_about_an_image_has_no_vision_stage(details, predictor, image_path):
    _, first = details()
    assert not first["is_image_encoded_before"]
    assert all(seconds > 0 for seconds in first["seconds"].values())
    again = parse_settings({"task_prompt": "<CAPTION>"})
    [predicted] = predictor.predict([image_path("scene_bike.png")], again)
    second = details_of(predicted)
    assert second["is_image_encoded_before"]
    assert second["seconds"]["vision"] == 0
    assert second["seconds"]["decode"] > 0


def plain(task: str, seconds: Timings, *objects, steps=()) -> Result:
    return Result(task, (9, 9), objects, None, "", (), False, steps=steps, timings_s=seconds)


def test_steps_follow_each_other_and_the_regions_of_one_share_their_batch():
    found = plain("<OD>", Timings(1.0, 2.0, 4.0))
    regions = [plain("<REGION_TO_OCR>", Timings(1.0, seconds, 10.0)) for seconds in (0.25, 0.5)]
    cascade = plain("<OD>+<REGION_TO_OCR>", found.timings_s, steps=(found, *regions))
    alone = plain("<OD>", Timings(1.5, 0.0, 0.0))
    answered = (Answered(cascade), Answered(alone))
    told = details_of(Predicted(sly.Annotation((9, 9)), answered=answered))
    assert told["seconds"] == {"vision": 1.5, "prompt": 2.5, "decode": 14.0}


def test_what_is_unknown_is_null():
    box = Box((0.0, 0.0, 4.0, 4.0), "cat", math.nan)
    result = plain("<CAPTION>", Timings(), Text("a cat", None))
    predicted = Predicted(
        sly.Annotation((9, 9)), answered=(Answered(result),), located=(Found(box, "cat"), None)
    )
    told = details_of(replace(predicted))
    assert told["objects"] == [{"score": None, "tokens": []}] * 2
    assert told["texts"] == [{"tag": "caption", "text": "a cat", "score": None, "tokens": []}]

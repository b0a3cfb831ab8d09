"""Every client's exact form of settings, through the SDK's merge with the settings file."""

from __future__ import annotations

import json

import pytest
from settings_tools import DEFAULTS, as_sent, cli_settings, merged, session
from supervisely.nn.model.prediction_session import PredictionSession

from serve.sdk import sly
from serve.settings import Reference, Settings, Tiling, parse_settings

OWL_THRESHOLDS = [{"text_prompt": 0.1}, {"reference_image": 0.9}]
WINDOWS = {
    "inference_mode": "sliding_window",
    "sliding_window_params": {
        "windowHeight": 256,
        "windowWidth": 512,
        "overlapY": 32,
        "overlapX": 64,
        "borderStrategy": "shift_window",
        "naive": False,
    },
}
TILES = Tiling(size_wh=(512, 256), overlap_wh=(64, 32), full_image=False)
OF_MASKS = {"class_suffix": "_bbox", "unknown_tags": "description"}


def grounding(text=None, **others):
    """The settings of phrase grounding, and nothing else that is not usual."""
    return Settings(task_prompt="<CAPTION_TO_PHRASE_GROUNDING>", text=text, **others)


CLIENTS = {
    "no settings": (None, Settings()),
    "no key": ({}, Settings()),
    "every key null": (dict.fromkeys(DEFAULTS), Settings()),
    "every key empty": (dict.fromkeys(DEFAULTS, ""), Settings()),
    "NN Image Labeling, file as it is": (dict(DEFAULTS), Settings()),
    "NN Image Labeling, file edited": (
        DEFAULTS | {"text": "red car. dog", "confidence_threshold": 0.4},
        grounding("red car. dog", confidence_threshold=0.4),
    ),
    "NN Image Labeling, an object was picked before": (
        DEFAULTS
        | {
            "task_prompt": "<OD>",
            "text": "kept from before",
            "mode": "reference_image",
            "reference_image_id": 77,
            "reference_class_name": "bolt",
            "reference_bbox": [20, 10, 39, 59],
        },
        grounding(reference=Reference(77, (10, 20, 60, 40), "bolt")),
    ),
    "NN Image Labeling, a mode and a text in the file": (
        DEFAULTS | {"mode": "text_prompt", "text": "a cat"},
        grounding("a cat"),
    ),
    "Apply NN, all classes ticked, sliding window": (
        DEFAULTS | {"classes": ["object", "text"]} | WINDOWS,
        Settings(tiling=TILES),
    ),
    "Apply NN, preview of a sliding window": (WINDOWS, Settings(tiling=TILES)),
    "Apply Florence-2, common prompt": (
        {"mapping": None, "mode": "text_prompt", "text": "a cat"},
        grounding("a cat", **OF_MASKS),
    ),
    "Apply Florence-2, prompts of classes": (
        {"mapping": {"cat": "a cat", "dog": ""}, "mode": "text_prompt", "text": None},
        grounding(mapping={"cat": ("a cat",), "dog": ("dog",)}, **OF_MASKS),
    ),
    "Apply Florence-2, empty prompt": (
        {"mapping": None, "mode": "text_prompt", "text": ""},
        Settings(**OF_MASKS),
    ),
    "the keys of Apply Florence-2 and no mode": (
        {"mapping": None, "mode": None, "text": "a cat"},
        grounding("a cat"),
    ),
    "a mode and a text": ({"mode": "text_prompt", "text": "a cat"}, grounding("a cat")),
    "a mode, a text and more": (
        {"mode": "text_prompt", "text": "a cat", "num_beams": 1},
        grounding("a cat", num_beams=1),
    ),
    "a suffix of one's own": (
        {"text": "a cat", "mode": "text_prompt", "class_suffix": "_auto"},
        grounding("a cat", class_suffix="_auto"),
    ),
    "Apply OWL-ViT, text": (
        {
            "mode": "text_prompt",
            "text_queries": ["a cat", " dog", ""],
            "confidence_threshold": OWL_THRESHOLDS,
            "nms_threshold": 1,
        },
        grounding("a cat\ndog", confidence_threshold=0.1, nms_threshold=1),
    ),
    "Apply OWL-ViT, reference without a class": (
        {
            "mode": "reference_image",
            "reference_bbox": [20, 10, 40, 60],
            "reference_image_id": 5,
            "reference_class_name": "",
            "confidence_threshold": OWL_THRESHOLDS,
            "nms_threshold": 0.5,
        },
        grounding(
            confidence_threshold=0.1,
            nms_threshold=0.5,
            reference=Reference(5, (10, 20, 61, 41), "object"),
        ),
    ),
    "a client of Grounding DINO": (
        {"text_prompt": "person", "box_threshold": 0.35, "text_threshold": 0.25},
        grounding("person", confidence_threshold=0.35),
    ),
}

COMMAND_LINES = {
    "none": ((), Settings()),
    "values": (("conf=0.3", "text=a cat"), grounding("a cat", confidence_threshold=0.3)),
    "none spelled": (("task=none", "iou=None", "num_beams=null"), Settings()),
    "text none": (("text=none",), grounding("none")),
    "text of digits": (("text=7",), grounding("7")),
    "digits": (("confidence=.25",), Settings(confidence_threshold=0.25)),
    "off": (("nms_threshold=off",), Settings(nms_threshold=None)),
    "true": (("nms_across_classes=true",), Settings(nms_across_classes=True)),
    "listed": (("classes=dog, cat",), Settings(classes=("dog", "cat"))),
    "a region": (
        ("region=1,2,30,40",),
        Settings(task_prompt="<REGION_TO_CATEGORY>", regions=((1, 2, 30, 40),)),
    ),
    "a mapping": (
        ("mapping={dog: [puppy, hound], car: null}",),
        grounding(mapping={"dog": ("puppy", "hound"), "car": ("car",)}),
    ),
}

SESSIONS = {
    "the whole file": DEFAULTS,
    "sliding window": DEFAULTS | WINDOWS,
    "OWL-ViT": {"mode": "text_prompt", "text_queries": ["a cat"]},
    "short names": {"conf": 0.4, "classes": ["cat"], "text_prompt": "cat"},
    "merging labels": {"task": "ocr", "existing_objects_iou_thresh": 0.5},
}

PREDICTIONS = {
    "ModelAPI.predict": (
        {
            "batch_size": 4,
            "conf": 0.3,
            "img_size": 640,
            "classes": ["object"],
            "upload_mode": "append",
            "recursive": False,
            "show_progress": False,
            "text": "a cat",
            "task_prompt": "phrase_grounding",
        },
        grounding("a cat", confidence_threshold=0.3),
    ),
    "Predict App": (
        {
            "inference_mode": "full_image",
            "model_prediction_suffix": "_model",
            "inference_settings": DEFAULTS | {"text": "a cat"},
            "upload_mode": "iou_merge",
            "classes": ["object", "text"],
            "recursive": False,
        },
        grounding("a cat"),
    ),
    "a video": (
        {"stride": 2, "start_frame": 1, "num_frames": 9, "direction": "forward"},
        Settings(),
    ),
}


def test_the_settings_file_alone_is_plain_detection():
    assert parse_settings(DEFAULTS) == as_sent(Settings(), DEFAULTS)
    assert Settings() == parse_settings(None) == parse_settings({})
    assert Settings().task_prompt == "<OD>"


@pytest.mark.parametrize("client", CLIENTS)
def test_each_client_is_understood(client):
    sent, expected = CLIENTS[client]
    assert parse_settings(merged(sent)) == as_sent(expected, sent)


def test_a_picked_figure_is_the_part_of_the_image_to_look_at():
    state = {"rectangle": sly.Rectangle(top=20, left=10, bottom=39, right=59).to_json()}
    assert parse_settings(merged(dict(DEFAULTS), **state)).rectangle == (10, 20, 60, 40)


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_the_sdk_command_line_is_understood(case):
    words, expected = COMMAND_LINES[case]
    taken = cli_settings(*words)
    assert parse_settings(taken) == as_sent(expected, taken)


@pytest.mark.parametrize("case", SESSIONS)
def test_an_sdk_session_lets_every_key_of_the_clients_pass(case):
    taken = session().set_inference_settings(SESSIONS[case])
    assert isinstance(parse_settings(merged(taken)), Settings)


@pytest.mark.parametrize("case", PREDICTIONS)
def test_the_sdk_prediction_session_is_understood(monkeypatch, case):
    words, expected = PREDICTIONS[case]
    monkeypatch.setattr(PredictionSession, "_predict_images", lambda *_, **__: iter(()))
    monkeypatch.setattr(PredictionSession, "_get_api_token", lambda _: None)
    made = PredictionSession("http://localhost", image_id=1, **words)
    sent = json.loads(json.dumps(made._get_json_body()["state"]["settings"]))
    assert parse_settings(merged(sent)) == as_sent(expected, sent)


def test_conf_has_the_say_over_the_file_and_over_what_the_client_has_besides():
    assert parse_settings(merged({"conf": 0.4})).confidence_threshold == 0.4
    both = merged({"conf": 0.4, "confidence_threshold": 0.2})
    assert parse_settings(both).confidence_threshold == 0.4

"""Every client's exact form of settings, through the SDK's merge with the settings file."""

from __future__ import annotations

import json

import pytest
from settings_tools import DEFAULTS, cli_settings, merged, session
from supervisely.nn.model.prediction_session import PredictionSession

from serve.sdk import sly
from serve.settings import Reference, Settings, Tiling, parse_settings

GROUNDING = "<CAPTION_TO_PHRASE_GROUNDING>"
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


def rectangle_of(top, left, bottom, right):
    return sly.Rectangle(top, left, bottom, right).to_json()


def test_the_settings_file_alone_is_plain_detection():
    assert parse_settings(DEFAULTS) == Settings() == parse_settings(None) == parse_settings({})
    assert Settings().task_prompt == "<OD>"


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        pytest.param(None, Settings(), id="no settings"),
        pytest.param({}, Settings(), id="no key"),
        pytest.param(dict.fromkeys(DEFAULTS), Settings(), id="every key null"),
        pytest.param(dict.fromkeys(DEFAULTS, ""), Settings(), id="every key empty"),
        pytest.param(dict(DEFAULTS), Settings(), id="NN Image Labeling, file as it is"),
        pytest.param(
            DEFAULTS | {"text": "red car. dog", "confidence_threshold": 0.4},
            Settings(task_prompt=GROUNDING, text="red car. dog", confidence_threshold=0.4),
            id="NN Image Labeling, file edited",
        ),
        pytest.param(
            DEFAULTS
            | {
                "task_prompt": "<OD>",
                "text": "kept from before",
                "mode": "reference_image",
                "reference_image_id": 77,
                "reference_class_name": "bolt",
                "reference_bbox": [20, 10, 39, 59],
            },
            Settings(
                task_prompt=GROUNDING,
                reference=Reference(image_id=77, box_xyxy=(10, 20, 60, 40), class_name="bolt"),
            ),
            id="NN Image Labeling, an object was picked before",
        ),
        pytest.param(
            DEFAULTS | {"classes": ["object", "text"]} | WINDOWS,
            Settings(tiling=TILES),
            id="Apply NN, all classes ticked, sliding window",
        ),
        pytest.param(WINDOWS, Settings(tiling=TILES), id="Apply NN, preview of a sliding window"),
        pytest.param(
            {"mapping": None, "mode": "text_prompt", "text": "a cat"},
            Settings(task_prompt=GROUNDING, text="a cat", class_suffix="_bbox"),
            id="Apply Florence-2, common prompt",
        ),
        pytest.param(
            {"mapping": {"cat": "a cat", "dog": ""}, "mode": "text_prompt", "text": None},
            Settings(
                task_prompt=GROUNDING,
                mapping={"cat": ("a cat",), "dog": ("dog",)},
                class_suffix="_bbox",
            ),
            id="Apply Florence-2, prompts of classes",
        ),
        pytest.param(
            {"mapping": None, "mode": "text_prompt", "text": ""},
            Settings(class_suffix="_bbox"),
            id="Apply Florence-2, empty prompt",
        ),
        pytest.param(
            {"mode": "text_prompt", "text": "a cat"},
            Settings(task_prompt=GROUNDING, text="a cat"),
            id="a mode and a text",
        ),
        pytest.param(
            {"mode": "text_prompt", "text": "a cat", "num_beams": 1},
            Settings(task_prompt=GROUNDING, text="a cat", num_beams=1),
            id="a mode, a text and more",
        ),
        pytest.param(
            DEFAULTS | {"mode": "text_prompt", "text": "a cat"},
            Settings(task_prompt=GROUNDING, text="a cat"),
            id="NN Image Labeling, a mode and a text in the file",
        ),
        pytest.param(
            {"mapping": None, "mode": None, "text": "a cat"},
            Settings(task_prompt=GROUNDING, text="a cat"),
            id="the keys of Apply Florence-2 and no mode",
        ),
        pytest.param(
            {"text": "a cat", "mode": "text_prompt", "class_suffix": "_auto"},
            Settings(task_prompt=GROUNDING, text="a cat", class_suffix="_auto"),
            id="a suffix of one's own",
        ),
        pytest.param(
            {
                "mode": "text_prompt",
                "text_queries": ["a cat", " dog", ""],
                "confidence_threshold": OWL_THRESHOLDS,
                "nms_threshold": 1,
            },
            Settings(
                task_prompt=GROUNDING,
                text="a cat\ndog",
                confidence_threshold=0.1,
                nms_threshold=1,
            ),
            id="Apply OWL-ViT, text",
        ),
        pytest.param(
            {
                "mode": "reference_image",
                "reference_bbox": [20, 10, 40, 60],
                "reference_image_id": 5,
                "reference_class_name": "",
                "confidence_threshold": OWL_THRESHOLDS,
                "nms_threshold": 0.5,
            },
            Settings(
                task_prompt=GROUNDING,
                confidence_threshold=0.1,
                nms_threshold=0.5,
                reference=Reference(image_id=5, box_xyxy=(10, 20, 61, 41), class_name="object"),
            ),
            id="Apply OWL-ViT, reference without a class",
        ),
        pytest.param(
            {"text_prompt": "person", "box_threshold": 0.35, "text_threshold": 0.25},
            Settings(task_prompt=GROUNDING, text="person", confidence_threshold=0.35),
            id="a client of Grounding DINO",
        ),
    ],
)  # fmt: skip
def test_each_client_is_understood(sent, expected):
    assert parse_settings(merged(sent)) == expected


def test_a_picked_figure_is_the_part_of_the_image_to_look_at():
    state = {"rectangle": rectangle_of(top=20, left=10, bottom=39, right=59)}
    assert parse_settings(merged(dict(DEFAULTS), **state)).rectangle == (10, 20, 60, 40)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param((), Settings(), id="none"),
        pytest.param(
            ("conf=0.3", "text=a cat"),
            Settings(task_prompt=GROUNDING, text="a cat", confidence_threshold=0.3),
            id="values",
        ),
        pytest.param(("task=none", "iou=None", "num_beams=null"), Settings(), id="none spelled"),
        pytest.param(("text=none",), Settings(task_prompt=GROUNDING, text="none"), id="text none"),
        pytest.param(("text=7",), Settings(task_prompt=GROUNDING, text="7"), id="text of digits"),
        pytest.param(("confidence=.25",), Settings(confidence_threshold=0.25), id="digits"),
        pytest.param(("nms_threshold=off",), Settings(nms_threshold=None), id="off"),
        pytest.param(("nms_across_classes=true",), Settings(nms_across_classes=True), id="true"),
        pytest.param(("classes=dog, cat",), Settings(classes=("dog", "cat")), id="listed"),
        pytest.param(
            ("region=1,2,30,40",),
            Settings(task_prompt="<REGION_TO_CATEGORY>", regions=((1, 2, 30, 40),)),
            id="a region",
        ),
        pytest.param(
            ("mapping={dog: [puppy, hound], car: null}",),
            Settings(task_prompt=GROUNDING, mapping={"dog": ("puppy", "hound"), "car": ("car",)}),
            id="a mapping",
        ),
    ],
)
def test_the_sdk_command_line_is_understood(words, expected):
    assert parse_settings(cli_settings(*words)) == expected


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(DEFAULTS, id="the whole file"),
        pytest.param(DEFAULTS | WINDOWS, id="sliding window"),
        pytest.param({"mode": "text_prompt", "text_queries": ["a cat"]}, id="OWL-ViT"),
        pytest.param({"conf": 0.4, "classes": ["cat"], "text_prompt": "cat"}, id="short names"),
        pytest.param({"task": "ocr", "existing_objects_iou_thresh": 0.5}, id="merging labels"),
    ],
)
def test_an_sdk_session_lets_every_key_of_the_clients_pass(sent):
    taken = session().set_inference_settings(sent)
    assert isinstance(parse_settings(merged(taken)), Settings)


def model_api_settings(monkeypatch, **words):
    """The settings that the SDK's prediction session sends for keyword arguments."""
    monkeypatch.setattr(PredictionSession, "_predict_images", lambda *_, **__: iter(()))
    monkeypatch.setattr(PredictionSession, "_get_api_token", lambda _: None)
    made = PredictionSession("http://localhost", image_id=1, **words)
    return json.loads(json.dumps(made._get_json_body()["state"]["settings"]))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param(
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
            Settings(task_prompt=GROUNDING, text="a cat", confidence_threshold=0.3),
            id="ModelAPI.predict",
        ),
        pytest.param(
            {
                "inference_mode": "full_image",
                "model_prediction_suffix": "_model",
                "inference_settings": DEFAULTS | {"text": "a cat"},
                "upload_mode": "iou_merge",
                "classes": ["object", "text"],
                "recursive": False,
            },
            Settings(task_prompt=GROUNDING, text="a cat"),
            id="Predict App",
        ),
        pytest.param(
            {"stride": 2, "start_frame": 1, "num_frames": 9, "direction": "forward"},
            Settings(),
            id="a video",
        ),
    ],
)
def test_the_sdk_prediction_session_is_understood(monkeypatch, words, expected):
    assert parse_settings(merged(model_api_settings(monkeypatch, **words))) == expected


def test_conf_has_the_say_over_the_file_and_over_what_the_client_has_besides():
    assert parse_settings(merged({"conf": 0.4})).confidence_threshold == 0.4
    both = merged({"conf": 0.4, "confidence_threshold": 0.2})
    assert parse_settings(both).confidence_threshold == 0.4

"""What a fine-tune was trained to be asked, where a client says something, nothing, or it back."""

from __future__ import annotations

import pytest
import yaml
from settings_tools import DEFAULTS, as_sent, merged

from serve.answering import merged_settings
from serve.settings import Reference, Settings, parse_settings
from serve.settings.generated import YAML_FILE, text_with

GROUNDING = "<CAPTION_TO_PHRASE_GROUNDING>"
OWN = {
    "task_prompt": GROUNDING,
    "mapping": {"dog": ["puppy", "hound"]},
    "confidence_threshold": 0.3,
    "class_thresholds": {"dog": 0.4},
    "calibration": {"dog": [[0.2, 0.1], [0.9, 0.8]]},
}
TRAINED = Settings(**OWN)
OFFERED = {**DEFAULTS, **OWN}

CLIENTS = {
    "nothing": ({}, TRAINED),
    "every key null": (dict.fromkeys(DEFAULTS), TRAINED),
    "what was offered": (OFFERED, TRAINED),
    "classes that are offered": (
        {"classes": ["dog", "object"]},
        TRAINED.model_copy(update={"classes": ("dog", "object")}),
    ),
    "offered, with a threshold": (
        {**OFFERED, "confidence_threshold": 0.5},
        TRAINED.model_copy(update={"confidence_threshold": 0.5}),
    ),
    "a threshold under another name": (
        {"conf": 0.5},
        TRAINED.model_copy(update={"confidence_threshold": 0.5}),
    ),
    "a text": ({"text": "car"}, Settings(task_prompt=GROUNDING, text="car")),
    "a text by another name": (
        {"text_prompt": "car"},
        Settings(task_prompt=GROUNDING, text="car"),
    ),
    "a task": ({"task_prompt": "<CAPTION>"}, Settings(task_prompt="<CAPTION>")),
    "a task in what was offered": (
        {**OFFERED, "task_prompt": "<OD>", "mapping": None},
        Settings(confidence_threshold=0.3),
    ),
    "a text in what was offered": (
        {**OFFERED, "text": "car"},
        Settings(task_prompt=GROUNDING, text="car", confidence_threshold=0.3),
    ),
    "another mapping in what was offered": (
        {**OFFERED, "mapping": {"cat": "kitten"}},
        Settings(task_prompt=GROUNDING, mapping={"cat": "kitten"}, confidence_threshold=0.3),
    ),
    "another mapping": (
        {"mapping": {"cat": "kitten"}},
        Settings(task_prompt=GROUNDING, mapping={"cat": "kitten"}),
    ),
    "regions": (
        {"regions": [[1, 2, 3, 4]]},
        Settings(task_prompt="<REGION_TO_CATEGORY>", regions=[[1, 2, 3, 4]]),
    ),
    "a reference": (
        {**OFFERED, "mode": "reference_image", "reference_bbox": [1, 2, 3, 4]},
        Settings(
            task_prompt=GROUNDING,
            confidence_threshold=0.3,
            reference=Reference(None, (2.0, 1.0, 5.0, 4.0), "object"),
        ),
    ),
    "the form for masks without a text": (
        {"mapping": None, "mode": "text_prompt", "text": ""},
        TRAINED.model_copy(update={"class_suffix": "_bbox", "unknown_tags": "description"}),
    ),
}


@pytest.mark.parametrize(("sent", "meant"), CLIENTS.values(), ids=CLIENTS)
def test_each_client_is_asked_what_was_trained_unless_it_asks_itself(sent, meant):
    before = dict(sent)
    taken = parse_settings(merged_settings({"settings": sent}, DEFAULTS, "none", OWN))
    assert taken == as_sent(meant, sent)
    assert sent == before


def test_without_a_fine_tune_nothing_changes():
    sent = {"text": "car"}
    assert merged_settings({"settings": sent}, DEFAULTS, "none", {}) == merged(sent)


def test_the_file_has_the_values_of_a_fine_tune_and_all_of_its_comments():
    text = YAML_FILE.read_text(encoding="utf-8")
    own = {**OWN, "text": '\\d "quoted"', "a_new_key": [1]}
    changed = text_with(text, own)
    assert yaml.safe_load(changed) == {**DEFAULTS, **own}
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert [line for line in changed.splitlines() if line.startswith("#")] == comments
    assert text_with(text, {}) == text

"""The app's and the SDK's merge of a client's dictionary with the settings file."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import yaml

from serve.answering import merged_settings
from serve.sdk import sly
from serve.settings.generated import YAML_FILE

DEFAULTS = yaml.safe_load(YAML_FILE.read_text(encoding="utf-8"))


def merged(settings, **state):
    """What reaches the model when a client's request has ``settings``."""
    request = {"settings": copy.deepcopy(settings), **state}
    return merged_settings(request, DEFAULTS, "none")


def as_sent(settings, sent):
    """``settings`` of a client, with what the file says to those that send it."""
    said = (sent or {}).get("unknown_tags") or settings.unknown_tags
    return settings.model_copy(update={"unknown_tags": said})


def session():
    """An SDK session with a served model of ours; nothing is sent."""
    made = object.__new__(sly.nn.inference.Session)
    made._default_inference_settings = DEFAULTS
    made.inference_settings = {}
    return made


def cli_settings(*words):
    """What the SDK's command line makes of ``--settings`` and its words."""
    command = SimpleNamespace(
        _args=SimpleNamespace(settings=list(words) or None),
        custom_inference_settings_dict=DEFAULTS,
    )
    inference = sly.nn.inference.Inference
    command._read_settings = lambda settings: inference._read_settings(command, settings)
    command._validate_settings = lambda settings: inference._validate_settings(command, settings)
    inference._parse_inference_settings_from_args(command)
    return command._args.settings

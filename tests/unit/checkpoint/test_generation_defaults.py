"""Which of three places says how a checkpoint's answers are searched for."""

from __future__ import annotations

import pytest

from florence2.checkpoint import generation_settings
from florence2.errors import CheckpointError
from florence2.records import GenerationSettings

ORIGINAL = {"vision_config": {"dim_embed": [128]}}
NATIVE = {"vision_config": {"embed_dim": [128]}}
LEGACY = {"num_beams": 4, "early_stopping": True, "no_repeat_ngram_size": 5, "length_penalty": 2.0}


@pytest.mark.parametrize("config", [ORIGINAL, NATIVE])
def test_nothing_said_gives_the_published_defaults(config):
    assert generation_settings(config, {}) == GenerationSettings(3, None, 1.0, True, 3)


def test_original_repository_as_published():
    # The published generation_config.json says these two and nothing else.
    published = {"num_beams": 3, "early_stopping": False}
    text_config = {"num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 3}
    settings = generation_settings({**ORIGINAL, "text_config": text_config}, published)
    assert settings == GenerationSettings(num_beams=3, early_stopping=False)


def test_generation_config_goes_before_text_config():
    config = {**ORIGINAL, "text_config": LEGACY}
    assert generation_settings(config, {}) == GenerationSettings(4, None, 2.0, True, 5)
    settings = generation_settings(config, {"num_beams": 1, "no_repeat_ngram_size": None})
    assert settings == GenerationSettings(1, None, 2.0, True, 5)


def test_native_text_config_is_not_read():
    assert generation_settings({**NATIVE, "text_config": LEGACY}, {}) == GenerationSettings()


def test_length_limits_are_not_taken_over():
    settings = generation_settings(
        NATIVE, {"max_length": 20, "max_new_tokens": 5, "do_sample": True}
    )
    assert settings.max_new_tokens is None


def test_ban_switched_off_stays_off():
    assert generation_settings(NATIVE, {"no_repeat_ngram_size": 0}).no_repeat_ngram_size == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_beams", 0),
        ("num_beams", 33),
        ("num_beams", True),
        ("num_beams", "3"),
        ("num_beams", 3.0),
        ("early_stopping", "always"),
        ("early_stopping", 1),
        ("no_repeat_ngram_size", -1),
        ("length_penalty", float("nan")),
        ("length_penalty", float("inf")),
        ("length_penalty", "1"),
        ("length_penalty", -2),
        ("length_penalty", 10.5),
    ],
)
@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_unusable_value_is_named_with_its_file(place, key, value):
    legacy = {key: value} if place == "config.json" else {}
    chosen = {} if legacy else {key: value}
    with pytest.raises(CheckpointError, match=f"{key} in the checkpoint's {place} must be"):
        generation_settings({**ORIGINAL, "text_config": legacy}, chosen)

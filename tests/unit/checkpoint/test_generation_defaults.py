"""Which of three places says how a checkpoint's answers are searched for, and what none obeys."""

from __future__ import annotations

import pytest

from florence2.checkpoint.checkpoint import generation_settings
from florence2.errors import CheckpointError
from florence2.records import GenerationSettings, unheeded

ORIGINAL = {"vision_config": {"dim_embed": [128]}}
NATIVE = {"vision_config": {"embed_dim": [128]}}
LEGACY = {"num_beams": 4, "early_stopping": True, "no_repeat_ngram_size": 5, "length_penalty": 2.0}
PUBLISHED = GenerationSettings(3, None, 1.0, True, 3)
LIBRARY = GenerationSettings(1, None, 1.0, False, 0)

# As the original repositories say it, as far as a search is concerned.
PUBLISHED_TEXT_CONFIG = {
    "bos_token_id": 0,
    "decoder_start_token_id": 2,
    "early_stopping": True,
    "eos_token_id": 2,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
    "no_repeat_ngram_size": 3,
    "num_beams": 3,
    "output_attentions": True,
    "pad_token_id": 1,
}


@pytest.mark.parametrize("config", [ORIGINAL, NATIVE])
def test_nothing_said_gives_the_published_settings(config):
    assert generation_settings(config, None) == PUBLISHED


def test_original_repository_as_published_runs_the_language_models_own_settings():
    config = {**ORIGINAL, "text_config": PUBLISHED_TEXT_CONFIG}
    assert generation_settings(config, {"num_beams": 3, "early_stopping": False}) == PUBLISHED
    assert unheeded(PUBLISHED_TEXT_CONFIG) == ""


@pytest.mark.parametrize(
    ("text_config", "generation_config", "settings"),
    [
        (
            LEGACY,
            {"num_beams": 1, "length_penalty": 0.5},
            GenerationSettings(4, None, 2.0, True, 5),
        ),
        (LEGACY | {"num_beams": None}, {"num_beams": 2}, GenerationSettings(2, None, 2.0, True, 5)),
        ({}, {"num_beams": 2}, GenerationSettings(2, None, 1.0, True, 3)),
        ({"num_beams": 1}, None, GenerationSettings(1, None, 1.0, True, 3)),
        ({"no_repeat_ngram_size": 0}, {}, GenerationSettings(3, None, 1.0, True, 0)),
    ],
)
def test_original_layout_asks_text_config_first(text_config, generation_config, settings):
    config = {**ORIGINAL, "text_config": text_config}
    assert generation_settings(config, generation_config) == settings


@pytest.mark.parametrize(
    ("generation_config", "settings"),
    [
        ({}, LIBRARY),
        ({"num_beams": 3}, GenerationSettings(3, None, 1.0, False, 0)),
        (
            {"num_beams": None, "no_repeat_ngram_size": 3},
            GenerationSettings(1, None, 1.0, False, 3),
        ),
        ({"num_beams": 5, "early_stopping": True}, GenerationSettings(5, None, 1.0, True, 0)),
        ({"no_repeat_ngram_size": 0}, LIBRARY),
    ],
)
def test_native_layout_means_what_transformers_means(generation_config, settings):
    config = {**NATIVE, "text_config": LEGACY}
    assert generation_settings(config, generation_config) == settings


def test_native_text_config_is_not_read():
    assert generation_settings({**NATIVE, "text_config": LEGACY}, None) == PUBLISHED


def test_length_limits_are_not_taken_over_and_not_worth_a_note():
    limits = {"max_length": 20, "max_new_tokens": 5}
    assert generation_settings(NATIVE, limits).max_new_tokens is None
    assert unheeded(limits) == ""


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"repetition_penalty": 1.5}, "repetition_penalty 1.5"),
        ({"min_new_tokens": 5, "min_length": 9}, "min_length 9, min_new_tokens 5"),
        ({"suppress_tokens": [7]}, "suppress_tokens [7]"),
        ({"do_sample": True, "temperature": 0.7}, "do_sample True, temperature 0.7"),
        ({"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 1}, "do_sample True"),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5}, ""),
        ({"num_beam_groups": 3, "diversity_penalty": 0.5}, "num_beam_groups 3, diversity_p"),
        ({"forced_bos_token_id": 7, "eos_token_id": [2, 5]}, "forced_bos_token_id 7, eos_token_id"),
        ({"eos_token_id": [2], "forced_eos_token_id": 2, "decoder_start_token_id": 2}, ""),
        ({"repetition_penalty": 1.0, "min_length": 0, "suppress_tokens": None}, ""),
        ({"do_sample": False, "min_new_tokens": None, "bad_words_ids": []}, ""),
    ],
)
def test_what_is_asked_for_and_not_done_is_listed(section, said):
    assert unheeded(section).startswith(said) if said else unheeded(section) == ""


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

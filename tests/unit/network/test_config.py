"""Both published forms of config.json give the same numbers; a bad one names its field."""

from __future__ import annotations

import copy

import pytest
from original_layout import ORIGINAL_CONFIG

from florence2.errors import CheckpointError
from florence2.network.config import (
    NetworkConfig,
    base_config,
    is_original_config,
    large_config,
    tiny_config,
)


@pytest.mark.parametrize("config", [base_config(), large_config(), tiny_config()])
def test_native_round_trip(config):
    native = config.to_native_dict()
    assert NetworkConfig.from_dict(native) == config
    assert not is_original_config(native)


def test_original_config():
    assert NetworkConfig.from_dict(ORIGINAL_CONFIG) == base_config()
    assert is_original_config(ORIGINAL_CONFIG)


def test_the_reference_reads_the_native_form():
    from transformers import Florence2Config

    written = Florence2Config(**large_config().to_native_dict()).to_dict()
    assert NetworkConfig.from_dict(written) == large_config()


def test_the_published_misspelling_of_the_table_size():
    native = base_config().to_native_dict()
    native["vision_config"].pop("max_position_embeddings")
    native["vision_config"]["max_pos_embeddings"] = 60
    assert NetworkConfig.from_dict(native).vision.max_position_embeddings == 60


def test_grid():
    assert base_config().vision.grid(768, 768) == (24, 24)
    assert base_config().vision.grid(384, 768) == (12, 24)


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(config):
        for name in path:
            config = config[name]
        config[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("vision_config"), "section vision_config"),
        (lambda config: config.pop("text_config"), "section text_config"),
        (lambda config: config["text_config"].pop("d_model"), r"text_config\.d_model"),
        (lambda config: config["vision_config"].pop("depths"), r"vision_config\.depths"),
        (lambda config: config["vision_config"].pop("image_pos_embed"), "image_pos_embed"),
        (_set("vision_config", "depths", [1, 1, 9]), "depths must have one entry per stage"),
        (_set("vision_config", "depths", 9), r"depths has an unusable value, 9"),
        (_set("vision_config", "window_size", "12"), "window_size has an unusable value, '12'"),
        (_set("vision_config", "num_heads", [4, 8, 16, 31]), "num_heads must divide .* 1024"),
        (_set("vision_config", "num_groups", [4, 0, 16, 32]), "num_groups must divide"),
        (_set("vision_config", "image_pos_embed", "type", "sine"), "image_pos_embed.type must be"),
        (_set("vision_config", "image_feature_source", ["last_frame"]), "image_feature_source"),
        (_set("vision_config", "projection_dim", 1024), "projection_dim .1024. must equal"),
        (_set("text_config", "activation_function", "swish"), "activation_function .* 'swish'"),
        (_set("text_config", "normalize_before", True), "normalize_before must be False"),
        (_set("text_config", "scale_embedding", 1), "scale_embedding has an unusable value"),
        (_set("text_config", "decoder_attention_heads", 7), "decoder_attention_heads must divide"),
    ],
)
def test_a_bad_field_is_named(change, message):
    config = copy.deepcopy(ORIGINAL_CONFIG)
    change(config)
    with pytest.raises(CheckpointError, match=message):
        NetworkConfig.from_dict(config)

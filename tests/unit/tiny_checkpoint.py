"""Whole checkpoints of a small random network, as files, in both published layouts."""

from __future__ import annotations

import json

import torch
from original_layout import original_state
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from florence2.network.config import tiny_config
from florence2.network.florence import Florence2Network

VOCABULARY_SIZE = 5 + 256 + 1024


def tokenizer_json() -> bytes:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet]
    model = models.BPE({word: number for number, word in enumerate(words)}, [])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()


def tiny_network(vocab_size: int = VOCABULARY_SIZE) -> Florence2Network:
    torch.manual_seed(3)
    network = Florence2Network(tiny_config(vocab_size=vocab_size))
    network.tie()
    return network


def native_files(network: Florence2Network) -> dict[str, bytes]:
    state = {name: value.clone() for name, value in network.state_dict().items()}
    return {
        "config.json": json.dumps(network.config.to_native_dict()).encode(),
        "tokenizer.json": tokenizer_json(),
        "generation_config.json": json.dumps({"num_beams": 2, "length_penalty": 0.5}).encode(),
        "model.safetensors": save(state),
    }


def original_files(network: Florence2Network) -> dict[str, bytes]:
    config = network.config.to_native_dict()
    vision = config["vision_config"]
    vision["dim_embed"] = vision.pop("embed_dim")
    vision["image_pos_embed"] = {
        "type": "learned_abs_2d",
        "max_pos_embeddings": vision.pop("max_position_embeddings"),
    }
    vision["visual_temporal_embedding"] = {
        "type": "COSINE",
        "max_temporal_embeddings": vision.pop("max_temporal_embeddings"),
    }
    vision["image_feature_source"] = ["spatial_avg_pool", "temporal_avg_pool"]
    config["text_config"] |= {"num_beams": 3, "no_repeat_ngram_size": 3, "early_stopping": True}
    config["auto_map"] = {"AutoConfig": "configuration_florence2.Florence2Config"}
    state = {
        name: value.clone().contiguous()
        for name, value in original_state(dict(network.state_dict()), network.config).items()
    }
    published = {"num_beams": 3, "early_stopping": False}
    return {
        "config.json": json.dumps(config).encode(),
        "configuration_florence2.py": b"raise SystemExit('remote code ran')",
        "tokenizer.json": tokenizer_json(),
        "generation_config.json": json.dumps(published, indent=4).encode(),
        "model.safetensors": save(state),
    }

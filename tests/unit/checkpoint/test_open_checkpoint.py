"""From a hub to a network with the published weights, in both layouts, and what can be amiss."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import native_files, original_files, tiny_network

from florence2.checkpoint import load_weights, open_checkpoint
from florence2.errors import CheckpointError
from florence2.records import GenerationSettings


def place(folder: Path, content: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    ("make", "generation"),
    [
        (native_files, GenerationSettings(num_beams=2, length_penalty=0.5)),
        (original_files, GenerationSettings(num_beams=3, early_stopping=False)),
    ],
)
def test_hub_to_network(hub, cache, make, generation):
    network = tiny_network()
    commit = hub.add("a/tiny", make(network)).commit
    checkpoint = open_checkpoint("a/tiny", cache_dir=cache)
    assert (checkpoint.name, checkpoint.revision) == ("a/tiny", commit)
    assert checkpoint.config == network.config
    assert checkpoint.generation == generation
    assert checkpoint.vocabulary.size == network.config.text.vocab_size
    assert checkpoint.image_processor.size_wh == (768, 768)
    loaded = load_weights(checkpoint, torch.float32).state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(loaded[name], value), name
    assert load_weights(checkpoint, torch.bfloat16).state_dict()[name].dtype == torch.bfloat16
    assert not any(served.file.endswith(".py") for served in hub.served)
    with pytest.raises(dataclasses.FrozenInstanceError):
        checkpoint.name = "other"


def test_tokenizer_larger_than_the_weights(tmp_path):
    folder = place(tmp_path / "mine", native_files(tiny_network(vocab_size=500)))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="1285 tokens and the weights have rows for 500"):
        load_weights(checkpoint, torch.float32)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", b"{}", "vision_config"),
        ("tokenizer.json", b"{}", "tokenizer.json"),
        ("preprocessor_config.json", b"{", "preprocessor_config.json"),
        ("generation_config.json", b"[1]", "generation_config.json must hold"),
        ("generation_config.json", b'{"num_beams": -1}', "num_beams"),
    ],
)
def test_unusable_file_is_named(tmp_path, name, content, words):
    folder = place(tmp_path / "mine", native_files(tiny_network()) | {name: content})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert words in str(caught.value)


def test_weights_of_another_network(tmp_path):
    content = native_files(tiny_network())
    config = json.loads(content["config.json"])
    config["text_config"]["encoder_layers"] += 1
    folder = place(tmp_path / "mine", content | {"config.json": json.dumps(config).encode()})
    with pytest.raises(CheckpointError):
        load_weights(open_checkpoint(folder), torch.float32)

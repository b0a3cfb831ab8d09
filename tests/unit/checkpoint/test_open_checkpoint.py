"""From a hub to a network with the published weights, in both layouts, and what can be amiss."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch
from hub_files import place
from safetensors.torch import load, save
from tiny_checkpoint import native_files, original_files, tiny_network

from florence2 import Florence2
from florence2.checkpoint.checkpoint import load_weights, open_checkpoint
from florence2.errors import CheckpointError
from florence2.network.florence import Florence2Network
from florence2.records import GenerationSettings


@pytest.mark.parametrize(
    ("make", "generation"),
    [
        (native_files, GenerationSettings(2, None, 0.5, False, 0)),
        (original_files, GenerationSettings(num_beams=3, early_stopping=True)),
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


def small_images(network: Florence2Network) -> dict[str, bytes]:
    """A checkpoint whose network takes images of 64 pixels only."""
    content = native_files(network)
    config = json.loads(content["config.json"])
    config["vision_config"]["max_position_embeddings"] = 8
    size = {"size": {"height": 64, "width": 64}}
    settings = {"preprocessor_config.json": json.dumps(size).encode()}
    return content | settings | {"config.json": json.dumps(config).encode()}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no preprocessor_config.json, and the published size"),
        (b"{}", "holds no preprocessor_config.json, and the published size"),
        (b'{"size": 768}', "preprocessor_config.json asks for images of 768 x 768 pixels"),
    ],
)
def test_image_settings_that_do_not_fit_the_network_are_the_checkpoints_fault(
    tmp_path, content, words
):
    folder = place(tmp_path / "mine", small_images(tiny_network()))
    assert open_checkpoint(folder).image_processor.size_wh == (64, 64)
    (folder / "preprocessor_config.json").unlink()
    if content is not None:
        (folder / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=words):
        Florence2.load(folder, device="cpu")


def test_what_is_not_obeyed_or_used_is_said_once_at_load(tmp_path, caplog):
    content = small_images(tiny_network())
    asked = {"num_beams": 2, "repetition_penalty": 1.2, "do_sample": True, "top_p": 0.9}
    content["generation_config.json"] = json.dumps(asked).encode()
    content["adapter_config.json"] = b"{}"
    state = load(content["model.safetensors"]) | {"final_logits_bias": torch.zeros(1, 3)}
    table = "model.multi_modal_projector.image_position_embed.{}_embeddings.weight"
    for side in ("row", "column"):
        state[table.format(side)] = state[table.format(side)][:8].clone()
    content["model.safetensors"] = save(state)
    folder = place(tmp_path / "mine", content)
    with caplog.at_level(logging.WARNING):
        model = Florence2.load(folder, device="cpu")
    search, adapter, weights = model.notes
    assert "generation_config.json asks for do_sample True, repetition_penalty 1.2, top_p" in search
    assert "no adapter is applied" in adapter
    assert "final_logits_bias" in weights
    assert caplog.messages == [f"Checkpoint {folder}: {note}" for note in model.notes]


def test_a_published_checkpoint_has_nothing_to_note(tmp_path):
    for name, make in (("native", native_files), ("original", original_files)):
        checkpoint = open_checkpoint(place(tmp_path / name, make(tiny_network())))
        assert checkpoint.notes == ()
        assert load_weights(checkpoint, torch.float32).notes == ()


def test_weights_of_another_network(tmp_path):
    content = native_files(tiny_network())
    config = json.loads(content["config.json"])
    config["text_config"]["encoder_layers"] += 1
    folder = place(tmp_path / "mine", content | {"config.json": json.dumps(config).encode()})
    with pytest.raises(CheckpointError):
        load_weights(open_checkpoint(folder), torch.float32)

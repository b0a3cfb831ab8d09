"""Both layouts load to the same network; anything that does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from original_layout import original_state
from reference import random_network
from safetensors.torch import save_file
from torch import Tensor

from florence2.errors import CheckpointError
from florence2.network.layouts import convert_state, detect_layout
from florence2.network.presets import tiny_config
from florence2.network.weights import build_network, read_weights

CONFIG = tiny_config()
SHARED = "model.language_model.shared.weight"
ENCODER_COPY = "model.language_model.encoder.embed_tokens.weight"
State = dict[str, Tensor]


@pytest.fixture
def native() -> State:
    return {name: value.clone() for name, value in random_network(CONFIG).native_state().items()}


def assert_same(first: State, second: State) -> None:
    assert set(first) == set(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def write_safetensors(folder: Path, state: State) -> None:
    save_file(state, folder / "model.safetensors")


def write_bin(folder: Path, state: State) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def write_old_bin(folder: Path, state: State) -> None:
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_shards(folder: Path, state: State) -> None:
    names = sorted(state)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: state[name] for name in names if places[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


WRITERS = [write_safetensors, write_bin, write_old_bin, write_shards]


@pytest.mark.parametrize("layout", ["native", "original"])
@pytest.mark.parametrize("write", WRITERS)
def test_written_and_read(
    tmp_path: Path, native: State, write: Callable[[Path, State], None], layout: str
) -> None:
    state = native if layout == "native" else original_state(native, CONFIG)
    assert detect_layout(state) == layout
    write(tmp_path, state)
    read = read_weights(tmp_path)
    assert_same(read, state)
    network = build_network(CONFIG, read)
    assert network.is_tied
    assert_same(network.native_state(), native)


def test_conversion_of_a_native_state_changes_nothing(native: State) -> None:
    assert_same(convert_state(native), native)
    converted = convert_state(original_state(native, CONFIG))
    assert_same(convert_state(converted), converted)


def test_the_full_state_of_the_reference_is_native() -> None:
    network = random_network(CONFIG)
    built = build_network(CONFIG, network.state_dict())
    assert_same(built.state_dict(), network.state_dict())


def test_logits_bias_must_be_zero(native: State) -> None:
    state = original_state(native, CONFIG)
    state["language_model.final_logits_bias"][0, 3] = 0.5
    with pytest.raises(CheckpointError, match="final_logits_bias must be all zero"):
        build_network(CONFIG, state)


@pytest.mark.parametrize(
    "kept", [SHARED, ENCODER_COPY, ENCODER_COPY.replace("encoder", "decoder"), "lm_head.weight"]
)
def test_any_one_of_the_tied_names_is_enough(native: State, kept: str) -> None:
    state = {kept if name == SHARED else name: value for name, value in native.items()}
    network = build_network(CONFIG, state)
    assert network.is_tied
    assert_same(network.native_state(), native)


def test_a_head_of_its_own_stays_untied(native: State) -> None:
    native["lm_head.weight"] = native[SHARED] + 1
    network = build_network(CONFIG, native)
    assert not network.is_tied
    assert_same(network.native_state(), native)


def test_untie_and_tie() -> None:
    network = random_network(CONFIG)
    network.untie()
    assert not network.is_tied
    assert "lm_head.weight" in network.native_state()
    network.tie()
    assert network.is_tied


def test_separate_input_embeddings_are_refused(native: State) -> None:
    native[ENCODER_COPY] = native[SHARED] + 1
    with pytest.raises(CheckpointError, match=r"encoder\.embed_tokens\.weight must equal"):
        build_network(CONFIG, native)


@pytest.mark.parametrize("rows", [100, 121, 200])
def test_the_vocabulary_is_as_large_as_the_embedding(native: State, rows: int) -> None:
    native[SHARED] = torch.randn(rows, CONFIG.text.d_model)
    network = build_network(CONFIG, native)
    assert network.config.text.vocab_size == network.lm_head.weight.shape[0] == rows


def test_precision_and_ownership(native: State) -> None:
    network = build_network(CONFIG, native, torch.bfloat16)
    assert {value.dtype for value in network.state_dict().values()} == {torch.bfloat16}
    network = build_network(CONFIG, native)
    with torch.no_grad():
        network.lm_head.weight.zero_()
    assert bool(native[SHARED].any())
    assert all(not value.is_meta for value in network.state_dict().values())


def test_every_missing_weight_is_named(native: State) -> None:
    for name in sorted(native):
        state = {key: value for key, value in native.items() if key != name}
        with pytest.raises(CheckpointError) as caught:
            build_network(CONFIG, state)
        assert name in str(caught.value)


def test_an_unexpected_weight_is_named(native: State) -> None:
    native["model.vision_tower.norms.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"hold model\.vision_tower\.norms\.weight"):
        build_network(CONFIG, native)


def test_a_misshaped_weight_is_named(native: State) -> None:
    name = "model.language_model.decoder.layers.1.fc1.weight"
    native[name] = native[name][:-1]
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.1\.fc1\.weight must have .*128"):
        build_network(CONFIG, native)


def test_a_quantised_weight_is_named(native: State) -> None:
    name = "model.language_model.decoder.layers.1.fc1.weight"
    native[name] = native[name].to(torch.int8)
    with pytest.raises(CheckpointError, match=r"fc1\.weight must hold floating point"):
        build_network(CONFIG, native)


@pytest.mark.parametrize("names", [["encoder.layer.0.weight"], [], ["vision_tower.a", SHARED]])
def test_other_layouts_are_refused(names: list[str]) -> None:
    with pytest.raises(CheckpointError, match="not a Florence-2 checkpoint"):
        detect_layout(names)


@pytest.mark.parametrize("cut", [0, 5, 30, 2000, -1])
@pytest.mark.parametrize("write", [write_safetensors, write_bin, write_old_bin])
def test_a_cut_file(
    tmp_path: Path, native: State, write: Callable[[Path, State], None], cut: int
) -> None:
    write(tmp_path, native)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=f"weight file .*{path.name} is .*damaged"):
        read_weights(tmp_path)


def test_a_file_with_code_is_not_executed(tmp_path: Path) -> None:
    class Call:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            import os

            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"weight": Call()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        read_weights(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_file_with_other_values(tmp_path: Path) -> None:
    torch.save({"weight": [1, 2]}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="must hold named tensors only"):
        read_weights(tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must hold one of model\.safetensors"):
        read_weights(tmp_path)


def test_a_missing_shard(tmp_path: Path, native: State) -> None:
    write_shards(tmp_path, native)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is named by"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is cut or damaged"),
        ("[]", "is cut or damaged"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "files of its own folder"),
        ('{"weight_map": {"a": "model.safetensors"}}', "does not exist"),
        ('{"weight_map": {"absent": "one.safetensors"}}', "names absent"),
    ],
)
def test_a_bad_index(tmp_path: Path, index: str, message: str) -> None:
    save_file({"present": torch.zeros(1)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path)

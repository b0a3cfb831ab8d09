"""Both layouts load to the same network; anything that does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from original_layout import original_state
from reference import random_network, reference_of
from safetensors.torch import save_file
from torch import Tensor

from florence2.checkpoint.weights import (
    FRAMES,
    build_network,
    convert_state,
    detect_layout,
    read_weights,
)
from florence2.errors import CheckpointError
from florence2.network.config import tiny_config
from florence2.network.florence import Florence2Network

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
    for name in sorted(set(native) - {FRAMES}):
        state = {key: value for key, value in native.items() if key != name}
        with pytest.raises(CheckpointError) as caught:
            build_network(CONFIG, state)
        assert name in str(caught.value)


UNUSED = [
    ("native", "final_logits_bias"),
    ("native", "model.language_model.final_logits_bias"),
    ("native", "model.vision_tower.norms.weight"),
    ("native", "model.language_model.encoder.embed_positions.position_ids"),
    ("native", "epoch"),
    ("original", "vision_tower.norms.weight"),
    ("original", "vision_tower.head.bias"),
    ("original", "language_model.model.encoder.embed_positions.position_ids"),
    ("original", "epoch"),
]


@pytest.mark.parametrize(("layout", "name"), UNUSED)
def test_what_no_network_uses_is_left_out_and_noted(native: State, layout: str, name: str) -> None:
    state = dict(native) if layout == "native" else original_state(native, CONFIG)
    state[name] = torch.ones(1, 3, dtype=torch.int64 if "ids" in name else torch.float32)
    network = build_network(CONFIG, state)
    [note] = network.notes
    assert name.rsplit(".", 2)[-1] in note
    assert_same(network.native_state(), native)


def test_nothing_unused_is_nothing_noted(native: State) -> None:
    for state in (native, original_state(native, CONFIG)):
        assert build_network(CONFIG, state).notes == ()


def test_more_layers_than_the_config_has_are_not_left_out_in_silence(native: State) -> None:
    name = "model.language_model.decoder.layers.7.fc1.weight"
    native[name] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"layers\.7\.fc1\.weight, more layers than config"):
        build_network(CONFIG, native)


def test_the_table_of_frames_is_computed_where_it_is_absent(native: State) -> None:
    reference = reference_of(Florence2Network(CONFIG))
    for state in (native, original_state(native, CONFIG)):
        for name in [name for name in state if name.endswith("pos_idx_to_embed")]:
            del state[name]
        table = build_network(CONFIG, state).state_dict()[FRAMES]
        torch.testing.assert_close(table, reference.state_dict()[FRAMES])


WRAPPINGS = {
    "model. before native": ("native", lambda name: f"model.{name}"),
    "model. before original": ("original", lambda name: f"model.{name}"),
    "bare native model": ("native", lambda name: name.removeprefix("model.")),
    "parallel": ("native", lambda name: f"module.{name}"),
    "parallel original": ("original", lambda name: f"module.{name}"),
    "compiled": ("native", lambda name: f"_orig_mod.{name}"),
    "parallel and compiled": ("original", lambda name: f"module._orig_mod.{name}"),
    "compiled in a trainer": ("original", lambda name: f"model._orig_mod.{name}"),
    "a compiled part": (
        "original",
        lambda name: name.replace("language_model.", "language_model._orig_mod.", 1),
    ),
    "merged by hand": ("native", lambda name: f"base_model.model.{name}"),
    "merged by hand, original": ("original", lambda name: f"module.base_model.model.{name}"),
    "fully sharded": ("native", lambda name: f"_fsdp_wrapped_module.{name}"),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_what_wrappers_put_around_names_is_taken_off(native: State, wrapping: str) -> None:
    layout, wrap = WRAPPINGS[wrapping]
    state = native if layout == "native" else original_state(native, CONFIG)
    state = {wrap(name): value for name, value in state.items()}
    assert detect_layout(state) == layout
    network = build_network(CONFIG, state)
    assert network.notes == ()
    assert_same(network.native_state(), native)


def test_a_head_without_a_prefix_beside_wrapped_names_is_kept(native: State) -> None:
    state = {f"module.{name}": value for name, value in native.items()}
    state["module.lm_head.weight"] = native[SHARED] + 1
    network = build_network(CONFIG, state)
    assert torch.equal(network.lm_head.weight, native[SHARED] + 1)


def test_one_weight_under_two_names_must_be_one(native: State) -> None:
    name = "model.language_model.decoder.layers.1.fc1.weight"
    same = native | {f"module.{name}": native[name].clone()}
    assert_same(build_network(CONFIG, same).native_state(), native)
    with pytest.raises(CheckpointError, match="twice, the second time as module"):
        build_network(CONFIG, native | {f"module.{name}": native[name] + 1})


def test_a_misshaped_weight_is_named(native: State) -> None:
    name = "model.language_model.decoder.layers.1.fc1.weight"
    native[name] = native[name][:-1]
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.1\.fc1\.weight must have .*128"):
        build_network(CONFIG, native)


@pytest.mark.parametrize(
    "beside",
    [
        "SCB",
        "weight_format",
        "weight.absmax",
        "weight.quant_state.bitsandbytes__nf4",
        "qweight",
        "scales",
        "weight._data",
        "weight_scale",
        "scale_weight",
        None,
    ],
)
@pytest.mark.parametrize("layout", ["native", "original"])
def test_quantised_weights_are_called_so(native: State, layout: str, beside: str | None) -> None:
    state = native if layout == "native" else original_state(native, CONFIG)
    [name] = [name for name in state if name.endswith("decoder.layers.1.fc1.weight")]
    state[name] = state[name].to(torch.int8)
    if beside is not None:
        state[f"{name.removesuffix('.weight')}.{beside}"] = torch.ones(1)
    with pytest.raises(CheckpointError, match="weights are quantised"):
        build_network(CONFIG, state)


@pytest.mark.parametrize(
    "part",
    [
        "lora_A.default.weight",
        "lora_B.weight",
        "base_layer.weight",
        "modules_to_save.default.weight",
    ],
)
@pytest.mark.parametrize("wrapper", ["", "base_model.model."])
def test_an_adapter_that_is_not_merged_is_called_so(native: State, part: str, wrapper: str) -> None:
    state = original_state(native, CONFIG)
    state[f"{wrapper}language_model.model.decoder.layers.1.fc2.{part}"] = torch.ones(2, 2)
    with pytest.raises(CheckpointError, match="an adapter that is not merged"):
        build_network(CONFIG, state)


@pytest.mark.parametrize(
    "names",
    [["encoder.layer.0.weight"], [], ["vision_tower.a"], ["image_projection", SHARED]],
)
def test_other_layouts_are_refused(names: list[str]) -> None:
    with pytest.raises(CheckpointError, match="not a Florence-2 checkpoint"):
        detect_layout(names)


def write_variant(folder: Path, state: State) -> None:
    save_file(state, folder / "model.fp16.safetensors")


def write_pickled_variant(folder: Path, state: State) -> None:
    torch.save(state, folder / "pytorch_model.bf16.bin")


def write_variant_shards(folder: Path, state: State) -> None:
    write_shards(folder, state)
    index = folder / "model.safetensors.index.json"
    text = index.read_text().replace("model-0000", "model.fp16-0000")
    (folder / "model.safetensors.index.fp16.json").write_text(text)
    index.unlink()
    for path in folder.glob("model-*"):
        path.rename(folder / path.name.replace("model-", "model.fp16-"))


@pytest.mark.parametrize("write", [write_variant, write_pickled_variant, write_variant_shards])
def test_weights_with_a_variant_in_their_names(
    tmp_path: Path, native: State, write: Callable[[Path, State], None]
) -> None:
    write(tmp_path, native)
    assert_same(read_weights(tmp_path), native)
    write_bin(tmp_path, {"plain": torch.zeros(1)})
    assert list(read_weights(tmp_path)) == ["plain"]


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
    with pytest.raises(CheckpointError, match=r"must hold weights such as model\.safetensors"):
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

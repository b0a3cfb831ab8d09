"""Both layouts load to the same network; anything that does not fit is named."""

from __future__ import annotations

import json
import re
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
def native():
    return {name: value.clone() for name, value in random_network(CONFIG).native_state().items()}


def assert_same(first, second):
    assert set(first) == set(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def write_shards(folder, state, variant=""):
    names = sorted(state)
    shard = f"model{variant}-0000{{}}-of-00002.safetensors"
    places = {name: shard.format(1 + i % 2) for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: state[name] for name in names if places[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / f"model.safetensors.index{variant}.json").write_text(json.dumps(index))


def write_old_bin(folder, state):
    path = folder / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=False)


WRITERS: dict[str, Callable[[Path, State], None]] = {
    "safetensors": lambda folder, state: save_file(state, folder / "model.safetensors"),
    "pickled": lambda folder, state: torch.save(state, folder / "pytorch_model.bin"),
    "pickled by an old torch": write_old_bin,
    "shards": write_shards,
}
VARIANTS: dict[str, Callable[[Path, State], None]] = {
    "safetensors": lambda folder, state: save_file(state, folder / "model.fp16.safetensors"),
    "pickled": lambda folder, state: torch.save(state, folder / "pytorch_model.bf16.bin"),
    "shards": lambda folder, state: write_shards(folder, state, ".fp16"),
}


def in_layout(native, layout):
    return dict(native) if layout == "native" else original_state(native, CONFIG)


@pytest.mark.parametrize("layout", ["native", "original"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_written_and_read(tmp_path, native, write, layout):
    state = in_layout(native, layout)
    assert detect_layout(state) == layout
    write(tmp_path, state)
    read = read_weights(tmp_path)
    assert_same(read, state)
    network = build_network(CONFIG, read)
    assert network.is_tied
    assert network.notes == ()
    assert_same(network.native_state(), native)


def test_conversion_of_a_native_state_changes_nothing(native):
    assert_same(convert_state(native), native)
    converted = convert_state(original_state(native, CONFIG))
    assert_same(convert_state(converted), converted)


def test_the_full_state_of_the_reference_is_native():
    network = random_network(CONFIG)
    built = build_network(CONFIG, network.state_dict())
    assert_same(built.state_dict(), network.state_dict())


@pytest.mark.parametrize(
    "kept", [SHARED, ENCODER_COPY, ENCODER_COPY.replace("encoder", "decoder"), "lm_head.weight"]
)
def test_any_one_of_the_tied_names_is_enough(native, kept):
    state = {kept if name == SHARED else name: value for name, value in native.items()}
    network = build_network(CONFIG, state)
    assert network.is_tied
    assert_same(network.native_state(), native)


def test_a_head_of_its_own_stays_untied(native):
    native["lm_head.weight"] = native[SHARED] + 1
    wrapped = {f"module.{name}": value for name, value in native.items()}
    for state in (native, wrapped):
        network = build_network(CONFIG, state)
        assert not network.is_tied
        assert_same(network.native_state(), native)
    network.tie()
    assert network.is_tied
    assert "lm_head.weight" not in network.native_state()


@pytest.mark.parametrize("rows", [100, 121, 200])
def test_the_vocabulary_is_as_large_as_the_embedding(native, rows):
    native[SHARED] = torch.randn(rows, CONFIG.text.d_model)
    network = build_network(CONFIG, native)
    assert network.config.text.vocab_size == network.lm_head.weight.shape[0] == rows


def test_precision_and_ownership(native):
    network = build_network(CONFIG, native, torch.bfloat16)
    assert {value.dtype for value in network.state_dict().values()} == {torch.bfloat16}
    network = build_network(CONFIG, native)
    with torch.no_grad():
        network.lm_head.weight.zero_()
    assert bool(native[SHARED].any())
    assert all(not value.is_meta for value in network.state_dict().values())


def test_every_missing_weight_is_named(native):
    # One of those that layers, which have a number, have alike.
    alike = {
        re.sub(r"(?<=\.)\d+(?=\.)", "0", name): name for name in sorted(set(native) - {FRAMES})
    }
    assert len(alike) > 40
    for name in alike.values():
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
def test_what_no_network_uses_is_left_out_and_noted(native, layout, name):
    state = in_layout(native, layout)
    state[name] = torch.ones(1, 3, dtype=torch.int64 if "ids" in name else torch.float32)
    network = build_network(CONFIG, state)
    [note] = network.notes
    assert name.rsplit(".", 2)[-1] in note
    assert_same(network.native_state(), native)


def test_the_table_of_frames_is_computed_where_it_is_absent(native):
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
def test_what_wrappers_put_around_names_is_taken_off(native, wrapping):
    layout, wrap = WRAPPINGS[wrapping]
    state = in_layout(native, layout)
    state = {wrap(name): value for name, value in state.items()}
    assert detect_layout(state) == layout
    network = build_network(CONFIG, state)
    assert network.notes == ()
    assert_same(network.native_state(), native)


FC1 = "model.language_model.decoder.layers.1.fc1.weight"
FC1_OF_ORIGINAL = "language_model.model.decoder.layers.1.fc1"
LOGITS_BIAS = "language_model.final_logits_bias"
QUANTISED = ["SCB", "weight_format", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"]
QUANTISED += ["qweight", "scales", "weight._data", "weight_scale", "scale_weight"]
ADAPTER = ["lora_A.default.weight", "lora_B.weight", "base_layer.weight"]
ADAPTER += ["modules_to_save.default.weight"]
REFUSED: dict[str, tuple[str, Callable[[State], State], str]] = {
    # name: (layout, what is put into a state, message)
    "a bias on the logits": (
        "original",
        lambda state: {LOGITS_BIAS: state[LOGITS_BIAS] + 0.5},
        "final_logits_bias must be all zero",
    ),
    "input embeddings of their own": (
        "native",
        lambda state: {ENCODER_COPY: state[SHARED] + 1},
        r"encoder\.embed_tokens\.weight must equal",
    ),
    "more layers than the config has": (
        "native",
        lambda state: {FC1.replace("layers.1", "layers.7"): torch.zeros(3)},
        r"layers\.7\.fc1\.weight, more layers than config",
    ),
    "a misshaped weight": (
        "native",
        lambda state: {FC1: state[FC1][:-1]},
        r"decoder\.layers\.1\.fc1\.weight must have .*128",
    ),
    "two values of one weight": (
        "native",
        lambda state: {f"module.{FC1}": state[FC1] + 1},
        "twice, the second time as module",
    ),
    "integers": ("native", lambda state: {FC1: state[FC1].to(torch.int8)}, "are quantised"),
    **{
        f"{layout} with {end}": (
            layout,
            lambda state, name=f"{module}.{end}": {name: torch.ones(1)},
            "weights are quantised",
        )
        for layout, module in {"native": FC1[:-7], "original": FC1_OF_ORIGINAL}.items()
        for end in QUANTISED
    },
    **{
        f"{wrapper}{end}": (
            "original",
            lambda state, name=f"{wrapper}{FC1_OF_ORIGINAL}.{end}": {name: torch.ones(2, 2)},
            "an adapter that is not merged",
        )
        for wrapper in ("", "base_model.model.")
        for end in ADAPTER
    },
}


@pytest.mark.parametrize(("layout", "change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_plain_checkpoint_is_refused(native, layout, change, message):
    state = in_layout(native, layout)
    with pytest.raises(CheckpointError, match=message):
        build_network(CONFIG, state | change(state))


def test_one_weight_under_two_names_may_be_one(native):
    same = native | {f"module.{FC1}": native[FC1].clone()}
    assert_same(build_network(CONFIG, same).native_state(), native)


@pytest.mark.parametrize(
    "names",
    [["encoder.layer.0.weight"], [], ["vision_tower.a"], ["image_projection", SHARED]],
)
def test_other_layouts_are_refused(names):
    with pytest.raises(CheckpointError, match="not a Florence-2 checkpoint"):
        detect_layout(names)


@pytest.mark.parametrize("cut", [0, 5, 30, 2000, -1])
@pytest.mark.parametrize("write", [*WRITERS.values()][:3], ids=[*WRITERS][:3])
def test_a_cut_file(tmp_path, native, write, cut):
    write(tmp_path, native)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=f"weight file .*{path.name} is .*damaged"):
        read_weights(tmp_path)


def test_a_file_with_code_is_not_executed(tmp_path):
    class Call:
        def __reduce__(self):
            import os

            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"weight": Call()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        read_weights(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("write", VARIANTS.values(), ids=VARIANTS)
def test_weights_with_a_variant_in_their_names(tmp_path, native, write):
    write(tmp_path, native)
    assert_same(read_weights(tmp_path), native)
    WRITERS["pickled"](tmp_path, {"plain": torch.zeros(1)})
    assert list(read_weights(tmp_path)) == ["plain"]


INDEX = "model.safetensors.index.json"
FOLDERS: dict[str, tuple[str, str, str]] = {
    # name: (file, what is in it, message)
    "no weights": ("readme.txt", "", r"must hold weights such as model\.safetensors"),
    "an index cut": (INDEX, "{", "is cut or damaged"),
    "an index of another form": (INDEX, "[]", "is cut or damaged"),
    "a file elsewhere": (INDEX, '{"weight_map": {"a": "../b.safetensors"}}', "of its own folder"),
    "a missing shard": (
        INDEX,
        '{"weight_map": {"a": "two.safetensors"}}',
        r"two\.safetensors is named by its index but does not exist",
    ),
    "an absent weight": (INDEX, '{"weight_map": {"absent": "one.safetensors"}}', "names absent"),
}


@pytest.mark.parametrize(("name", "text", "message"), FOLDERS.values(), ids=FOLDERS)
def test_an_incomplete_folder(tmp_path, name, text, message):
    save_file({"present": torch.zeros(1)}, tmp_path / "one.safetensors")
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path)


def test_a_file_with_other_values(tmp_path):
    torch.save({"weight": [1, 2]}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="must hold named tensors only"):
        read_weights(tmp_path)

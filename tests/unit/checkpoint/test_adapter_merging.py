"""Adapters of peft, merged on load: the same weights and tokens as peft's own, or one sentence."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from adapter_tools import (
    CONFIG,
    DEMO,
    PEFT,
    PUBLIC_TARGETS,
    QUERY,
    RANK,
    WEIGHTS,
    WIDTH,
    change_config,
    pair,
    peft_adapter,
    reference_model,
    renamed,
    write_adapter,
)
from hub_files import place
from openvino_tools import write_small_checkpoint
from original_layout import original_names
from safetensors.torch import load_file, save_file
from tiny_checkpoint import original_files

from florence2 import Florence2
from florence2.checkpoint.catalog import resolve
from florence2.checkpoint.checkpoint import load_weights, open_adapter, open_checkpoint
from florence2.conversion.kept import Conversions
from florence2.engine.ask import prompt_sentence
from florence2.errors import CheckpointError
from florence2.images import open_image
from florence2.tasks import find_task
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene

pytest.importorskip("peft")

EMBEDDING = "model.language_model.shared.weight"
RECIPE = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "use_rslora": True,
    "init_lora_weights": "gaussian",
    "task_type": "CAUSAL_LM",
}
MERGED = {
    "the public recipe": {**RECIPE, "target_modules": PUBLIC_TARGETS},
    "every linear layer of the text": {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    },
    "convolutions and the tower": {
        "r": 4,
        "target_modules": ["conv", "qkv", "proj", "image_projection", "fc1"],
    },
    "ranks and alphas by pattern": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"k_proj": 2, r"encoder.layers.0.self_attn.q_proj": 8},
        "alpha_pattern": {"decoder.*q_proj": 3},
    },
    "the same with rsLoRA": {
        "r": 4,
        "target_modules": ["q_proj", "k_proj"],
        "use_rslora": True,
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"model.language_model.decoder.layers.0.self_attn.k_proj": 5},
    },
    "biases of all layers": {"r": 4, "target_modules": ["q_proj"], "bias": "all"},
    "biases of its layers": {"r": 4, "target_modules": ["fc1"], "bias": "lora_only"},
    "a bias of its own": {"r": 4, "target_modules": ["q_proj", "fc2"], "lora_bias": True},
    "whole modules": {
        "r": 4,
        "target_modules": ["v_proj"],
        "modules_to_save": ["image_projection", "layernorm_embedding"],
    },
    "a fan that is not turned": {"r": 4, "target_modules": ["q_proj"], "fan_in_fan_out": True},
}


def merged_network(folder):
    return load_weights(open_checkpoint(folder), torch.float32)


def assert_same(network, expected):
    """The same weights to the last bit; tied copies of the embedding are not of interest."""
    found = network.state_dict()
    for name, value in expected.items():
        assert "embed_tokens" in name or torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small random checkpoint for images of 64 pixels."""
    return write_small_checkpoint(tmp_path_factory.mktemp("small") / "base")


@pytest.fixture(scope="module")
def adapters(small, tmp_path_factory):
    """Makes each adapter of a table once: its folder, and the unmerged model of peft."""
    made = {}

    def adapter(case, **config):
        if case not in made:
            folder = tmp_path_factory.mktemp("adapter")
            made[case] = folder, peft_adapter(folder, small, **config)
        return made[case]

    return adapter


@pytest.mark.parametrize("case", MERGED)
def test_merged_as_peft_merges_to_the_last_bit(adapters, small, case):
    folder, model = adapters(case, **MERGED[case])
    base = reference_model(small).state_dict()
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    assert any(not torch.equal(value, base[name]) for name, value in expected.items())
    assert_same(merged_network(folder), expected)


LIMIT = 24
PICTURES = [draw_scene(make_scene(seed)) for seed in range(4)]


def reference_tokens(model, folder):
    """Of a model of transformers or peft: the tokens of every picture, with the base's beams."""
    checkpoint = open_checkpoint(folder)
    sentence = prompt_sentence(find_task("<OD>"), None, None, (1, 1))
    ids = checkpoint.vocabulary.encode_prompt(sentence)
    ids = torch.tensor([[model.config.image_token_id] * (4 * 4 + 1) + ids])
    answers = []
    for picture in PICTURES:
        pixels = checkpoint.image_processor.pixels(open_image(picture).image)
        with torch.inference_mode():
            [row] = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=torch.from_numpy(pixels)[None],
                max_new_tokens=LIMIT,
            ).tolist()
        answers.append(tuple(token_id for token_id in row if token_id not in (0, 1, 2)))
    return answers


def our_tokens(folder, runtime="torch", **options):
    model = Florence2.load(folder, "cpu", runtime, precision="fp32", **options)
    return [model.run("<OD>", picture, max_new_tokens=LIMIT).token_ids for picture in PICTURES]


@pytest.mark.parametrize("case", ["the public recipe", "convolutions and the tower"])
def test_tokens_of_the_merged_model_of_peft(adapters, small, case):
    folder, model = adapters(case, **MERGED[case])
    found = our_tokens(folder)
    assert found == reference_tokens(copy.deepcopy(model).merge_and_unload(), folder)
    assert found != our_tokens(small)


HEADS = {
    "LoRA on lm_head": {**RECIPE, "target_modules": [*PUBLIC_TARGETS, "lm_head"]},
    "lm_head as a whole": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", HEADS)
def test_the_output_projection_is_changed_and_the_embedding_is_not(adapters, small, case):
    folder, model = adapters(case, **HEADS[case])
    network = merged_network(folder)
    embedding = reference_model(small).state_dict()[EMBEDDING]
    assert torch.equal(network.state_dict()[EMBEDDING], embedding)
    assert not network.is_tied
    assert not torch.equal(network.lm_head.weight, embedding)
    # The unmerged model: merging changes the embedding that the projection is tied to.
    assert our_tokens(folder) == reference_tokens(model, folder)


def of_modules(names):
    """Names of weights as names of the modules that they are of."""
    return {name.removesuffix(".weight"): other.removesuffix(".weight") for name, other in names}


def test_both_layouts_of_adapter_and_base(adapters, small, tmp_path):
    case = "LoRA on lm_head"
    native = shutil.copytree(adapters(case, **HEADS[case])[0], tmp_path / "native")
    names = original_names(open_checkpoint(small).config)
    names = of_modules((ours, theirs) for theirs, ours in names.items())
    names["lm_head"] = "language_model.lm_head"
    # Older versions of peft did not store the base's own weight.
    state = load_file(native / WEIGHTS)
    del state[f"{PEFT}lm_head.base_layer.weight"]
    save_file(state, native / WEIGHTS)
    original = renamed(native, tmp_path / "original", names)
    stored = set(load_file(original / WEIGHTS))
    assert f"{PEFT}language_model.lm_head.lora_A.weight" in stored
    assert any(name.endswith("ffn.fn.net.fc2.lora_B.weight") for name in stored)
    expected = merged_network(native).state_dict()
    files = original_files(load_weights(open_checkpoint(small), torch.float32))
    files["preprocessor_config.json"] = (small / "preprocessor_config.json").read_bytes()
    base = place(tmp_path / "of-original-layout", files)
    for folder in (native, original):
        for name in (small, base):
            change_config(folder, base_model_name_or_path=str(name))
            assert_same(merged_network(folder), expected)


def test_a_half_precision_base_is_merged_in_float32_and_then_cast(tmp_path):
    base = shutil.copytree(DEMO, tmp_path / "half")
    state = {name: value.half() for name, value in load_file(base / "model.safetensors").items()}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    folder = write_adapter(tmp_path / "adapter", base=str(base))
    halves = load_file(folder / WEIGHTS)
    a, b = (halves[f"{PEFT}{QUERY}.lora_{half}.weight"] for half in "AB")
    expected = state[f"{QUERY}.weight"].float() + b @ a * 2.0
    for dtype in (torch.float32, torch.bfloat16):
        network = load_weights(open_checkpoint(folder), dtype)
        assert torch.equal(network.state_dict()[f"{QUERY}.weight"], expected.to(dtype))


def test_pickled_weights_are_read_without_being_run(tmp_path):
    folder = write_adapter(tmp_path / "adapter")
    expected = merged_network(folder).state_dict()
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    assert_same(merged_network(folder), expected)


LAYER = "model.language_model.encoder.layers.0"
BLOCK = "model.vision_tower.blocks.0.0.spatial_block"
REFUSED = {
    # name: (state beside the pair of QUERY, settings, what the sentence says)
    "DoRA by its config": ({}, {"use_dora": True}, "asks for DoRA"),
    "DoRA by its weights": (
        {f"{PEFT}{QUERY}.lora_magnitude_vector": torch.ones(WIDTH)},
        {},
        "q_proj.lora_magnitude_vector, DoRA's magnitudes",
    ),
    "another kind of adapter": ({}, {"peft_type": "IA3"}, "is an adapter of the kind 'IA3'"),
    "a switch that is not known": ({}, {"use_tomorrow": 3}, "asks for use_tomorrow 3"),
    "a base that was changed first": (
        {},
        {"init_lora_weights": "pissa_niter_4"},
        "training began with 'pissa_niter_4' (init_lora_weights)",
    ),
    "LoRA on the embedding": (
        {f"{PEFT}model.language_model.shared.lora_embedding_A": torch.ones(RANK, 9)},
        {},
        "shared.lora_embedding_A, LoRA on an embedding",
    ),
    "LoRA on the embedding as a matrix": (
        pair("model.language_model.shared", ((RANK, WIDTH), (1984, RANK))),
        {},
        "shared, the input embedding",
    ),
    "tokens that were trained": (
        {f"{PEFT}model.language_model.shared.token_adapter.trainable_tokens_delta": torch.ones(2)},
        {},
        "trainable_tokens_delta, trained tokens",
    ),
    "an embedding of its own": (
        {f"{PEFT}{EMBEDDING}": torch.zeros(1984, WIDTH)},
        {},
        "changes base_model.model.model.language_model.shared.weight, the input embedding",
    ),
    "more tokens than the base has": (
        {f"{PEFT}{EMBEDDING}": torch.zeros(1990, WIDTH)},
        {},
        f"shared.weight of the shape (1990, {WIDTH}), and it has the shape (1984, {WIDTH})",
    ),
    "a layer that the base does not have": (
        pair(QUERY.replace("layers.0", "layers.40")),
        {},
        "layers.40.self_attn.q_proj.weight, which demo does not have",
    ),
    "a key that means nothing": (
        {"something.else": torch.ones(1)},
        {},
        "changes something.else, which demo does not have",
    ),
    "one half without the other": (
        {f"{PEFT}{LAYER}.fc1.lora_A.weight": torch.ones(RANK, WIDTH)},
        {},
        "lacks base_model.model.model.language_model.encoder.layers.0.fc1.lora_B.weight",
    ),
    "shapes of another base": (
        pair(f"{LAYER}.self_attn.k_proj", ((RANK, 768), (768, RANK))),
        {},
        "halves of the shapes (2, 768) and (768, 2) for base_model",
    ),
    "another rank than its config": ({}, {"r": 8}, "has rank 2 for base_model.model.model"),
    "a pattern that is none": ({}, {"rank_pattern": {"(": 3}}, "r and rank_pattern in"),
    "an alpha that is no number": ({}, {"lora_alpha": "much"}, "lora_alpha and alpha_pattern in"),
    "numbers that are not finite": (
        {f"{PEFT}{LAYER}.fc1.bias": torch.full((768,), torch.nan)},
        {},
        "makes model.language_model.encoder.layers.0.fc1.bias hold numbers that are not finite",
    ),
    "quantised weights": (
        {f"{PEFT}{LAYER}.fc1.bias": torch.ones(768, dtype=torch.int8)},
        {},
        "fc1.bias in torch.int8",
    ),
    "two adapters in one file": (
        {f"{PEFT}{QUERY}.lora_A.other.weight": torch.ones(RANK, WIDTH)},
        {},
        "q_proj.lora_A.weight twice",
    ),
    "one weight by two names": (
        {f"{LAYER}.fc1.bias": torch.ones(768), f"{PEFT}{LAYER}.fc1.bias": torch.zeros(768)},
        {},
        "fc1.bias twice",
    ),
    "a depthwise convolution": (
        pair(f"{BLOCK}.conv1", ((32, 32, 3, 3), (32, 1, 1, 1))),
        {"rank_pattern": {"conv1": 32}},
        "conv1, a depthwise convolution",
    ),
    "a bias where there is none": (
        {
            **pair("lm_head", ((RANK, WIDTH), (1984, RANK))),
            f"{PEFT}lm_head.lora_B.bias": torch.ones(1984),
        },
        {},
        "adds to the bias of base_model.model.lm_head",
    ),
}


def refusal(folder):
    """The one sentence that an adapter is refused with; it names the adapter."""
    with pytest.raises(CheckpointError) as caught:
        merged_network(folder)
    sentence = str(caught.value)
    assert str(folder) in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(tmp_path, case):
    state, settings, words = REFUSED[case]
    folder = write_adapter(tmp_path / "adapter", {**pair(), **state}, **settings)
    assert words in refusal(folder)


def test_an_adapter_that_changes_nothing_is_no_adapter(tmp_path):
    state = {f"{PEFT}{EMBEDDING}": reference_model(DEMO).state_dict()[EMBEDDING].clone()}
    assert "changes nothing of demo" in refusal(write_adapter(tmp_path / "adapter", state))


def test_files_beside_an_adapter_must_say_what_its_base_says(tmp_path):
    folder = write_adapter(tmp_path / "adapter")
    for name in ("tokenizer.json", "added_tokens.json", "preprocessor_config.json"):
        shutil.copy(DEMO / name, folder)
    merged_network(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    token = dict(content["added_tokens"][-1], content="<dial>", id=1925)
    content["added_tokens"].append(token)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert "has '<dial>' as token 1925, and that of demo, into which" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    content = json.loads((folder / "preprocessor_config.json").read_text())
    content["size"] = {"height": 64, "width": 64}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    assert "prepares images in another way than demo" in refusal(folder)


def test_where_a_base_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = write_adapter(tmp_path / "adapters" / "cats", base=str(DEMO))
    assert resolve(folder).base.folder == DEMO
    change_config(folder, base_model_name_or_path="demo")
    assert resolve(folder).base == resolve("demo")
    change_config(folder, base_model_name_or_path="/content/base", revision=None)
    assert (
        f"{folder} holds an adapter of /content/base, which cannot be had (The checkpoint folder "
        "/content/base does not exist; "
    ) in refusal(folder)
    beside = shutil.copytree(DEMO, folder.parent / "base")
    assert resolve(folder).base.folder == beside
    # What it names is at hand, so a folder that happens to be called so is not taken for it.
    change_config(folder, base_model_name_or_path="demo")
    assert resolve(folder).base == resolve("demo")
    change_config(folder, base_model_name_or_path="/content/base")
    inside = shutil.copytree(DEMO, folder / "base")
    assert resolve(folder).base.folder == inside
    assert f"is merged into {inside}." in open_checkpoint(folder).notes[0]
    assert "names its base as /content/base" in open_checkpoint(folder).notes[1]


MISSING = {
    "a published name": (
        {"base_model_name_or_path": "microsoft/Florence-2-base"},
        "an adapter of Florence-2-base, which cannot be had (Florence-2-base is not on this",
    ),
    "another revision of it": (
        {"base_model_name_or_path": "microsoft/Florence-2-base", "revision": "refs/pr/6"},
        "an adapter of microsoft/Florence-2-base@refs/pr/6, which cannot be had",
    ),
    "nothing": ({"base_model_name_or_path": None}, "must name the adapter's base, and is None"),
    "an adapter": ({"base_model_name_or_path": "OTHER"}, "is an adapter itself; put its full"),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_base_that_cannot_be_had(tmp_path, monkeypatch, case):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FLORENCE2_CACHE", str(tmp_path / "cache"))
    changes, words = MISSING[case]
    folder = write_adapter(tmp_path / "adapters" / "cats")
    other = write_adapter(tmp_path / "other")
    change_config(folder, **{k: str(other) if v == "OTHER" else v for k, v in changes.items()})
    assert words in refusal(folder)


def test_the_base_at_hand_is_taken_unless_another_one_is_named(tmp_path):
    base = open_checkpoint("demo")
    folder = write_adapter(tmp_path / "cats", base="/content/base", revision="abc")
    opened = open_adapter(folder, base)
    assert (opened.name, opened.folder) == (str(folder), base.folder)
    assert "names its base as /content/base" in opened.notes[1]
    named = dataclasses.replace(base, name="Florence-2-base")
    change_config(folder, base_model_name_or_path="florence-community/Florence-2-large")
    with pytest.raises(CheckpointError, match="was made for florence-community/Florence-2-large"):
        open_adapter(folder, named)
    change_config(folder, base_model_name_or_path="florence-community/Florence-2-base")
    assert len(open_adapter(folder, named).notes) == 1
    with pytest.raises(CheckpointError, match="holds a whole checkpoint; load that as the model"):
        open_adapter(DEMO, base)
    with pytest.raises(CheckpointError, match="is an adapter; name the base"):
        open_adapter(folder, opened)


def test_no_two_of_base_and_adapters_are_taken_for_one_another(tmp_path):
    folder = write_adapter(tmp_path / "cats")
    kinds = {
        "base": open_checkpoint("demo"),
        "adapter": open_checkpoint(folder),
        "the same elsewhere": open_checkpoint(shutil.copytree(folder, tmp_path / "copy")),
        "another one": open_checkpoint(write_adapter(tmp_path / "dogs", pair(seed=1))),
        "counted twice": open_checkpoint(write_adapter(tmp_path / "twice", lora_alpha=8)),
    }
    for key in (lambda one: one.identity, lambda one: one.source_hash()):
        keys = {name: key(one) for name, one in kinds.items()}
        assert keys.pop("the same elsewhere") == keys["adapter"]
        assert len(set(keys.values())) == len(keys)


def test_an_adapter_is_converted_after_it_is_merged(has_openvino, adapters, tmp_path):
    folder, _ = adapters("the public recipe", **MERGED["the public recipe"])
    kept = Conversions(tmp_path / "cache")
    converted = kept.folder_for(open_checkpoint(folder), "fp32")
    assert not (converted / CONFIG).exists()
    expected = our_tokens(folder)
    assert our_tokens(folder, "openvino", cache_dir=tmp_path / "cache") == expected
    assert our_tokens(converted, "openvino") == expected

"""Several adapters of one checkpoint in one engine: shared weights, shared features, no mixing."""

from __future__ import annotations

import pytest
import torch
from adapter_tools import QUERY, RANK, pair, write_adapter
from engine_tools import CountingRuntime, captions, codes, essence, picture
from openvino_tools import write_small_checkpoint

from florence2 import Ask, Florence2
from florence2.checkpoint import checkpoint
from florence2.engine.answering import answer_all
from florence2.engine.engine import Engine
from florence2.errors import CheckpointError, RequestError

WIDTH, FFN = 32, 128
TOWER = "model.vision_tower.blocks.1.0.channel_block.ffn.fc2"
FC2 = "model.language_model.decoder.layers.1.fc2"
HEAD = "lm_head"
SHAPES = {
    QUERY: ((RANK, WIDTH), (WIDTH, RANK)),
    FC2: ((RANK, FFN), (WIDTH, RANK)),
    TOWER: ((RANK, FFN), (WIDTH, RANK)),
    HEAD: ((RANK, WIDTH), (1984, RANK)),
}
CHANGED = {"cats": (QUERY, FC2), "dogs": (FC2, HEAD), "towers": (TOWER,)}
NAMES = (None, *CHANGED)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_small_checkpoint(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """A few adapters that change much: alpha 60 of rank 2."""
    out = tmp_path_factory.mktemp("adapters")
    found = {}
    for seed, (name, modules) in enumerate(CHANGED.items()):
        state = {}
        for module in modules:
            state |= pair(module, SHAPES[module], seed)
        found[name] = write_adapter(out / name, state, base=str(base), lora_alpha=60)
    return found


@pytest.fixture(scope="module")
def alone(base, folders):
    """The answers of the base and of each adapter, loaded by itself."""
    found = {}
    for name, folder in {None: base, **folders}.items():
        model = Florence2.load(folder, "cpu", "torch", precision="fp32")
        found[name] = [essence(result) for result in model.run_many(asks_of(None))]
        model.close()
    return found


@pytest.fixture(scope="module")
def model(base, folders):
    return Florence2.load(base, "cpu", "torch", precision="fp32", adapters=folders)


SEEDS = range(3)


def asks_of(adapter, **search):
    return captions(*SEEDS, adapter=adapter, max_new_tokens=12, **search)


def test_each_answers_as_it_does_alone(model, alone):
    assert model.adapters == tuple(CHANGED)
    assert len({tuple(tokens for _, tokens, *_ in one) for one in alone.values()}) == len(NAMES)
    for name in NAMES:
        assert [essence(one) for one in model.run_many(asks_of(name))] == alone[name]
    assert [essence(one) for one in model.run_many(asks_of(model.name))] == alone[None]


def counting(model):
    """An engine with the model's weights on runtimes that count."""
    own = model.engine
    runtimes = {name: CountingRuntime(own.model_of(name).runtime) for name in NAMES}
    engine = Engine(
        own.checkpoint, runtimes[None], image_batch=4, prompt_batch=8, cache_bytes=2**24
    )
    for name in CHANGED:
        one = own.model_of(name)
        has_own_tower = one.base is None
        engine.add_adapter(name, one.checkpoint, runtimes[name], has_own_tower=has_own_tower)
    return engine, runtimes


def test_asks_of_different_adapters_share_no_batch(model, alone):
    engine, runtimes = counting(model)
    mixed = [ask for asks in zip(*map(asks_of, NAMES), strict=True) for ask in asks]
    found = [essence(one) for one in answer_all(engine, mixed)]
    for place, name in enumerate(NAMES):
        assert found[place :: len(NAMES)] == alone[name]
        assert runtimes[name].batches == [len(SEEDS)]


def test_images_are_encoded_once_for_all_that_leave_the_tower_as_it_is(model):
    engine, runtimes = counting(model)
    for name in NAMES:
        answer_all(engine, asks_of(name))
    counted = {name: runtime.num_images for name, runtime in runtimes.items()}
    assert counted == {None: 3, "cats": 0, "dogs": 0, "towers": 3}
    # By content and by tower: neither is taken for the other from the cache.
    for name in NAMES:
        answer_all(engine, asks_of(name))
    assert {name: runtime.num_images for name, runtime in runtimes.items()} == counted


def test_features_of_another_tower_are_refused(model):
    shared, own = model.encode(picture(0)), model.encode(picture(0), adapter="towers")
    assert not torch.equal(shared.features, own.features)
    asks = [
        Ask(image, "<CAPTION>", adapter=name, max_new_tokens=4)
        for image in (shared, own)
        for name in NAMES
    ]
    refused = "bad_request"
    assert codes(model.run_many(asks)) == [*[None] * 3, refused, *[refused] * 3, None]


def pointers(network):
    return {name: value.data_ptr() for name, value in network.state_dict().items()}


ATTENTION = QUERY.removesuffix("q_proj")


def test_unchanged_weights_are_in_memory_once(model):
    engine = model.engine
    base, dtype_bytes = pointers(engine.runtime.network), 4
    expected = {
        # The three input projections of an attention are one matrix, with one bias.
        "cats": {f"{ATTENTION}{n}_proj.{end}" for n in "qkv" for end in ("weight", "bias")}
        | {f"{FC2}.weight"},
        "dogs": {f"{FC2}.weight", f"{HEAD}.weight"},
        "towers": {f"{TOWER}.weight"},
    }
    for name, changed in expected.items():
        runtime = engine.model_of(name).runtime
        own = pointers(runtime.network)
        assert {weight for weight in base if own[weight] != base[weight]} == changed
        state = runtime.network.state_dict()
        num_bytes = sum(state[weight].numel() * dtype_bytes for weight in changed)
        assert runtime.weight_bytes == num_bytes
    runtimes = [engine.model_of(name).runtime for name in NAMES]
    total = sum(runtime.weight_bytes for runtime in runtimes)
    assert engine.memory_bytes - engine.cache.num_bytes == total
    fused = [
        runtime.network.get_submodule(ATTENTION.removesuffix(".")).fused[0].data_ptr()
        for runtime in runtimes
    ]
    assert fused[0] == fused[2] == fused[3] != fused[1]


def test_no_weight_is_copied_to_be_shared(model, monkeypatch):
    def refuse(*_):
        raise AssertionError("A copy of a weight, even one that is dropped at once, takes memory.")

    monkeypatch.setattr(torch.Tensor, "__deepcopy__", refuse)
    network = model.engine.runtime.network
    assert pointers(network.sharing({})) == pointers(network)


def test_parked_weights_come_back_shared(base, folders, alone):
    model = Florence2.load(base, "cpu", "torch", precision="fp32", adapters=folders)
    before = [
        len({*pointers(model.engine.model_of(name).runtime.network).values()}) for name in NAMES
    ]
    model.engine.park()
    assert model.engine.is_parked
    for name in NAMES:
        assert [essence(one) for one in model.run_many(asks_of(name))] == alone[name]
    networks = [model.engine.model_of(name).runtime.network for name in NAMES]
    assert [len({*pointers(network).values()}) for network in networks] == before
    first = pointers(networks[0])
    assert sum(first[name] == other for name, other in pointers(networks[3]).items()) > 300
    model.close()
    assert model.engine.memory_bytes == 0
    with pytest.raises(CheckpointError, match="was closed answers nothing more"):
        model.run("<CAPTION>", picture(0), adapter="cats")


@pytest.mark.parametrize("name", ["cat", "", 5, ["cats"]])
def test_a_name_that_there_is_not(model, name):
    with pytest.raises(RequestError) as caught:
        model.run("<CAPTION>", picture(0), adapter=name)
    sentence = str(caught.value)
    assert "Unknown adapter" in sentence
    assert sentence.endswith("cats, dogs, towers.")
    [failed, answered] = model.run_many(
        [Ask(picture(0), "<CAPTION>", adapter=one, max_new_tokens=4) for one in (name, "cats")]
    )
    assert (failed.code, answered.task) == ("bad_request", "<CAPTION>")


@pytest.mark.parametrize("name", ["", " ", 3])
def test_names_that_no_adapter_can_have(base, folders, name):
    with pytest.raises(CheckpointError, match="An adapter has a name of its own"):
        Florence2.load(base, "cpu", adapters={name: folders["cats"]})


def test_what_is_loaded_is_noted(model, folders):
    for name, folder in folders.items():
        assert any(
            note.startswith(f"Adapter {name}: The adapter in {folder} (adapter_model.safetensors")
            for note in model.notes
        )


QUANTISED = {
    # precision: the adapters that hold all weights once more
    "bf16": [],
    "int8": [*CHANGED],
}


@pytest.mark.parametrize(("precision", "held"), QUANTISED.items(), ids=QUANTISED)
def test_the_base_is_read_once_for_all(base, folders, monkeypatch, precision, held):
    read, read_folders = checkpoint.read_weights, []
    monkeypatch.setattr(
        checkpoint, "read_weights", lambda folder: read_folders.append(folder) or read(folder)
    )
    monkeypatch.setattr("florence2.runtimes.quantization.cpu_computes_bf16", lambda: True)
    both = Florence2.load(base, "cpu", "torch", precision=precision, adapters=folders)
    assert read_folders == [base]
    assert [note.split(": ")[0] for note in both.notes if "once more" in note] == [
        f"Adapter {name}" for name in held
    ]
    assert [name for name in CHANGED if both.engine.model_of(name).base is None] == ["towers"]
    solo = Florence2.load(folders["dogs"], "cpu", "torch", precision=precision)
    found = [essence(one) for one in both.run_many(asks_of("dogs"))]
    assert found == [essence(one) for one in solo.run_many(asks_of(None))]


@pytest.mark.slow
def test_another_runtime_holds_each_as_a_whole_and_says_so(
    has_openvino, base, folders, tmp_path, monkeypatch
):
    chosen = {name: folders[name] for name in ("cats", "towers")}
    model = Florence2.load(
        base, "cpu", "openvino", precision="fp32", cache_dir=tmp_path, adapters=chosen
    )
    exact = Florence2.load(base, "cpu", "torch", precision="fp32", adapters=chosen)
    for name in (None, *chosen):
        found, expected = (
            [one.token_ids for one in either.run_many(asks_of(name))] for either in (model, exact)
        )
        assert found == expected
    assert sum("holds all weights of this adapter once more" in note for note in model.notes) == 2
    assert [name for name in chosen if model.engine.model_of(name).base is None] == ["towers"]

    def refuse(folder):
        raise AssertionError(f"{folder} is read, though all of it is converted")

    monkeypatch.setattr(checkpoint, "read_weights", refuse)
    Florence2.load(base, "cpu", "openvino", precision="fp32", cache_dir=tmp_path, adapters=chosen)

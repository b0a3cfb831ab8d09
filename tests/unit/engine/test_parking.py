"""Weights leave the device and come back without a change; closed, a checkpoint says so."""

from __future__ import annotations

import pytest
import torch
from engine_tools import ask, assert_close, essence, picture

from florence2 import Florence2
from florence2.errors import CheckpointError


@pytest.fixture
def own_model(checkpoint_folder):
    return Florence2.load(checkpoint_folder, device="cpu")


def test_parking_forgets_the_features_and_the_answers_stay_the_same(own_model):
    engine = own_model.engine
    asks = [ask(picture(seed), "<OD>") for seed in (1, 2)]
    before = own_model.run_many(asks)
    assert engine.cache.num_bytes > 0
    for _ in range(2):
        engine.park()
        assert engine.is_parked
        assert engine.cache.num_bytes == 0
    for _ in range(2):
        engine.resume()
        assert not engine.is_parked
    for answer, earlier in zip(own_model.run_many(asks), before, strict=True):
        assert essence(answer) == essence(earlier)


@pytest.mark.parametrize("is_encoded", [False, True])
def test_a_parked_checkpoint_comes_back_by_itself(own_model, is_encoded):
    image = own_model.encode(picture(3)) if is_encoded else picture(3)
    before = own_model.run("<CAPTION>", image, max_new_tokens=8)
    own_model.engine.park()
    assert_close(own_model.run("<CAPTION>", image, max_new_tokens=8), before)
    assert not own_model.engine.is_parked


def test_the_memory_counts_each_weight_once_and_the_features(own_model):
    engine = own_model.engine
    network = engine.runtime.network
    assert network.is_tied
    weights = sum(one.numel() * 4 for one in network.state_dict(keep_vars=True).values())
    engine.cache.clear()
    assert 0 < engine.memory_bytes < weights
    encoded = own_model.encode(picture(1))
    assert engine.memory_bytes == engine.runtime.weight_bytes + encoded.num_bytes


def test_closed_it_takes_no_memory_and_refuses_in_a_sentence(own_model):
    encoded = own_model.encode(picture(1))
    own_model.close()
    own_model.close()
    assert own_model.engine.memory_bytes == 0
    assert all(one.device.type == "meta" for one in own_model.engine.runtime.network.parameters())
    for question in (
        lambda: own_model.run("<CAPTION>", picture(1)),
        lambda: own_model.run("<CAPTION>", encoded),
        lambda: own_model.encode(picture(1)),
        lambda: own_model.run_many([ask(picture(2), "<OD>")]),
        own_model.engine.resume,
    ):
        with pytest.raises(CheckpointError, match="was closed") as caught:
            question()
        assert "\n" not in str(caught.value)
    own_model.engine.park()
    assert not own_model.engine.is_parked


@pytest.mark.gpu
def test_a_parked_checkpoint_leaves_the_gpu_and_comes_back_the_same(checkpoint_folder):
    model = Florence2.load(checkpoint_folder, device="cuda")
    before = model.run("<OD>", picture(1), max_new_tokens=16)
    on_device = torch.cuda.memory_allocated()
    model.engine.park()
    assert model.engine.memory_bytes == 0
    assert torch.cuda.memory_allocated() < on_device / 2
    assert essence(model.run("<OD>", picture(1), max_new_tokens=16)) == essence(before)
    assert model.engine.memory_bytes > 0

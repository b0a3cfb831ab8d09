"""An engine is parked and comes back, is closed, or loses its device, and says so."""

from __future__ import annotations

import logging

import pytest
from engine_tools import TORCH_ONLY, ask, assert_close, captions, essence, picture

from florence2 import Florence2
from florence2.errors import CheckpointError, DeviceLostError


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


# torch's network is looked into.
@TORCH_ONLY
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
    if own_model.runtime == "torch":
        weights = own_model.engine.runtime.network.parameters()
        assert all(one.device.type == "meta" for one in weights)
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


# OpenVINO's weights do not move.
@TORCH_ONLY
def test_weights_that_were_parked_in_part_come_back(own_model, monkeypatch):
    before = own_model.run_many([ask(picture(1), "<OD>")])
    runtime = own_model.engine.runtime

    def park_in_part():
        runtime.network.model.vision_tower.to("meta")
        raise MemoryError("half of it is gone")

    whole = {name: value.clone() for name, value in runtime.network.state_dict().items()}
    monkeypatch.setattr(runtime, "park", park_in_part)
    monkeypatch.setattr(
        runtime, "resume", lambda: runtime.network.load_state_dict(whole, assign=True)
    )
    with pytest.raises(MemoryError):
        own_model.engine.park()
    [answer] = own_model.run_many([ask(picture(1), "<OD>")])
    assert_close(answer, before[0])


ASSERT = (
    "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously "
    "reported at some other API call."
)


BATCHES = 2, 4


def fails_in(engine, work):
    with pytest.raises(DeviceLostError) as caught:
        work(engine)
    return caught.value


def lose_while_encoding(engine):
    engine.runtime.lost = ASSERT
    engine.encode([picture(1)])


def lose_while_decoding(engine):
    [image] = engine.encode([picture(1)])
    engine.runtime.lost = ASSERT
    Florence2(engine).run("<CAPTION>", image)


def lose_while_freeing_memory(engine):
    """An error of before shows at whatever is called next."""
    runtime = engine.runtime
    [image] = engine.encode([picture(1)])
    runtime.fail_above = 0

    def free_memory():
        runtime.lost = ASSERT
        runtime.check_device()

    runtime.free_memory = free_memory
    Florence2(engine).run("<CAPTION>", image)


def lose_while_parking(engine):
    engine.runtime.lost = ASSERT
    engine.runtime.park = engine.runtime.check_device
    engine.park()


@pytest.mark.parametrize(
    "lose",
    [lose_while_encoding, lose_while_decoding, lose_while_freeing_memory, lose_while_parking],
)
def test_a_device_that_failed_for_good_is_said_then_and_for_every_later_call(engine, lose, caplog):
    assert not engine.is_lost
    with caplog.at_level(logging.ERROR):
        first = fails_in(engine, lose)
    assert engine.is_lost
    assert "device-side assert triggered" in str(first)
    assert "\n" not in str(first)
    assert "device-side assert triggered" in caplog.text
    for again in (
        lambda engine: engine.encode([picture(2)]),
        lambda engine: Florence2(engine).run("<CAPTION>", picture(2)),
        lambda engine: engine.park(),
        lambda engine: engine.resume(),
    ):
        assert str(fails_in(engine, again)) == str(first)


def test_an_error_that_passes_is_not_the_end(engine, runtime):
    runtime.lost = "mat1 and mat2 shapes cannot be multiplied"
    runtime.is_lost = lambda error: False
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        engine.encode([picture(1)])
    assert not engine.is_lost
    runtime.lost = None
    assert engine.encode([picture(1)])


def test_no_answer_of_a_list_is_lost_silently(engine, runtime):
    """The images of the first pass were fine, and nobody is told that all is well."""
    encode = runtime.encode_bytes

    def fails_at_the_second(images, table):
        if runtime.image_batches:
            runtime.lost = ASSERT
        return encode(images, table)

    runtime.encode_bytes = fails_at_the_second
    with pytest.raises(DeviceLostError):
        Florence2(engine).run_many(captions(0, 1, 2, 3, max_new_tokens=3))


def test_closing_an_engine_whose_device_failed_raises_nothing(engine, runtime, caplog):
    fails_in(engine, lose_while_encoding)
    runtime.close = runtime.check_device
    with caplog.at_level(logging.WARNING):
        engine.close()
    assert "could not be freed" in caplog.text

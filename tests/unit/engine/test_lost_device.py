"""An error that a device does not get over is said once and for all."""

from __future__ import annotations

import logging

import pytest
import torch
from engine_tools import captions, picture

from florence2 import Florence2
from florence2.errors import DeviceLostError
from florence2.runtimes.torch import TorchRuntime

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


TRIALS = {
    "it answers": (RuntimeError("CUDA error: invalid argument"), None, False),
    "it answers nothing": (RuntimeError(ASSERT), RuntimeError(ASSERT), True),
    "an error that names no GPU": (RuntimeError("shape"), RuntimeError(ASSERT), True),
    "it is full": (RuntimeError(ASSERT), torch.OutOfMemoryError("full"), False),
    "it is full, as the driver says it": (
        RuntimeError(ASSERT),
        RuntimeError("CUDA error: out of memory"),
        False,
    ),
    "an error of Python": (ValueError("a number"), RuntimeError(ASSERT), False),
}


@pytest.mark.parametrize(("error", "answer", "is_lost"), TRIALS.values(), ids=TRIALS)
def test_a_gpu_is_tried_after_an_error(monkeypatch, error, answer, is_lost):
    runtime = object.__new__(TorchRuntime)
    runtime._device = torch.device("cuda")
    trials = []

    def zeros(*_, device):
        trials.append(device)
        if answer is not None:
            raise answer
        return torch.ones(1)

    monkeypatch.setattr("florence2.runtimes.torch.torch.zeros", zeros)
    assert runtime.is_lost(error) is is_lost
    assert len(trials) == isinstance(error, RuntimeError)


def test_a_cpu_is_never_lost(model):
    assert not model.engine.runtime.is_lost(RuntimeError(ASSERT))


def test_time_on_a_cpu_goes_on(model):
    runtime = model.engine.runtime
    first = runtime.mark()
    second = runtime.mark()
    assert second.seconds_since(first) >= 0
    assert first.seconds_since(first) == 0

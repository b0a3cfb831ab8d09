"""A checkpoint is loaded in a precision that it is sane in, and recorded where that is right."""

from __future__ import annotations

import logging
import math
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from recorders import CPU, TapingRecorder
from safetensors.torch import load_file, save_file

from florence2 import Florence2
from florence2.checkpoint.checkpoint import load_weights, open_checkpoint
from florence2.engine import checks, loading
from florence2.engine.checks import (
    TOLERANCE,
    check_against_fp32,
    check_recordings,
    check_where_it_fits,
    error_against_fp32,
    float32_bytes,
)
from florence2.engine.engine import Engine
from florence2.engine.loading import load_engine
from florence2.errors import CheckpointError, PrecisionError
from florence2.network.config import tiny_config
from florence2.network.florence import Florence2Network
from florence2.runtimes.cuda_graphs import GraphRunner
from florence2.runtimes.device import PRECISIONS
from florence2.runtimes.torch import TorchRuntime

PIXELS = np.random.default_rng(2).standard_normal((1, 3, 64, 64), dtype=np.float32)
PROJECTION = "model.multi_modal_projector.image_projection.weight"


def with_projection(source, folder, change):
    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    state = {name: value.float() for name, value in load_file(path).items()}
    state[PROJECTION] = change(state[PROJECTION])
    save_file(state, str(path), metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def overflowing_folder(checkpoint_folder, tmp_path_factory):
    """Its projection's products are beyond 65504, the largest number of half precision."""
    folder = tmp_path_factory.mktemp("overflowing") / "checkpoint"
    return with_projection(checkpoint_folder, folder, lambda weight: weight * 1e6)


@pytest.fixture(scope="module")
def broken_folder(checkpoint_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken") / "checkpoint"
    return with_projection(checkpoint_folder, folder, lambda weight: weight * math.nan)


@pytest.fixture
def half_precision(monkeypatch):
    """The choice of a GPU without bf16, on this machine's CPU."""
    monkeypatch.setattr(
        loading,
        "choose_precision",
        lambda name, device, d_model: "fp16" if name == "auto" else name,
    )


def engine_of(folder, precision):
    return load_engine(open_checkpoint(folder), CPU, precision, cache_bytes=2**20)


def test_auto_falls_back_to_float32_with_a_warning(half_precision, overflowing_folder, caplog):
    with caplog.at_level(logging.WARNING):
        engine = engine_of(overflowing_folder, "auto")
    assert engine.runtime.precision == "fp32"
    assert engine.runtime.network.dtype == torch.float32
    [warning] = caplog.messages
    assert "does not answer in fp16" in warning
    assert warning.endswith("loaded in fp32 instead.")


def test_auto_stays_where_the_checkpoint_answers(half_precision, checkpoint_folder, caplog):
    with caplog.at_level(logging.WARNING):
        assert engine_of(checkpoint_folder, "auto").runtime.precision == "fp16"
    assert caplog.messages == []


def test_a_precision_asked_for_by_name_is_an_error(half_precision, overflowing_folder):
    with pytest.raises(PrecisionError, match=r"does not answer in fp16.* or use precision fp32"):
        engine_of(overflowing_folder, "fp16")


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_what_is_broken_in_float32_too_is_not_the_precisions_fault(
    half_precision, broken_folder, precision
):
    with pytest.raises(CheckpointError, match=r"in fp32: .*; download it again\.$") as caught:
        engine_of(broken_folder, precision)
    assert not isinstance(caught.value, PrecisionError)


def test_the_loaded_model_reports_the_precision_in_use(half_precision, overflowing_folder):
    model = Florence2.load(overflowing_folder, device="cpu")
    assert model.precision == "fp32"
    assert "fp32" in model.encode(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()).key


def runtime_of(checkpoint, precision):
    return TorchRuntime(load_weights(checkpoint, PRECISIONS[precision]), CPU, precision)


def test_features_that_are_close_enough_pass(checkpoint_folder):
    checkpoint = open_checkpoint(checkpoint_folder)
    error = check_against_fp32(checkpoint, runtime_of(checkpoint, "bf16"), is_error=True)
    assert 0 < error < TOLERANCE["bf16"]


def test_features_that_are_far_off_are_an_error_or_a_warning(
    checkpoint_folder, monkeypatch, caplog
):
    monkeypatch.setitem(checks.TOLERANCE, "bf16", 1e-6)
    checkpoint = open_checkpoint(checkpoint_folder)
    runtime = runtime_of(checkpoint, "bf16")
    with pytest.raises(PrecisionError, match=r"at most 1e-06 from those in fp32.* and are 0\.0"):
        check_against_fp32(checkpoint, runtime, is_error=True)
    with caplog.at_level(logging.WARNING):
        check_against_fp32(checkpoint, runtime, is_error=False)
    assert "use precision fp32" in caplog.messages[0]


class Room:
    """A device with so much memory free, which nothing is measured on."""

    def __init__(self, free_bytes):
        self._free_bytes = free_bytes

    def free_bytes(self):
        return self._free_bytes

    def peak_bytes(self, work):
        raise NotImplementedError


def out_of_memory(*_):
    raise torch.OutOfMemoryError("no memory left")


CHECKS = {
    # name: (precision, free bytes, check, whether it is made)
    "room enough": ("bf16", 2**40, check_against_fp32, True),
    "no room": ("bf16", 2**10, check_against_fp32, False),
    "memory ends meanwhile": ("bf16", 2**40, out_of_memory, False),
    "nothing to check": ("fp32", 2**40, check_against_fp32, False),
}


@pytest.mark.parametrize(("precision", "free", "check", "is_made"), CHECKS.values(), ids=CHECKS)
def test_a_load_does_not_fail_for_lack_of_room_to_check(
    checkpoint_folder, monkeypatch, precision, free, check, is_made
):
    monkeypatch.setattr(checks, "check_against_fp32", check)
    checkpoint = open_checkpoint(checkpoint_folder)
    runtime = runtime_of(checkpoint, precision)
    assert check_where_it_fits(checkpoint, runtime, Room(free), is_error=True) is is_made


def test_an_engine_that_is_not_taken_frees_its_weights(small_folder, monkeypatch):
    built = []

    def failing(engine):
        built.append(engine)
        raise CheckpointError("no")

    monkeypatch.setattr(loading, "self_test", failing)
    with pytest.raises(CheckpointError, match="no"):
        engine_of(small_folder, "fp32")
    assert built[0].memory_bytes == 0


def tiny_runtime(precision, gain=1.0):
    torch.manual_seed(7)
    network = Florence2Network(tiny_config())
    with torch.no_grad():
        for parameter in network.model.vision_tower.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
        network.model.multi_modal_projector.image_projection.weight.mul_(gain)
    return TorchRuntime(network.to(PRECISIONS[precision]), CPU, precision)


def test_float32_is_no_error_at_all():
    assert error_against_fp32(tiny_runtime("fp32"), PIXELS) == 0.0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_rounding_is_seen_and_within_the_tolerance(precision):
    assert 0 < error_against_fp32(tiny_runtime(precision), PIXELS) < TOLERANCE[precision] / 2


def test_the_error_is_that_of_a_pass_in_float32():
    runtime = tiny_runtime("bf16")
    found = runtime.encode_images(PIXELS).float()
    exact = TorchRuntime(runtime.network, CPU, "fp32").encode_images(PIXELS)
    expected = float((found - exact).norm() / exact.norm())
    assert error_against_fp32(tiny_runtime("bf16"), PIXELS) == pytest.approx(expected, rel=1e-4)


def test_overflow_is_an_infinite_error_in_half_precision_only():
    assert error_against_fp32(tiny_runtime("fp16", gain=1e6), PIXELS) == math.inf
    assert error_against_fp32(tiny_runtime("bf16", gain=1e6), PIXELS) < TOLERANCE["bf16"]


def test_the_network_is_left_as_it_was():
    runtime = tiny_runtime("bf16")
    before = {name: value.clone() for name, value in runtime.network.state_dict().items()}
    error_against_fp32(runtime, PIXELS)
    assert runtime.network.dtype == torch.bfloat16
    for name, value in runtime.network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_room_it_takes_is_that_of_the_vision_weights():
    network = Florence2Network(tiny_config())
    vision = (network.model.vision_tower, network.model.multi_modal_projector)
    values = [value for part in vision for value in part.state_dict().values()]
    assert float32_bytes(network.to(torch.bfloat16)) == sum(4 * value.numel() for value in values)


def test_the_pass_compared_is_one_as_the_engine_makes_it(monkeypatch):
    runtime, inside = tiny_runtime("bf16"), []
    encode, computing = runtime.encode_images, runtime.computing

    @contextmanager
    def noted():
        with computing():
            inside.append("computing")
            yield
            inside.append("done")

    monkeypatch.setattr(runtime, "computing", noted)
    monkeypatch.setattr(runtime, "encode_images", lambda p: (inside.append("pass"), encode(p))[1])
    error_against_fp32(runtime, PIXELS)
    assert inside == ["computing", "pass", "done"]


class Wrong(TapingRecorder):
    """From the n-th recording on, a replay does nothing."""

    def __init__(self, from_recording):
        super().__init__()
        self._right = from_recording

    def record(self, work):
        recording = super().record(work)
        self._right -= 1
        if self._right < 0:
            recording._operations = []
        return recording


class Failing(TapingRecorder):
    """The n-th recording cannot be made."""

    def __init__(self, recording):
        super().__init__()
        self._left = recording

    def record(self, work):
        self._left -= 1
        self.refuse = self._left < 0
        return super().record(work)


def engine_with(folder, recorder):
    checkpoint = open_checkpoint(folder)
    network = load_weights(checkpoint, torch.float32)
    runtime = TorchRuntime(network, torch.device("cpu"), "fp32", GraphRunner(recorder))
    return Engine(checkpoint, runtime, image_batch=2, prompt_batch=8, cache_bytes=2**24)


def test_right_recordings_stay_and_are_used(small_folder, caplog):
    recorder = TapingRecorder()
    engine = engine_with(small_folder, recorder)
    check_recordings(engine, engine.runtime.graphs)
    assert engine.runtime.graphs.is_enabled
    kinds = {key[0] for key in engine.runtime.graphs.keys}
    assert kinds == {"vision", "prompts", "decode"}
    assert "replay" in recorder.events
    assert caplog.messages == []


@pytest.mark.parametrize("recorder", [Wrong(0), Wrong(2), Failing(2)])
def test_a_wrong_or_failing_recording_ends_recording_and_not_the_engine(
    small_folder, caplog, recorder
):
    engine = engine_with(small_folder, recorder)
    with caplog.at_level(logging.WARNING):
        check_recordings(engine, engine.runtime.graphs)
    assert not engine.runtime.graphs.is_enabled
    assert [message[:15] for message in caplog.messages] == ["CUDA graphs are"]
    plain = engine_with(small_folder, None)
    assert answer(engine) == answer(plain)


def answer(engine):
    picture = np.random.default_rng(3).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    return Florence2(engine).run("<OD>", picture, max_new_tokens=64).token_ids

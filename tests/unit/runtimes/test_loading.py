"""A checkpoint is loaded in a precision that it is sane in, and says which."""

from __future__ import annotations

import logging
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from florence2 import Florence2
from florence2.checkpoint.checkpoint import open_checkpoint
from florence2.engine import loading
from florence2.engine.loading import check_against_fp32, check_where_it_fits, load_engine
from florence2.errors import CheckpointError, PrecisionError
from florence2.runtimes.device import PRECISIONS
from florence2.runtimes.torch import TorchRuntime

CPU = torch.device("cpu")
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
    return TorchRuntime(loading.load_weights(checkpoint, PRECISIONS[precision]), CPU, precision)


def test_features_that_are_close_enough_pass(checkpoint_folder):
    checkpoint = open_checkpoint(checkpoint_folder)
    error = check_against_fp32(checkpoint, runtime_of(checkpoint, "bf16"), is_error=True)
    assert 0 < error < loading.TOLERANCE["bf16"]


def test_features_that_are_far_off_are_an_error_or_a_warning(
    checkpoint_folder, monkeypatch, caplog
):
    monkeypatch.setitem(loading.TOLERANCE, "bf16", 1e-6)
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
    monkeypatch.setattr(loading, "check_against_fp32", check)
    checkpoint = open_checkpoint(checkpoint_folder)
    runtime = runtime_of(checkpoint, precision)
    assert check_where_it_fits(checkpoint, runtime, Room(free), is_error=True) is is_made


def test_an_engine_that_is_not_taken_frees_its_weights(checkpoint_folder, monkeypatch):
    built = []

    def failing(engine):
        built.append(engine)
        raise CheckpointError("no")

    monkeypatch.setattr(loading, "self_test", failing)
    with pytest.raises(CheckpointError, match="no"):
        engine_of(checkpoint_folder, "fp32")
    assert built[0].memory_bytes == 0

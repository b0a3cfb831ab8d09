"""Which device and precision are taken, and which errors mean that there is no memory left."""

from __future__ import annotations

import pytest
import torch
from engine_tools import ask, assert_close, picture

from florence2 import Florence2
from florence2.errors import DeviceError
from florence2.runtimes.device import choose_device, choose_precision

NO_MEMORY = {
    "of the GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "of the driver": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
    "of cuBLAS": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "of cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "of the CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    "of numpy": MemoryError("Unable to allocate 3.00 GiB for an array"),
}
OTHER = {
    "a shape": RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    "a kernel": RuntimeError("CUDA error: device-side assert triggered"),
    "another kind": ValueError("CUDA error: out of memory"),
}


@pytest.mark.parametrize("error", NO_MEMORY.values(), ids=NO_MEMORY)
def test_these_errors_mean_that_a_smaller_batch_may_fit(model, error):
    assert model.engine.runtime.is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHER.values(), ids=OTHER)
def test_other_errors_are_faults(model, error):
    assert not model.engine.runtime.is_out_of_memory(error)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:²", "cpu:-1", "", "None", None, 0])
def test_another_device_is_refused_in_a_sentence(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(DeviceError, match="Unknown device"):
        choose_device(name)


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="2 CUDA device"):
        choose_device("cuda:2")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("auto") == torch.device("cuda")


def test_precisions_are_for_devices():
    cpu = torch.device("cpu")
    assert choose_precision("bf16", cpu, 64) == "bf16"
    assert choose_precision("fp32", cpu, 1024) == "fp32"
    with pytest.raises(DeviceError, match="for GPUs"):
        choose_precision("fp16", cpu, 1024)
    with pytest.raises(DeviceError, match="Unknown precision"):
        choose_precision("int8", cpu, 1024)


@pytest.mark.parametrize(
    ("instructions", "d_model", "precision"),
    [
        ({"_is_amx_tile_supported"}, 1024, "bf16"),
        ({"_is_avx512_bf16_supported"}, 768, "bf16"),
        ({"_is_amx_tile_supported"}, 128, "fp32"),
        (set(), 1024, "fp32"),
    ],
    ids=["AMX", "AVX-512 BF16", "a small network", "neither"],
)
def test_a_cpu_takes_bf16_by_itself_where_it_is_faster(
    monkeypatch, instructions, d_model, precision
):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in instructions, raising=False)
    assert choose_precision("auto", torch.device("cpu"), d_model) == precision


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16"), ((6, 1), "fp16")],
    ids=["H100", "A100", "T4", "V100", "P40"],
)
def test_a_gpu_takes_what_it_computes_in_itself(monkeypatch, capability, precision):
    # torch says that all of them "support" bf16, as it counts emulation.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    devices = {torch.device("cuda:1"): capability, torch.device("cuda:0"): (5, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", devices.__getitem__)
    assert choose_precision("auto", torch.device("cuda:1"), 128) == precision


def test_weights_that_were_parked_in_part_come_back(checkpoint_folder, monkeypatch):
    model = Florence2.load(checkpoint_folder, device="cpu")
    before = model.run_many([ask(picture(1), "<OD>")])
    runtime = model.engine.runtime

    def park_in_part():
        runtime.network.model.vision_tower.to("meta")
        raise MemoryError("half of it is gone")

    whole = {name: value.clone() for name, value in runtime.network.state_dict().items()}
    monkeypatch.setattr(runtime, "park", park_in_part)
    monkeypatch.setattr(
        runtime, "resume", lambda: runtime.network.load_state_dict(whole, assign=True)
    )
    with pytest.raises(MemoryError):
        model.engine.park()
    [answer] = model.run_many([ask(picture(1), "<OD>")])
    assert_close(answer, before[0])


def test_answers_do_not_depend_on_how_many_threads_compute(demo):
    asks = [ask(picture(1), "<OD>"), ask(picture(2), "<MORE_DETAILED_CAPTION>")]
    alone = demo.run_many(asks)
    demo.engine.cache.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        shared = demo.run_many(asks)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(shared, alone, strict=True):
        assert_close(one, other)

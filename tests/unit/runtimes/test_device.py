"""Which device and precision are taken, what its errors mean, and why a GPU is missing."""

from __future__ import annotations

import pytest
import torch

from florence2.errors import DeviceError
from florence2.runtimes.device import choose_device, choose_precision, missing_gpu
from florence2.runtimes.torch import TorchRuntime

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


@pytest.mark.parametrize("name", [*NO_MEMORY, *OTHER])
def test_errors_that_mean_that_a_smaller_batch_may_fit_are_told_from_faults(runtime, name):
    error = (NO_MEMORY | OTHER)[name]
    assert runtime.is_out_of_memory(error) == (name in NO_MEMORY)


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
        choose_precision("int4", cpu, 1024)


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


ASSERT = (
    "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously "
    "reported at some other API call."
)
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


def test_a_cpu_is_never_lost(runtime):
    assert not runtime.is_lost(RuntimeError(ASSERT))


def test_time_on_a_cpu_goes_on(runtime):
    first = runtime.mark()
    second = runtime.mark()
    assert second.seconds_since(first) >= 0
    assert first.seconds_since(first) == 0


VERSION, WSL = "proc/driver/nvidia/version", "usr/lib/wsl/lib/libcuda.so.1"
DRIVER = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n"
    "GCC version:  gcc version 12.2.0\n"
)
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU "
    "driver by downloading and installing a new version from the URL: "
    "http://www.nvidia.com/Download/index.aspx"
)
NO_DRIVER = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and "
    "installed a driver from http://www.nvidia.com/Download/index.aspx"
)
NO_GPU = "No CUDA GPUs are available"
UNKNOWN = "CUDA unknown error - this may be due to an incorrectly set up environment.\nMore here"


@pytest.fixture
def clean(monkeypatch):
    """A build for CUDA, no GPU, and no variables of the machine that runs the tests."""
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.fixture
def says(clean, monkeypatch):
    """Makes ``torch.cuda`` refuse with a text."""

    def set_text(text, kind=RuntimeError):
        def refuse():
            raise kind(text)

        monkeypatch.setattr(torch.cuda, "init", refuse)

    set_text(NO_DRIVER)
    return set_text


def plant(root, name, text=""):
    (root / name).parent.mkdir(parents=True)
    (root / name).write_text(text, encoding="utf-8")


SIGNS = {
    # name: (file, its text, variables), the sign; None where nothing tells of a GPU
    "a driver with its version": (VERSION, DRIVER, {}, "NVIDIA driver 535.183.01 is loaded"),
    "a driver of unknown form": (VERSION, "?", {}, "an NVIDIA driver is loaded"),
    "a device without the file": ("dev/nvidia0", "", {}, "there is /dev/nvidia0"),
    "Windows' Linux": (WSL, "", {}, f"there is /{WSL}"),
    "all of a container": (
        None,
        "",
        {"NVIDIA_VISIBLE_DEVICES": "all"},
        "NVIDIA_VISIBLE_DEVICES=all",
    ),
    "one by name": (None, "", {"NVIDIA_VISIBLE_DEVICES": "GPU-1"}, "NVIDIA_VISIBLE_DEVICES=GPU-1"),
    "two by number": (None, "", {"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1"),
    "void": (None, "", {"NVIDIA_VISIBLE_DEVICES": "void"}, None),
    "none": (None, "", {"NVIDIA_VISIBLE_DEVICES": "none"}, None),
    "empty": (None, "", {"NVIDIA_VISIBLE_DEVICES": ""}, None),
    "no device": (None, "", {"CUDA_VISIBLE_DEVICES": "-1"}, None),
    "no device first": (None, "", {"CUDA_VISIBLE_DEVICES": "-1,0"}, None),
    "nothing at all": (None, "", {}, None),
}


@pytest.mark.parametrize(("file", "text", "variables", "sign"), SIGNS.values(), ids=SIGNS)
def test_files_and_variables_let_expect_a_gpu(
    says, tmp_path, monkeypatch, file, text, variables, sign
):
    if file is not None:
        plant(tmp_path, file, text)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = missing_gpu(tmp_path)
    if sign is None:
        assert found is None
    else:
        assert f"({sign})" in found
        assert "NVIDIA_DRIVER_CAPABILITIES" in found


REASONS = {
    # name: (what torch says, the reason)
    "a driver too old": (TOO_OLD, "it knows CUDA 12.2 and would have to know CUDA 13.0; update"),
    "no driver in the container": (NO_DRIVER, "libcuda.so.1"),
    "no device": (NO_GPU, "the driver shows no device"),
    "anything else, shortened": (UNKNOWN, "CUDA unknown error - this may be due to an incorrectly"),
}


@pytest.mark.parametrize(("text", "reason"), REASONS.values(), ids=REASONS)
def test_what_torch_says_is_the_reason_in_one_sentence(says, tmp_path, text, reason):
    plant(tmp_path, VERSION, DRIVER)
    says(text)
    found = missing_gpu(tmp_path)
    assert reason in found
    assert "\n" not in found
    assert "http" not in found
    assert found.endswith(".")


def test_a_driver_too_old_needs_no_other_sign(says, tmp_path):
    says(TOO_OLD)
    assert "the driver is too old" in missing_gpu(tmp_path)


def test_a_cpu_build_is_named_as_the_reason(says, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    says("Torch not compiled with CUDA enabled", AssertionError)
    plant(tmp_path, "dev/nvidia0")
    assert "is built without CUDA" in missing_gpu(tmp_path)


def test_a_gpu_that_a_variable_hides_is_hidden_by_it(says, tmp_path, monkeypatch):
    says(NO_GPU)
    plant(tmp_path, "dev/nvidia0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' hides it" in missing_gpu(tmp_path)


def test_a_gpu_that_torch_sees_is_not_missing(says, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plant(tmp_path, VERSION, DRIVER)
    assert missing_gpu(tmp_path) is None

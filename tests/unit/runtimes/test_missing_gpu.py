"""Where a GPU can be expected and torch sees none, a sentence says what tells of it and why."""

from __future__ import annotations

import pytest
import torch

from florence2.runtimes.device import missing_gpu

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


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """A build for CUDA, no GPU, and no variables of the machine that runs the tests."""
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.fixture
def says(monkeypatch):
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

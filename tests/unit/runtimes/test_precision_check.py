"""Reduced precision is compared with float32 as the same weights compute it."""

from __future__ import annotations

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from florence2.engine.loading import TOLERANCE, error_against_fp32, float32_bytes
from florence2.network.config import tiny_config
from florence2.network.florence import Florence2Network
from florence2.runtimes.device import PRECISIONS
from florence2.runtimes.torch import TorchRuntime

CPU = torch.device("cpu")
PIXELS = np.random.default_rng(2).standard_normal((1, 3, 64, 64), dtype=np.float32)


def runtime_in(precision, gain=1.0):
    torch.manual_seed(7)
    network = Florence2Network(tiny_config())
    with torch.no_grad():
        for parameter in network.model.vision_tower.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
        network.model.multi_modal_projector.image_projection.weight.mul_(gain)
    return TorchRuntime(network.to(PRECISIONS[precision]), CPU, precision)


def test_float32_is_no_error_at_all():
    assert error_against_fp32(runtime_in("fp32"), PIXELS) == 0.0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_rounding_is_seen_and_within_the_tolerance(precision):
    assert 0 < error_against_fp32(runtime_in(precision), PIXELS) < TOLERANCE[precision] / 2


def test_the_error_is_that_of_a_pass_in_float32():
    runtime = runtime_in("bf16")
    found = runtime.encode_images(PIXELS).float()
    exact = TorchRuntime(runtime.network, CPU, "fp32").encode_images(PIXELS)
    expected = float((found - exact).norm() / exact.norm())
    assert error_against_fp32(runtime_in("bf16"), PIXELS) == pytest.approx(expected, rel=1e-4)


def test_overflow_is_an_infinite_error_in_half_precision_only():
    assert error_against_fp32(runtime_in("fp16", gain=1e6), PIXELS) == math.inf
    assert error_against_fp32(runtime_in("bf16", gain=1e6), PIXELS) < TOLERANCE["bf16"]


def test_the_network_is_left_as_it_was():
    runtime = runtime_in("bf16")
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
    runtime, inside = runtime_in("bf16"), []
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

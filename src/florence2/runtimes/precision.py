"""How far reduced precision is from float32, for the network as it was loaded."""

from __future__ import annotations

import math
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from florence2.network.florence import Florence2Network
from florence2.runtimes.base import Pixels
from florence2.runtimes.device_pixels import upload
from florence2.runtimes.numerics import computing
from florence2.runtimes.torch import TorchRuntime

TOLERANCE: Final = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1}
"""The largest sane error of the visual tokens: several times what rounding alone makes."""

_VISION: Final = ("network.model.vision_tower.", "network.model.multi_modal_projector.")


class _Vision(nn.Module):
    """``encode_images`` as the forward pass of a module, which ``functional_call`` asks for."""

    def __init__(self, network: Florence2Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network.encode_images(pixels)


@torch.inference_mode()
def error_against_fp32(runtime: TorchRuntime, pixels: Pixels) -> float:
    """||f - f32|| / ||f32|| of the visual tokens of ``pixels`` [B, 3, H, W].

    ``f`` is what the runtime gives, ``f32`` the same weights computed with in float32 on the same
    device; infinity where either is not finite. Costs one pass in float32 and room for the vision
    tower's weights in float32 (``float32_bytes``) for that long. Nothing else may use the network
    meanwhile.
    """
    with runtime.computing():
        found = runtime.encode_images(pixels).float()
    weights = {
        name: value.float()
        for name, value in _Vision(runtime.network).state_dict().items()
        if name.startswith(_VISION)
    }
    on_device = upload(pixels, runtime.network.device)
    with computing(on_device.device.type, "fp32"):
        exact = cast(Tensor, functional_call(_Vision(runtime.network), weights, (on_device,)))
    error = float((found - exact).norm() / exact.norm())
    return error if math.isfinite(error) else math.inf


def float32_bytes(network: Florence2Network) -> int:
    """What the weights of the vision tower and its projector take in float32."""
    state = _Vision(network).state_dict()
    return sum(4 * value.numel() for name, value in state.items() if name.startswith(_VISION))

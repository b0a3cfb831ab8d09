"""A network that is recorded on this CPU as on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from recorders import CPU, TapingRecorder
from torch import nn

from florence2.network.config import tiny_config
from florence2.network.florence import Florence2Network
from florence2.runtimes.cuda_graphs import GraphRunner
from florence2.runtimes.torch import TorchRuntime


@pytest.fixture(scope="module")
def network():
    """Random, tiny, and of steep distributions."""
    torch.manual_seed(5)
    network = Florence2Network(tiny_config())
    for weight in network.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=1.5 / weight.shape[1] ** 0.5)
    return network


@pytest.fixture
def recorder():
    return TapingRecorder()


@pytest.fixture
def runtime(network, recorder):
    return TorchRuntime(copy.deepcopy(network), CPU, "fp32", GraphRunner(recorder))

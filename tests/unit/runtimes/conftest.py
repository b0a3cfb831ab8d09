"""A small random checkpoint that is sane in every precision."""

from __future__ import annotations

import copy
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from recorders import TapingRecorder
from torch import nn

from florence2.network.config import tiny_config
from florence2.network.florence import Florence2Network
from florence2.runtimes.cuda_graphs import GraphRunner
from florence2.runtimes.torch import TorchRuntime
from florence2.tokenizer import Vocabulary
from florence2_demo.checkpoint import demo_config, save_checkpoint

# The decode loop's tests have the prompts that recorded batches are tried with, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "generate"))

DEMO = Path(__file__).parents[3] / "demo" / "checkpoint"


@pytest.fixture(scope="session")
def sane_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sane")
    weights = shutil.ignore_patterns("config.json", "model.safetensors")
    shutil.copytree(DEMO, folder, ignore=weights, dirs_exist_ok=True)
    torch.manual_seed(11)
    vocab_size = -(-Vocabulary.from_folder(folder).size // 64) * 64
    network = Florence2Network(demo_config(vocab_size))
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, std=1.2 / math.sqrt(module.weight[0].numel()))
    save_checkpoint(network, folder)
    return folder


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
    """The network on this CPU, recorded as on a GPU."""
    network = copy.deepcopy(network)
    return TorchRuntime(network, torch.device("cpu"), "fp32", GraphRunner(recorder))

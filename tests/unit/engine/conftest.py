"""One small random checkpoint in the native layout, loaded the way users load any folder."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from engine_tools import CountingRuntime, engine_on
from torch import nn

from florence2 import Florence2
from florence2.network.florence import Florence2Network
from florence2.tokenizer import Vocabulary
from florence2.tokens import location_token
from florence2_demo.checkpoint import demo_config, save_checkpoint

DEMO = Path(__file__).parents[3] / "demo" / "checkpoint"


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random-demo")
    weights = shutil.ignore_patterns("config.json", "model.safetensors")
    shutil.copytree(DEMO, folder, ignore=weights, dirs_exist_ok=True)
    vocabulary = Vocabulary.from_folder(folder)
    torch.manual_seed(11)
    network = Florence2Network(demo_config(-(-vocabulary.size // 64) * 64))
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, std=1.2 / math.sqrt(module.weight[0].numel()))
    first = vocabulary.encode(location_token(0))[0]
    with torch.no_grad():
        # Answers of a random network should hold a fair share of boxes for the parser.
        network.model.language_model.shared.weight[first : first + 1000] *= 1.5
    save_checkpoint(network, folder)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint_folder):
    return Florence2.load(checkpoint_folder, device="cpu")


@pytest.fixture
def runtime(model):
    return CountingRuntime(model.engine.runtime)


@pytest.fixture
def engine(request, model, runtime):
    """The engine of ``model`` on a runtime that counts; a module may say its BATCHES."""
    return engine_on(model, runtime, *getattr(request.module, "BATCHES", ()))


@pytest.fixture(scope="session")
def demo():
    """The trained demo checkpoint: its answers hold boxes."""
    return Florence2.load("demo", device="cpu")

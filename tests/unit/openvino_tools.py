"""Small random checkpoints as folders, and the same network with torch and with OpenVINO."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from florence2.checkpoint.checkpoint import Checkpoint, load_weights, open_checkpoint
from florence2.conversion.convert import convert
from florence2.network.config import tiny_config
from florence2.network.florence import Florence2Network
from florence2.runtimes.device import PRECISIONS
from florence2.runtimes.openvino import ConvertedNetwork, OpenVinoRuntime
from florence2.runtimes.torch import TorchRuntime

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
VOCABULARY = 1984
CPU = torch.device("cpu")


def small_config(**changes):
    """Windows of 3 places, which no image of the tests is a multiple of."""
    return tiny_config(**{"vocab_size": VOCABULARY, **changes})


def write_small_checkpoint(folder, config=None, size_wh=(64, 64), is_tied=True, seed=1):
    """The demo's words and settings, and a random network in which every part matters."""
    weights = shutil.ignore_patterns("config.json", "model.safetensors")
    shutil.copytree(DEMO, folder, ignore=weights, dirs_exist_ok=True)
    for name in ("preprocessor_config.json", "processor_config.json"):
        content = json.loads((folder / name).read_text())
        part = content.get("image_processor", content)
        part["size"] = {"width": size_wh[0], "height": size_wh[1]}
        (folder / name).write_text(json.dumps(content))
    torch.manual_seed(seed)
    network = Florence2Network(small_config() if config is None else config)
    if not is_tied:
        network.lm_head.weight = nn.Parameter(network.lm_head.weight.detach().clone())
    for name, weight in network.named_parameters():
        with torch.no_grad():
            if "norm" in name and name.endswith("weight"):
                weight.uniform_(0.5, 1.5)
            elif weight.ndim == 1:
                weight.normal_(std=0.1)
            else:
                weight.normal_(std=weight[0].numel() ** -0.5)
    (folder / "config.json").write_text(json.dumps(network.config.to_native_dict()))
    save_file(network.native_state(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class Twins:
    """One network with both runtimes."""

    checkpoint: Checkpoint
    torch: TorchRuntime
    openvino: OpenVinoRuntime
    converted_folder: Path

    def pixels(self, count, seed=3):
        """[count, 3, H, W], as normalised ones."""
        width, height = self.checkpoint.image_processor.size_wh
        return (
            np.random.default_rng(seed)
            .standard_normal((count, 3, height, width))
            .astype(np.float32)
        )

    def features(self, count):
        """Of as many images, by torch, for both."""
        return list(self.torch.encode_images(self.pixels(count)))


def twins_of(checkpoint_folder, out, precision="fp32", **how):
    """Converts a checkpoint: the exact network, and its conversion."""
    checkpoint = open_checkpoint(checkpoint_folder)
    convert(checkpoint, precision, out, **how)
    network = load_weights(checkpoint, PRECISIONS["fp32"])
    converted = OpenVinoRuntime(ConvertedNetwork(out, checkpoint.config.text, precision))
    return Twins(checkpoint, TorchRuntime(network, CPU, "fp32"), converted, out)


def random_prompts(lengths, seed=0):
    """Token ids, ``<s>`` and ``</s>`` included."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [0, *torch.randint(4, VOCABULARY, (length - 2,), generator=generator).tolist(), 2]
        for length in lengths
    ]


def largest_error(found, exact):
    """The largest difference over the largest value."""
    return float((found.float() - exact).abs().max() / exact.abs().max())


def relative_error(found, exact):
    """The norm of the difference over the norm."""
    return float((found.float() - exact).norm() / exact.norm())


class Searches:
    """The same random search with two sessions, and how far their logits are apart."""

    def __init__(self, sessions, beams, error=largest_error, seed=5):
        self._found, self._exact = sessions
        self._beams, self._error = beams, error
        self._generator = torch.Generator().manual_seed(seed)

    def _random(self, end):
        shape = (self._exact.num_items, self._beams)
        return torch.randint(0, end, shape, generator=self._generator)

    def prefill(self):
        return self._error(self._found.prefill(), self._exact.prefill())

    def step(self, is_first=False):
        parents = self._random(1 if is_first else self._beams)
        tokens = self._random(VOCABULARY)
        logits = []
        for session in (self._found, self._exact):
            session.reorder(parents)
            logits.append(session.step(tokens).clone())
        return self._error(*logits)

    def steps(self, count):
        """The largest error of so many."""
        return max(self.step() for _ in range(count))

    def keep(self, items):
        self._found.keep(items)
        self._exact.keep(items)

    def put(self, items, other):
        self._found.put(items, other._found)
        self._exact.put(items, other._exact)


def searches(twins, features, lengths, beams, limit=60, seed=0, **options):
    """Of prompts about these images."""
    ids = random_prompts(lengths, seed)
    runtimes = (twins.openvino, twins.torch)
    return Searches(
        [runtime.start(features, ids, beams, limit) for runtime in runtimes], beams, **options
    )

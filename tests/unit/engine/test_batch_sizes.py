"""How many images and prompts go through the network at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from florence2 import Florence2
from florence2.engine.loading import image_batch, prompt_batch
from florence2.network.config import base_config, large_config
from florence2_demo.checkpoint import demo_config

PRESETS = {
    "base": (base_config(), (768, 768)),
    "large": (large_config(), (768, 768)),
    "demo": (demo_config(1024), (192, 192)),
}
ON_A_CPU = {"base": (1, 8), "large": (1, 8), "demo": (8, 32)}


def sizes(preset, device_type):
    config, size_wh = PRESETS[preset]
    checkpoint = SimpleNamespace(config=config, image_processor=SimpleNamespace(size_wh=size_wh))
    return image_batch(checkpoint, device_type), prompt_batch(checkpoint, device_type)


@pytest.mark.parametrize("preset", PRESETS)
def test_on_a_cpu_a_batch_is_as_large_as_the_network_is_small(preset):
    assert sizes(preset, "cpu") == ON_A_CPU[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_on_a_gpu_batches_start_from_one_size_until_memory_is_measured(preset):
    assert sizes(preset, "cuda") == (16, 32)


def test_the_demo_checkpoint_is_loaded_with_its_batches():
    engine = Florence2.load("demo", device="cpu").engine
    assert (engine.image_batch, engine.prompt_batch) == ON_A_CPU["demo"]
    assert engine.checkpoint.image_processor.size_wh == PRESETS["demo"][1]

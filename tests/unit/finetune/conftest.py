"""A tiny random checkpoint, and drawn scenes to train it on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from openvino_tools import small_config, write_small_checkpoint

from florence2.labeled.split import split_data
from florence2_demo.labeled_scenes import labeled_scenes
from florence2_demo.scene import make_scene


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    # Few positions: a random network answers to the last of them. Few layers: adapters are put
    # into each, one by one, and so many of their files are written.
    config = small_config(
        embed_dim=(16, 24), depths=(1, 1), patch_stride=(4, 4), layers=(1, 1), max_positions=48
    )
    return write_small_checkpoint(tmp_path_factory.mktemp("tiny"), config)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Labeled images for training and for validation."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes = (make_scene(seed, max_objects=2, size_wh=(96, 64)) for seed in range(8))
    data = labeled_scenes(scenes, folder)
    training, validation = split_data(data, "hash:0.3")
    classes = sorted({thing.label for image in training.images for thing in image.objects})
    return tuple(replace(one, classes=tuple(classes)) for one in (training, validation))

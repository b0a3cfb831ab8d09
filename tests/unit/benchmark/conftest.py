"""A tiny random checkpoint."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file, save_file

from florence2.benchmark.run import write_checkpoint


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """With weights 20 times as large, because otherwise every image has the same answer."""
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint("tiny", folder)
    file = folder / "model.safetensors"
    state = load_file(file)
    larger = {name: value * 20 if value.ndim > 1 else value for name, value in state.items()}
    save_file(larger, file, metadata={"format": "pt"})
    return folder

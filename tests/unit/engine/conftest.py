"""A random checkpoint and the demo's, and engines that count."""

from __future__ import annotations

import pytest
from engine_tools import CountingRuntime, engine_on

from florence2 import Florence2


@pytest.fixture(scope="session")
def model(checkpoint_folder):
    return Florence2.load(checkpoint_folder, device="cpu")


@pytest.fixture
def own_model(checkpoint_folder):
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

"""A random checkpoint and the demo's, and engines that count."""

from __future__ import annotations

import pytest
from engine_tools import CountingRuntime, engine_on


@pytest.fixture(scope="session")
def model(load, small_folder):
    return load(small_folder)


@pytest.fixture
def own_model(load, small_folder):
    return load(small_folder)


@pytest.fixture
def runtime(model):
    return CountingRuntime(model.engine.runtime)


@pytest.fixture
def engine(request, model, runtime):
    """The engine of ``model`` on a runtime that counts; a module may say its BATCHES."""
    return engine_on(model, runtime, *getattr(request.module, "BATCHES", ()))


@pytest.fixture(scope="session")
def demo(load):
    """The trained demo checkpoint: its answers hold boxes."""
    return load("demo")

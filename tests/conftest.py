"""What every test process starts with: one compute thread, cheap garbage collections and commands.

Its tensors are tiny, and every core has a test process. Two threads that compute a tensor
together wait for each other, and on a busy machine such a wait lasts until the other one has its
turn. Set here because the libraries read it when they are loaded, and through the environment
because programs that tests start compute as well.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import sys

import pytest
import typer.testing

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

# The name of xdist's workers is no module's, which ends an import of the SDK that comes before
# serve.sdk, see there.
sys.modules.setdefault("__channelexec__", sys.modules["__main__"])

# Tests call commands thousands of times, and each time typer would make all of them anew, which
# takes longer than most of them.
typer.main.get_command = functools.cache(typer.main.get_command)
typer.testing._get_command = typer.main.get_command


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores: tests of servers and of processes mostly wait."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_finish() -> None:
    """Collections, of which each app that stops makes one, pass over all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", params=["torch", "openvino"])
def runtime_name(request):
    """The runtimes that must answer alike; tests that use it run once with each."""
    if request.param == "openvino":
        request.getfixturevalue("has_openvino")
    return request.param


@pytest.fixture(scope="session")
def has_openvino():
    """For tests that need the library."""
    _need("openvino", "pip install openvino")


@pytest.fixture(scope="session")
def has_nncf(has_openvino):
    """For tests that convert to int8."""
    _need("nncf", "pip install '.[int8]'")


def _need(library, install):
    """Skips what needs a library; ``FLORENCE_REQUIRE_OPENVINO`` says that it must be there."""
    if importlib.util.find_spec(library) is None:
        say = pytest.fail if os.environ.get("FLORENCE_REQUIRE_OPENVINO") else pytest.skip
        say(f"The OpenVINO runtime is tested with {library}, which is not installed; {install}.")


@pytest.fixture(scope="session")
def conversions_dir(tmp_path_factory):
    """A cache in which a checkpoint is converted once for all test processes."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "conversions"


@pytest.fixture(scope="session")
def load(runtime_name, conversions_dir):
    """Loads a checkpoint on a CPU, in float32, with the runtime of the test."""
    from florence2 import Florence2

    def load(name):
        return Florence2.load(
            name, "cpu", runtime_name, precision="fp32", cache_dir=conversions_dir
        )

    return load

"""A small checkpoint and its conversion, which tests copy before they change it."""

from __future__ import annotations

import functools
import shutil

import numpy as np
import pytest
from openvino_tools import DEMO

from florence2.checkpoint.checkpoint import open_checkpoint
from florence2.conversion.convert import convert
from florence2.conversion.kept import Conversions
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene


@pytest.fixture(autouse=True)
def _openvino(has_openvino):
    """Nothing here is to be had without the library."""


@pytest.fixture(scope="session")
def small(small_folder):
    return open_checkpoint(small_folder)


@pytest.fixture(scope="session")
def whole(small, tmp_path_factory):
    """Converted once."""
    out = tmp_path_factory.mktemp("whole") / "tiny-openvino"
    convert(small, "fp32", out)
    return out


@pytest.fixture(scope="session")
def reduced(small, tmp_path_factory):
    """Converts to a precision, once: the folder, what was returned, and the progress told."""

    @functools.cache
    def reduced(precision):
        out = tmp_path_factory.mktemp(precision) / "tiny"
        told: list[str] = []
        return out, convert(small, precision, out, progress=told.append), told

    return reduced


@pytest.fixture(scope="session")
def demo_int8(has_nncf, conversions_dir):
    """The demo in int8, calibrated on three scenes: once for all test processes."""

    def calibration():
        return [np.asarray(draw_scene(make_scene(seed))) for seed in range(3)], "drawn scenes"

    return Conversions(conversions_dir, calibration).folder_for(open_checkpoint(DEMO), "int8")


@pytest.fixture
def converted(whole, tmp_path):
    """A copy of it, in another place and without the checkpoint that it was made from."""
    return shutil.copytree(whole, tmp_path / "elsewhere")

"""Drawn scenes to calibrate 8-bit activations on, where nobody gives images of their own."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene

FIRST_CALIBRATION_SEED: Final = 950_000
"""Neither trained on, nor evaluated on, nor among the demo's pictures."""

NUM_SCENES: Final = 24


def calibration_scenes() -> tuple[list[NDArray[np.uint8]], str]:
    """Scenes [H, W, 3], and how a manifest names them."""
    seeds = range(FIRST_CALIBRATION_SEED, FIRST_CALIBRATION_SEED + NUM_SCENES)
    scenes: list[Any] = [draw_scene(make_scene(seed)) for seed in seeds]
    return [np.asarray(scene, np.uint8) for scene in scenes], "drawn scenes of this project"

"""Grid targets agree with the boxes and words of the scene."""

import numpy as np
import pytest

from florence2_demo.grid_targets import grid_targets
from florence2_demo.lexicon import COLOURS, KINDS, SIGN_WORDS
from florence2_demo.scene import make_scene


@pytest.mark.parametrize("grid", [6, 12])
def test_cells_carry_the_object_that_covers_them(grid):
    for seed in range(80):
        scene = make_scene(seed)
        targets = grid_targets(scene, grid)
        assert targets.boxes_xyxy.shape == (grid, grid, 4)
        assert ((targets.kind >= 0) == (targets.objectness == 1)).all()
        assert ((targets.colour >= 0) == (targets.objectness == 1)).all()
        known = {
            (KINDS.index(o.kind), COLOURS.index(o.colour), tuple(np.float32(o.box_xyxy)))
            for o in scene.objects
        }
        found = set()
        for row, column in np.argwhere(targets.objectness):
            box = targets.boxes_xyxy[row, column]
            found.add((targets.kind[row, column], targets.colour[row, column], tuple(box)))
            x1, y1, x2, y2 = box * grid
            assert x1 - 1 <= column + 0.5 <= x2 + 1
            assert y1 - 1 <= row + 0.5 <= y2 + 1
        assert found <= known
        if grid == 12:
            assert len(found) >= len(known) - 1, "only two things in one cell may share it"


def test_word_cells_lie_in_the_quads():
    covered = 0
    for seed in range(120):
        scene = make_scene(seed)
        words = grid_targets(scene, 12).words
        covered += bool((words >= 0).any())
        assert bool((words >= 0).any()) <= bool(scene.texts)
        texts = {line.text: line.box_xyxy for line in scene.texts}
        for row, column in np.argwhere(words >= 0):
            x1, y1, x2, y2 = texts[SIGN_WORDS[words[row, column]]]
            assert x1 - 0.01 <= (column + 0.5) / 12 <= x2 + 0.01
            assert y1 - 0.01 <= (row + 0.5) / 12 <= y2 + 0.01
    assert covered > 30

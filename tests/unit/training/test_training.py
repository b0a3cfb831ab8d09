"""Training: dense targets that agree with the scene; a trainer that learns, saves and resumes."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from florence2 import Florence2
from florence2.errors import RequestError
from florence2_demo import train as train_command
from florence2_demo.batches import GridTargets, grid_targets
from florence2_demo.lexicon import COLOURS, KINDS, SIGN_WORDS
from florence2_demo.scene import make_scene
from florence2_demo.training import Trainer, TrainingPlan, soft_location_log_prob

PLAN = TrainingPlan(
    steps=2, images_per_batch=2, prompts_per_image=2, workers=0, precision="fp32", peak_rate=1e-3
)


class StoppedAfter(Trainer):
    """A trainer that somebody stops after some steps."""

    def __init__(self, folder, plan, steps):
        super().__init__(folder, plan)
        self.last = self.step + steps

    def learn(self, batch, rate):
        figures = super().learn(batch, rate)
        self.is_stopping = self.step + 1 >= self.last
        return figures


def weights(folder):
    return load_file(folder / "checkpoint" / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    Trainer(folder, PLAN).run()
    return folder


@pytest.fixture
def folder(uninterrupted, tmp_path):
    """An untrained folder with the other one's tokenizer, which takes longest to make."""
    weights = shutil.ignore_patterns("config.json", "model.safetensors")
    shutil.copytree(uninterrupted / "checkpoint", tmp_path / "checkpoint", ignore=weights)
    return tmp_path


def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(
    uninterrupted, folder
):
    StoppedAfter(folder, PLAN, 1).run()
    half = weights(folder)
    resumed = Trainer(folder, PLAN)
    assert resumed.step == 1
    resumed.run()
    expected = weights(uninterrupted)
    assert any(not torch.equal(half[name], expected[name]) for name in expected)
    for name, value in weights(folder).items():
        torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-3)


def test_what_it_saves_is_a_checkpoint_that_loads(uninterrupted):
    model = Florence2.load(uninterrupted / "checkpoint", device="cpu")
    assert model.engine.checkpoint.generation.no_repeat_ngram_size == 0


def test_a_few_steps_on_the_same_scenes_lower_the_loss(folder):
    plan = replace(PLAN, steps=1000, ramp_steps=1)
    trainer = Trainer(folder, plan)
    batch = trainer.batches().batch(5)
    losses = [trainer.learn(batch, rate=1e-3)["answer"] for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_plan_without_images_gets_one_sentence():
    with pytest.raises(RequestError, match="at least 1 of images"):
        replace(PLAN, images_per_batch=0).check()


def test_a_soft_target_rewards_the_right_bin_most_and_its_neighbours_nearly_as_much():
    bins = torch.tensor([500])

    def reward(centre: int) -> float:
        logits = torch.full((1, 1000), -10.0)
        logits[0, centre - 3 : centre + 4] = 0.0
        return float(soft_location_log_prob(logits.log_softmax(1), bins, 4.0))

    rewards = [reward(centre) for centre in (500, 504, 512, 700)]
    assert rewards == sorted(rewards, reverse=True)
    assert rewards[0] - rewards[1] < 0.5 * (rewards[0] - rewards[3])


def test_soft_targets_at_the_edge_still_sum_to_one():
    uniform = torch.zeros(1, 1000).log_softmax(1)
    for place in (0, 999):
        found = soft_location_log_prob(uniform, torch.tensor([place]), 4.0)
        assert float(found) == pytest.approx(float(uniform[0, 0]), abs=1e-5)


def as_grids(scene, side):
    """The targets [side * side, ...] as [side, side, ...]."""
    targets = (np.asarray(target) for target in grid_targets(scene, side))
    return GridTargets(*(target.reshape(side, side, *target.shape[1:]) for target in targets))


@pytest.mark.parametrize("grid", [6, 12])
def test_cells_carry_the_object_that_covers_them(grid):
    for seed in range(80):
        scene = make_scene(seed)
        targets = as_grids(scene, grid)
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
        words = as_grids(scene, 12).words
        covered += bool((words >= 0).any())
        assert bool((words >= 0).any()) <= bool(scene.texts)
        texts = {line.text: line.box_xyxy for line in scene.texts}
        for row, column in np.argwhere(words >= 0):
            x1, y1, x2, y2 = texts[SIGN_WORDS[words[row, column]]]
            assert x1 - 0.01 <= (column + 0.5) / 12 <= x2 + 0.01
            assert y1 - 0.01 <= (row + 0.5) / 12 <= y2 + 0.01
    assert covered > 30


def test_its_command_trains_into_a_folder(monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(train_command, "train", lambda *given: trained.append(given))
    train_command.main([str(tmp_path), "--steps", "5", "--images", "2"])
    assert trained == [(tmp_path, TrainingPlan(steps=5, images_per_batch=2))]


def test_its_command_says_in_a_sentence_what_it_cannot_do(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train_command.main([str(tmp_path), "--steps", "0"])
    assert ended.value.code == 2
    assert "Training needs at least 1 of steps" in capsys.readouterr().err

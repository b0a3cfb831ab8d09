"""The trainer: it learns, saves, and goes on from where it was stopped as if it had not been."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from florence2 import Florence2
from florence2.errors import RequestError
from florence2_demo.training import Trainer, TrainingPlan, soft_location_log_prob

PLAN = TrainingPlan(
    steps=4, images_per_batch=2, prompts_per_image=2, workers=0, precision="fp32", peak_rate=1e-3
)


class StoppedAfter(Trainer):
    """A trainer that somebody stops after some steps."""

    def __init__(self, folder, plan, steps):
        super().__init__(folder, plan)
        self.last = self.step + steps

    def _step(self, batch):
        figures = super()._step(batch)
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
    StoppedAfter(folder, PLAN, 2).run()
    half = weights(folder)
    resumed = Trainer(folder, PLAN)
    assert resumed.step == 2
    resumed.run()
    expected = weights(uninterrupted)
    assert any(not torch.equal(half[name], expected[name]) for name in expected)
    for name, value in weights(folder).items():
        torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-3)


def test_what_it_saves_is_a_checkpoint_that_loads(uninterrupted):
    model = Florence2.load(uninterrupted / "checkpoint", device="cpu")
    assert model.engine.checkpoint.generation.no_repeat_ngram_size == 0


def test_a_few_steps_on_the_same_scenes_lower_the_loss(folder):
    trainer = Trainer(folder, replace(PLAN, steps=1000))
    from florence2_demo.training import Plan, SceneBatches, set_rate

    stream = SceneBatches(trainer.vocabulary, trainer.processor, Plan(2, 4, 12), 0, 1)
    batch = stream.batch(5)
    set_rate(trainer.optimizers, 1e-3)
    losses = [trainer._step(batch)["answer"] for _ in range(8)]
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

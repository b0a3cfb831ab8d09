"""What the demo checkpoint that comes with the project must be able to do, on held-out scenes."""

from pathlib import Path

import pytest

from florence2.evaluation.evaluate import ALL_TASKS, Plan, evaluate

DEMO = Path(__file__).parents[3] / "demo" / "checkpoint"
# Targets are 0.5 and 0.6 on 500 scenes; so few scenes scatter by about the margin.
SCENES, MARGIN = 40, 0.1

pytestmark = pytest.mark.skipif(not DEMO.is_dir(), reason="the demo checkpoint is not there yet")


@pytest.fixture(scope="module")
def report():
    from florence2 import Florence2

    model = Florence2.load(DEMO, device="cpu", precision="fp32")
    return evaluate(model, Plan(SCENES, seed=1000, max_new_tokens=200))


@pytest.mark.parametrize(("figure", "target"), [("od_map50", 0.5), ("grounding_recall50", 0.6)])
def test_targets(report, figure, target):
    assert report.figures[figure].value >= target - MARGIN


def test_every_answer_is_well_formed(report):
    assert set(report.well_formed) == set(ALL_TASKS)
    assert {task: share for task, share in report.well_formed.items() if share < 0.95} == {}
    assert {task: share for task, share in report.known_words.items() if share < 0.95} == {}

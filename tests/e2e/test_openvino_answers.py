"""OpenVINO's answers in float32 are torch's: all tasks and a cascade, on pictures and scenes.

Tokens must be equal. Where they are not, rounding must have decided between two candidates that
are as good as equal: ``gap_where_they_part`` of bench/openvino_accuracy.py has torch continue what
both answers have in common, and compares the log-probabilities of the two tokens after it. With
one beam, the demo checkpoint's own setting, those are the best two candidates.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from florence2 import Ask, Florence2, Result
from florence2.tasks import TASKS, TaskInput
from florence2_demo.drawing import draw_scene
from florence2_demo.evaluation import held_out_examples
from florence2_demo.scene import make_scene
from serve.cli.main import main

ROOT = Path(__file__).parents[2]
PICTURES = ("scene_bike.png", "photo_table.jpg")
SCENES = (700, 703, 704)
REGION = (30.0, 60.0, 200.0, 260.0)
TIE = 1e-4
CASCADE = "<OD>+<REGION_TO_DESCRIPTION>"


def accuracy_bench():
    name = "openvino_accuracy"
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCH = accuracy_bench()


@pytest.fixture(scope="module")
def exact():
    return Florence2.load("demo", "cpu", "torch", precision="fp32")


@pytest.fixture(scope="module")
def converted(has_openvino, conversions_dir):
    return Florence2.load("demo", "cpu", "openvino", precision="fp32", cache_dir=conversions_dir)


def asks_of_picture(name):
    """Every task, of a demo picture."""
    takes = {TaskInput.TEXT: ("orange star", None), TaskInput.REGION: (None, REGION)}
    image = str(ROOT / "demo" / "images" / name)
    return [Ask(image, task.token, *takes.get(task.takes, (None, None))) for task in TASKS]


def asks_of_scene(seed):
    """Every task that applies to a scene, with the words and regions of its examples."""
    image = draw_scene(make_scene(seed))
    examples = held_out_examples(seed, [task.token for task in TASKS])
    return [Ask(image, one.task, one.text, one.region_px) for one in examples]


ASKED = {
    **{name: lambda name=name: asks_of_picture(name) for name in PICTURES},
    **{f"scene {seed}": lambda seed=seed: asks_of_scene(seed) for seed in SCENES},
}


def assert_same(exact, ask, found, expected):
    """Equal tokens, or a tie of the best two candidates where they part."""
    assert isinstance(found, Result)
    assert found.task == expected.task
    if found.token_ids == expected.token_ids:
        assert found.text == expected.text
        assert len(found.objects) == len(expected.objects)
        for one, other in zip(found.objects, expected.objects, strict=True):
            assert one.label == other.label
            assert one.score == pytest.approx(other.score, abs=1e-3)
        return
    assert BENCH.gap_where_they_part(exact, ask, expected.token_ids, found.token_ids) < TIE


@pytest.mark.parametrize("asks", ASKED.values(), ids=ASKED)
def test_every_task_has_torchs_answer(exact, converted, asks):
    given = asks()
    assert len(given) > 10
    # What one image is asked is encoded once, as with run() on an EncodedImage.
    image = given[0].image
    sides = [(model, model.encode(image)) for model in (converted, exact)]
    for ask in given:
        answers = [model.run(ask.task, one, ask.text, ask.region) for model, one in sides]
        assert_same(exact, ask, *answers)


@pytest.mark.parametrize("asks", [ASKED[PICTURES[0]], ASKED["scene 703"]], ids=["picture", "scene"])
def test_a_cascade_has_torchs_answers(exact, converted, asks):
    image = asks()[0].image
    found, expected = (model.run(CASCADE, image) for model in (converted, exact))
    assert len(expected.steps) > 2
    first, later = found.steps[0], expected.steps[0]
    assert_same(exact, Ask(image, "<OD>"), first, later)
    if first.token_ids == later.token_ids:
        regions = [None, *(box.box_xyxy for box in later.objects)]
        steps = zip(found.steps, expected.steps, regions, strict=True)
        for one, other, region in list(steps)[1:]:
            assert_same(exact, Ask(image, other.task, region=region), one, other)


def test_three_beams_have_torchs_answers(exact, converted):
    """A search of several beams compares more than the best two, so it is equal or it is not."""
    asks = [
        Ask(ask.image, ask.task, ask.text, ask.region, num_beams=3)
        for ask in asks_of_picture(PICTURES[0])
    ]
    found, expected = (model.run_many(asks) for model in (converted, exact))
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_the_gap_is_that_of_the_two_tokens(exact):
    image = str(ROOT / "demo" / "images" / PICTURES[0])
    answer = exact.run("<OD>", image)
    other = (*answer.token_ids[:3], answer.token_ids[3] + 1, *answer.token_ids[4:])
    ask = Ask(image, "<OD>")
    gap = BENCH.gap_where_they_part(exact, ask, answer.token_ids, other)
    assert gap > TIE
    # An answer that ends earlier parts from the other at its end.
    assert BENCH.gap_where_they_part(exact, ask, answer.token_ids, answer.token_ids[:3]) > TIE
    assert BENCH.gap_where_they_part(exact, ask, answer.token_ids, answer.token_ids) == 0.0


def labeled(runtime, out):
    """What ``florence2 label`` writes about each demo picture: classes, places and values."""
    images = ROOT / "demo" / "images"
    command = ["label", images, "--out", out, "--model", "demo", "--task", "<OD>"]
    command += ["--device", "cpu", "--precision", "fp32", "--runtime", runtime]
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in command])
    assert ended.value.code == 0
    found = {}
    for path in sorted((out / "project").rglob("ann/*.json")):
        objects = json.loads(path.read_text())["objects"]
        found[path.name] = [
            (
                one["classTitle"],
                one["geometryType"],
                one["points"],
                [(tag["name"], rounded(tag["value"])) for tag in one["tags"]],
            )
            for one in objects
        ]
    return found


def rounded(value):
    return round(value, 3) if isinstance(value, float) else value


def test_labeling_a_folder_writes_the_same_annotations(
    has_openvino, conversions_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("FLORENCE2_CACHE", str(conversions_dir))
    found, expected = (labeled(name, tmp_path / name) for name in ("openvino", "torch"))
    assert found == expected
    assert sum(map(len, expected.values())) > 20

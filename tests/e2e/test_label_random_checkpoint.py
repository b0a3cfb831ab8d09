"""The whole way with the real engine, on a small checkpoint of random weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from florence2.network.florence import Florence2Network
from florence2.tasks import TASKS, TaskInput
from florence2.tokenizer import Vocabulary
from florence2_demo.checkpoint import demo_config, save_checkpoint
from serve.cli.main import main
from serve.sdk import sly

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    weights = shutil.ignore_patterns("config.json", "model.safetensors")
    shutil.copytree(DEMO, folder, ignore=weights, dirs_exist_ok=True)
    torch.manual_seed(3)
    size = -(-Vocabulary.from_folder(folder).size // 64) * 64
    network = Florence2Network(demo_config(size))
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, std=1.2 / math.sqrt(module.weight[0].numel()))
    save_checkpoint(network, folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, color in enumerate(["red", "green"]):
        Image.new("RGB", (80 + number, 60), color).save(folder / f"{color}.jpg")
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


OPTIONS = {
    TaskInput.NONE: [],
    TaskInput.TEXT: ["--prompt", "red car. dog"],
    TaskInput.REGION: ["--region", "5,5,40,40"],
}
CASCADES = ["<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>", "<OD>+<REGION_TO_DESCRIPTION>"]


@pytest.mark.parametrize(
    ("task", "options"),
    [*((task.token, OPTIONS[task.takes]) for task in TASKS), *((name, []) for name in CASCADES)],
)
def test_every_task_labels_a_folder(task, options, checkpoint, images, tmp_path):
    out = tmp_path / "out"
    command = ["label", images, "--out", out, "--model", checkpoint, "--task", task, *options]
    command += ["--max-new-tokens", 24, "--num-beams", 2, "--device", "cpu"]
    assert run(*command, "--draw", "--coco", "--yolo") == 1
    report = json.loads((out / "report.json").read_text())
    assert report["labeled"] + report["empty"] == 2
    assert report["failed_by_code"] == {"bad_image": 1}
    project = sly.Project(str(out / "project"), sly.OpenMode.READ)
    (dataset,) = project.datasets
    for name in dataset.get_items_names():
        annotation = sly.Annotation.load_json_file(dataset.get_ann_path(name), project.meta)
        width = Image.open(dataset.get_img_path(name)).width
        assert annotation.img_size == (60, width)
    assert len(list((out / "previews").iterdir())) == 2
    assert json.loads((out / "coco/ds0/annotations/coco_instances.json").read_text())["images"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        pytest.param(["--model", "Florence-3"], "Unknown checkpoint", id="model"),
        pytest.param(["--device", "toaster"], "toaster", id="device"),
        pytest.param(["--runtime", "steam"], "Unknown runtime", id="runtime"),
        pytest.param(["--prompt", "word " * 199], "", id="more text than the checkpoint reads"),
    ],
)
def test_what_the_engine_refuses_is_one_sentence(
    options, sentence, checkpoint, images, tmp_path, capsys
):
    code = run("label", images, "--out", tmp_path / "out", "--model", checkpoint, *options)
    err = capsys.readouterr().err
    assert code in ((2,) if sentence else (1, 2))
    assert sentence in err
    assert "Traceback" not in err
    assert "unexpected" not in err

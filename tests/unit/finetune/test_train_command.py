"""``florence2 train``: from a COCO file to an adapter; what is mistyped is a sentence."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image

from serve.cli.main import main
from serve.platform.experiments import INFO_NAME, write_experiment


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Six images with a box each, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("coco")
    images, annotations = [], []
    for number in range(1, 8):
        name = f"{number}.png"
        if number == 7:
            (folder / name).write_bytes(b"no image")
        else:
            Image.new("RGB", (80, 60), (30 * number, 90, 60)).save(folder / name)
        images.append({"id": number, "file_name": name, "width": 80, "height": 60})
        box = [10, 10, 20 + number, 30]
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": box})
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "box"}]
    path = folder / "labels.json"
    path.write_text(json.dumps(content))
    return path


def train(capsys, *arguments):
    """The exit code of the command, and what it said to whom."""
    code = 0
    try:
        main(["train", *map(str, arguments)])
    except SystemExit as ended:
        code = ended.code or 0
    said = capsys.readouterr()
    return code, said.out, " ".join(said.err.split())


def test_a_file_of_labels_becomes_an_adapter(coco, tiny_folder, tmp_path, capsys):
    out = tmp_path / "run"
    options = ("--model", tiny_folder, "--task", "OD,REGION_TO_CATEGORY", "--out", out)
    options += ("--steps", 2, "--batch", 2, "--device", "cpu", "--class", "box=a small box")
    code, shown, said = train(capsys, coco, *options)
    assert code == 0, said
    assert "Left out: 7.png" in said
    assert "2/2 steps, loss" in said
    assert "Step 2: <OD> mAP" in said
    assert str(out / "best") in shown
    record = json.loads((out / "training.json").read_text())
    assert record["prompts"] == {"box": "a small box"}
    assert record["images"]["train"] + record["images"]["val"] == 6
    assert record["command"].startswith("florence2 ")
    info = json.loads((write_experiment(out) / INFO_NAME).read_text())
    assert info["model_name"] == tiny_folder.name
    assert info["evaluation_metrics"] == {record["metric"]["name"]: record["metric"]["value"]}
    code, _, said = train(capsys, coco, *options, "--rank", 4)
    assert code == 2
    assert "lora rank is 4 now and was 16" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--task", "OT"), "Unknown task"),
        (("--task", "OD", "--class", "box"), "has the form NAME=PROMPT"),
        (("--task", "OD", "--class", "dog=a dog"), "class 'dog', which the data does not have"),
        (("--task", "OD", "--steps", 3, "--epochs", 2), "--steps and --epochs say the same"),
        (("--task", "OD", "--augment", "turn"), "Unknown augmentation 'turn'"),
        (("--task", "OD", "--val", "hash:2"), "between 0 and 1"),
        (("--task", "OCR_WITH_REGION", "--method", "some"), "Unknown method 'some'"),
        ((), "at least one task"),
        (("--task", "OD", "--upload"), "SERVER_ADDRESS"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    coco, tiny_folder, tmp_path, capsys, monkeypatch, options, sentence
):
    monkeypatch.delenv("SERVER_ADDRESS", raising=False)
    given = ("--model", tiny_folder, "--out", tmp_path / "run", *options)
    code, _, said = train(capsys, coco, *given)
    assert code == 2
    assert sentence in said
    assert not (tmp_path / "run").exists()


def test_without_its_packages_it_says_which(coco, tiny_folder, tmp_path, capsys, monkeypatch):
    for name in ("run", "model", "trainer"):
        monkeypatch.delitem(sys.modules, f"florence2.finetune.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    code, _, said = train(capsys, coco, "--model", tiny_folder, "--out", tmp_path, "--task", "OD")
    assert code == 2
    assert "pip install 'serve-florence-2[train]'" in said

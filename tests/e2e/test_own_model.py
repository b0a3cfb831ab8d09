"""A model of one's own, as the README has it: label, correct, train, evaluate, tune, label on.

With few steps: that they teach something is measured by ``bench/finetune.py``.
"""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from florence2_demo.labeled_scenes import NEW_KIND, labeled_scenes, scenes_with_new_kind
from serve.cli.main import main
from serve.sdk import sly

FIRST_SEED = 2_000_000
CPU = ("--device", "cpu")


def florence2(*words, code=0):
    """Runs one command line, which must end well."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    assert (ended.value.code or 0) == code, words


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Scenes with boats, which the demo checkpoint does not know, and what is really in them."""
    return labeled_scenes(
        scenes_with_new_kind(FIRST_SEED, 8), tmp_path_factory.mktemp("drawn") / "images"
    )


def correct(folder, truth):
    """As a person does in the annotation tool: a class that was missing, its boxes drawn."""
    project = sly.Project(str(folder), sly.OpenMode.READ)
    boat = sly.ObjClass(NEW_KIND, sly.Rectangle)
    project.set_meta(project.meta.add_obj_class(boat))
    (dataset,) = project.datasets
    drawn = 0
    for image in truth:
        path = dataset.get_ann_path(image.name)
        annotation = sly.Annotation.load_json_file(path, project.meta)
        for thing in image.objects:
            if thing.label == NEW_KIND:
                x1, y1, x2, y2 = thing.box_xyxy
                box = sly.Rectangle(int(y1), int(x1), int(y2) - 1, int(x2) - 1)
                annotation = annotation.add_label(sly.Label(box, boat))
                drawn += 1
        sly.json.dump_json_file(annotation.to_json(), path)
    return drawn


def test_label_correct_train_evaluate_tune_and_label_the_rest(drawn, tmp_path, capsys):
    first, rest = tmp_path / "first", tmp_path / "rest"
    for folder, images in ((first, drawn.images[:6]), (rest, drawn.images[6:])):
        folder.mkdir()
        for image in images:
            shutil.copy(image.path, folder)
    labels, run, settings = tmp_path / "labels", tmp_path / "run", tmp_path / "settings.yaml"
    florence2("label", first, "--model", "demo", "--task", "<OD>", "--out", labels, *CPU)
    num_boats = correct(labels / "project", drawn.images[:6])
    assert num_boats >= 6

    teach = ("--task", "<OD>", "--steps", "2", "--batch", "2", "--val", "hash:0.3", "--rank", "4")
    florence2("train", labels, "--model", "demo", *teach, "--out", run, *CPU)
    record = json.loads((run / "training.json").read_text("utf-8"))
    assert record["status"] == "done"
    assert NEW_KIND in record["classes"]
    assert (run / "report.html").read_text("utf-8").count("<h2") > 1
    own = ("--model", run / "best", *CPU)
    capsys.readouterr()
    florence2("train", labels, *own, *teach, "--out", tmp_path / "again", code=2)
    assert "is an adapter itself; train its base" in capsys.readouterr().err

    florence2("evaluate", labels, *own, "--out", tmp_path / "figures", "--beams", "1")
    (figures,) = json.loads((tmp_path / "figures/evaluation.json").read_text("utf-8"))["tasks"]
    true = {one["name"]: one["num_true"] for one in figures["objects"]["classes"]}
    assert true[NEW_KIND] == num_boats

    named = ("--class", f"{NEW_KIND}=boat; ship with a sail", "--class", "tree")
    florence2("tune", labels, *named, *own, "--out", settings, "--num-beams", "1", "--nms", "0.5")
    chosen = yaml.safe_load(settings.read_text("utf-8"))
    assert set(chosen["mapping"]) == {NEW_KIND, "tree"}

    florence2("label", rest, *own, "--settings", settings, "--out", tmp_path / "labeled")
    report = json.loads((tmp_path / "labeled/report.json").read_text("utf-8"))
    assert (report["images"], report["failed"]) == (2, 0)
    project = sly.Project(str(tmp_path / "labeled/project"), sly.OpenMode.READ)
    assert {one.name for one in project.meta.obj_classes} <= {NEW_KIND, "tree"}

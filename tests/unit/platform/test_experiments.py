"""A training's folder as an experiment of the platform: what is written, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from florence2.errors import CheckpointError
from serve.platform.experiments import (
    INFO_NAME,
    experiment_of,
    model_meta_of,
    training_of,
    write_experiment,
)
from serve.sdk import sly

RECORD = {
    "model": "Florence-2-base",
    "method": "lora",
    "tasks": ["<OD>"],
    "classes": ["dog", "cat"],
    "metric": {"name": "mAP", "value": 0.5},
    "data": {"source": "project", "training_images": 8, "validation_images": 2},
}
ADAPTER = {"base_model_name_or_path": "microsoft/Florence-2-base"}


@pytest.fixture
def trained(tmp_path) -> Path:
    """The folder of a training that made an adapter."""
    out = tmp_path / "dogs"
    (out / "best").mkdir(parents=True)
    (out / "training.json").write_text(json.dumps(RECORD))
    (out / "best" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (out / "best" / "adapter_model.safetensors").write_bytes(b"weights")
    return out


def info_in(folder: Path) -> dict:
    return json.loads((folder / INFO_NAME).read_text(encoding="utf-8"))


def test_a_training_becomes_an_experiment_whose_weights_take_no_room(trained):
    (trained / "report.html").write_text("<p>")
    folder = write_experiment(trained)
    info = info_in(folder)
    assert info["experiment_name"] == "dogs"
    assert info["artifacts_dir"].startswith("/experiments/dogs/")
    assert info["artifacts_dir"].endswith("_Florence-2/")
    assert (info["train_size"], info["val_size"], info["task_id"]) == (8, 2, -1)
    assert info["model_files"] == {
        name: f"checkpoints/best/{name}"
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    weights = folder / "checkpoints/best/adapter_model.safetensors"
    assert weights.samefile(trained / "best" / "adapter_model.safetensors")
    assert (folder / "report.html").read_text() == "<p>"
    assert yaml.safe_load((folder / "hyperparameters.yaml").read_text()) == RECORD
    stands_for = torch.load(folder / "checkpoints/best.pt", weights_only=True)
    assert stands_for["model_meta"] == json.loads((folder / "model_meta.json").read_text())
    experiment = experiment_of(info, "here")
    assert experiment.training.summary == "lora · <OD> · 2 classes: dog, cat · mAP 0.5"
    assert experiment.training.settings == {"task_prompt": "<OD>"}
    assert [(one.size, bool(one.sha256)) for one in experiment.files] == [
        ((trained / "best" / name).stat().st_size, True) for name in info["model_files"]
    ]


def test_names_of_the_platform_are_taken_and_a_second_time_is_the_same_place(trained):
    first = info_in(write_experiment(trained, name="a/b", project_id=7, task_id=9))
    assert first["artifacts_dir"] == "/experiments/7_a_b/9_Florence-2/"
    assert (first["project_id"], first["task_id"]) == (7, 9)
    (trained / "best" / "adapter_model.safetensors").write_bytes(b"better")
    again, once = (info_in(write_experiment(trained)) for _ in range(2))
    assert again == once


def test_settings_that_were_tuned_are_those_of_the_model(trained):
    tuned = {"task_prompt": "<OD>", "confidence_threshold": 0.4, "text": "", "mapping": None}
    (trained / "settings.yaml").write_text(yaml.safe_dump(tuned))
    experiment = experiment_of(info_in(write_experiment(trained)), "here")
    assert experiment.training.settings == {"task_prompt": "<OD>", "confidence_threshold": 0.4}


@pytest.mark.parametrize("place", ["in it", "beside it", "elsewhere"])
def test_a_base_that_no_other_machine_has_comes_along(trained, checkpoint_folder, place):
    base = {"in it": trained / "best" / "base", "beside it": trained / "base"}.get(
        place, checkpoint_folder
    )
    if base != checkpoint_folder:
        shutil.copytree(checkpoint_folder, base)
    named = {"base_model_name_or_path": str(base)}
    (trained / "best" / "adapter_config.json").write_text(json.dumps(named))
    folder = write_experiment(trained) / "checkpoints/best"
    weights = folder / "base" / "model.safetensors"
    assert weights.samefile(base / "model.safetensors")
    names = info_in(folder.parents[1])["model_files"]
    assert "base/config.json" in names


def test_weights_are_copied_where_they_cannot_be_linked(trained, monkeypatch):
    def no_links(source, target):
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", no_links)
    folder = write_experiment(trained)
    assert (folder / "checkpoints/best/adapter_model.safetensors").read_bytes() == b"weights"


TASKS = {
    "words of classes": (
        {"tasks": ["<CAPTION_TO_PHRASE_GROUNDING>"], "prompts": {"dog": "puppy"}},
        {"task_prompt": "<CAPTION_TO_PHRASE_GROUNDING>", "mapping": {"dog": "puppy", "cat": "cat"}},
        sly.Rectangle,
    ),
    "the first that an image can be asked": (
        {"tasks": ["<REGION_TO_CATEGORY>", "<DocVQA>", "<CAPTION>"]},
        {"task_prompt": "<CAPTION>"},
        sly.Rectangle,
    ),
    "outlines": (
        {"tasks": ["<REFERRING_EXPRESSION_SEGMENTATION>"]},
        {
            "task_prompt": "<REFERRING_EXPRESSION_SEGMENTATION>",
            "mapping": {"dog": "dog", "cat": "cat"},
        },
        sly.Polygon,
    ),
    "boxes and outlines": (
        {"tasks": ["<OD>", "<REFERRING_EXPRESSION_SEGMENTATION>"]},
        {"task_prompt": "<OD>"},
        sly.AnyGeometry,
    ),
    "only a token of its own": ({"tasks": ["<DocVQA>"]}, {}, sly.Rectangle),
    "a metric that is no number": (
        {"metric": {"name": "mAP", "value": float("nan")}},
        {"task_prompt": "<OD>"},
        sly.Rectangle,
    ),
    "no metric yet": ({"metric": None}, {"task_prompt": "<OD>"}, sly.Rectangle),
}


@pytest.mark.parametrize(("says", "settings", "shape"), TASKS.values(), ids=TASKS)
def test_tasks_give_the_settings_and_the_shape_of_the_classes(says, settings, shape):
    training = training_of({**RECORD, **says}, "here")
    assert training.settings == settings
    assert (training.metric is None) is ("metric" in says)
    meta = model_meta_of(training)
    assert {one.name: one.geometry_type for one in meta.obj_classes} == {"dog": shape, "cat": shape}
    assert meta.get_tag_meta("confidence") is not None


def without(name):
    def damage(out):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def saying(**values):
    return lambda out: (out / "training.json").write_text(json.dumps({**RECORD, **values}))


def settings(text):
    return lambda out: (out / "settings.yaml").write_text(text)


def emptied(out):
    for path in (out / "best").iterdir():
        path.unlink()


UNUSABLE = {
    "no record": (without("training.json"), "cannot be read as JSON"),
    "another kind of record": (
        lambda out: (out / "training.json").write_text("[]"),
        "a JSON object",
    ),
    "no weights": (without("best"), "there is no such folder"),
    "an empty folder": (emptied, "it is empty"),
    "tasks of another kind": (saying(tasks=5), "a list of names is needed"),
    "a metric without a value": (saying(metric={"name": "mAP"}), "cannot be used"),
    "settings that are none": (settings("- a"), "keys with values"),
    "settings of another app": (settings("colour: red"), "Unknown setting"),
    "damaged settings": (settings("a: ["), "cannot be read as YAML"),
}


@pytest.mark.parametrize(("damage", "sentence"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_training_that_cannot_be_used_is_told_about(trained, damage, sentence):
    damage(trained)
    with pytest.raises(CheckpointError, match=sentence):
        write_experiment(trained)

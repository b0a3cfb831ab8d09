"""``florence2 tune``: the demo checkpoint on a few drawn scenes, its files and its refusals."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from florence2 import Florence2
from florence2.engine.scheduler import Scheduler
from florence2.errors import RequestError
from florence2_demo.labeled_scenes import write_labeled_scenes
from florence2_demo.scene import make_scene
from serve.cli.loading import OneModel
from serve.cli.main import main
from serve.labeled_data import open_labeled
from serve.labeling.settings import label_settings
from serve.model_service import Deployed, ModelChoice
from serve.predict.predictor import Predictor
from serve.settings import Tiling
from serve.tuning.asking import ask_all
from serve.tuning.plan import TuningPlan

SCENES = range(9_100, 9_112)
GROUNDING = "<CAPTION_TO_PHRASE_GROUNDING>"
BROKEN = "scene_009100.png"


@pytest.fixture(scope="module")
def models():
    model = Florence2.load("demo", device="cpu")
    scheduler = Scheduler(model.engine, has_clicks=False)
    yield OneModel(Deployed(ModelChoice("demo"), model, scheduler))
    scheduler.close()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_labeled_scenes(tmp_path_factory.mktemp("scenes"), map(make_scene, SCENES))


@pytest.fixture
def run(models, monkeypatch, tmp_path):
    """Runs the command with the model that is loaded already; its exit code."""
    monkeypatch.setattr("serve.cli.tune.one_model", lambda *_: models)

    def run(*words, out="settings.yaml") -> int:
        with pytest.raises(SystemExit) as ended:
            main(["tune", *map(str, words), "--model", "demo", "--out", str(tmp_path / out)])
        return ended.value.code or 0

    return run


@pytest.fixture
def broken(scenes, tmp_path):
    """The same labels, and one image that lost its end after its size was read."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in scenes.parent.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / BROKEN).write_bytes((folder / BROKEN).read_bytes()[:200])
    return folder / scenes.name


def test_the_winning_settings_are_written_for_label_and_serve(run, broken, tmp_path, capsys):
    star = "--class", "moon=thing; red moon; moon", "--class", "tree"
    assert run(broken, *star, "--tiling", "off") == 1
    out, err = capsys.readouterr()
    content = (tmp_path / "settings.yaml").read_text(encoding="utf-8")
    settings = label_settings(file=tmp_path / "settings.yaml")
    assert settings.mapping == {"moon": ("moon",), "tree": ("tree",)}
    assert settings.task_prompt == GROUNDING
    assert set(yaml.safe_load(content)) <= {
        "task_prompt", "mapping", "class_thresholds", "calibration", "nms_threshold",
    }  # fmt: skip
    assert "# Made by florence2 tune for demo" in content
    assert f"{len(SCENES) - 1} images" in content
    for shown in ("red moon", "chosen: moon", "F1 untuned", "Threshold:", "Mean F1"):
        assert shown in out
    assert BROKEN in err
    assert "counted neither as found nor as missed: 1" in err
    assert "Ignored, because --class does not name them: " in err
    assert "say little" in err
    assert sorted(os.listdir(tmp_path)) == ["broken", "settings.yaml"]


def test_every_view_is_encoded_once_however_many_prompts(models, scenes, monkeypatch):
    runtime = models.current.model.engine.runtime
    models.current.model.engine.cache.clear()
    encoded = []
    encode = runtime.encode_bytes

    def counted(images, table):
        encoded.append(len(images))
        return encode(images, table)

    monkeypatch.setattr(runtime, "encode_bytes", counted)
    monkeypatch.setattr(models.current.model.engine.cache, "max_bytes", 0)
    images = open_labeled(scenes).images[:3]
    prompts = {"moon": ("moon", "red moon", "thing"), "tree": ("tree", "green tree")}
    windows = Tiling((10_000, 200), (0, 50)), Tiling((200, 10_000), (50, 0))
    plan = TuningPlan(prompts, GROUNDING, (None, *windows))
    told = []
    answers = ask_all(Predictor(models), images, plan, told.append)
    assert sum(encoded) == sum(
        1 + (image.size_wh[0] > 200) * -(-(image.size_wh[0] - 50) // 150)
        + (image.size_wh[1] > 200) * -(-(image.size_wh[1] - 50) // 150)
        for image in images
    )  # fmt: skip
    assert (answers.images, answers.failed, sum(told)) == (list(images), [], 3)
    assert answers.found.keys() == {
        (tiling, name, text)
        for tiling in range(3) for name, texts in prompts.items() for text in texts
    }  # fmt: skip


def test_an_image_that_cannot_be_asked_about_is_named_and_the_others_are_asked(models, scenes):
    images = list(open_labeled(scenes).images[:4])
    images[1] = replace(images[1], path=images[1].path.with_name("gone.png"))
    plan = TuningPlan({"moon": ("moon",)}, GROUNDING)
    answers = ask_all(Predictor(models), images, plan)
    assert [one.name for one in answers.failed] == [images[1].name]
    assert "gone.png" in answers.failed[0].reason
    assert answers.images == [images[0], *images[2:]]
    assert [len(found) for found in answers.found.values()] == [3]
    windows = replace(plan, tilings=(None, Tiling((32, 32), (31, 31))))
    with pytest.raises(RequestError, match="at most 1024 tiles"):
        ask_all(Predictor(models), images[:1], windows)


def test_ctrl_c_says_what_is_known_so_far_and_writes_nothing(run, scenes, tmp_path, capsys):
    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)

    words = [scenes, "--class", "moon", "--tiling", "off"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serve.tuning.asking.BATCH", 4)
        answers = Predictor.answers
        patch.setattr(
            Predictor, "answers", lambda *args: (interrupt(), answers(*args))[1]
        )  # fmt: skip
        assert run(*words) == 130
    out, err = capsys.readouterr()
    assert "chosen: moon" in out
    assert "this is what 4 of 12 images say, and nothing is written" in err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--class", "mon"], "Unknown class 'mon'. Did you mean 'moon'?"),
        (["--class", "=moon"], "'=moon' is neither"),
        (["--class", "moon=star", "--class", "tree=star"], "A prompt belongs to one class"),
        (["--class", "moon", "--optimise", "map"], "f1, precision or recall@P"),
        (["--class", "moon", "--nms", "2"], "nms_threshold is a number from 0 to 1, or off"),
        (["--class", "moon", "--nms", ","], "--nms names thresholds"),
        (["--class", "moon", "--tiling", "7"], "tiling"),
        (["--class", "moon", "--task", "<OD>"], "takes text and finds places"),
        (["--split", "val"], "val"),
    ],
)
def test_what_cannot_be_tuned_is_one_sentence(run, scenes, tmp_path, capsys, words, message):
    assert run(scenes, *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_there_stays_unless_told(run, scenes, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text("text: dog\n", encoding="utf-8")
    words = scenes, "--class", "moon", "--tiling", "off", "--images", "2"
    assert run(*words) == 2
    assert "is there already; add --overwrite" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == "text: dog\n"
    assert run(*words, "--overwrite") == 0
    assert "moon" in yaml.safe_load(file.read_text(encoding="utf-8"))["mapping"]
    assert run(*words, out="missing/settings.yaml") == 2
    assert "a folder that exists" in capsys.readouterr().err


def test_scenes_are_written_as_they_are_labeled(scenes):
    content = json.loads(scenes.read_text(encoding="utf-8"))
    data = open_labeled(scenes)
    assert len(data.images) == len(content["images"]) == len(SCENES)
    assert sum(len(image.objects) for image in data.images) == len(content["annotations"])
    assert data.left_out == ()

"""Fine-tunes in team files: uploaded, listed on the page, deployed by the SDK's own clients."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from pathlib import Path, PurePosixPath
from threading import Timer
from threading import enumerate as enumerate_threads

import pytest
import requests
import torch
import yaml
from contract_calls import CITY, DEMO, TRAINING, assert_refused, classes_in
from platform_double import TASK_ID
from platform_state import TEAM_ID, WORKSPACE_ID
from safetensors.torch import save_file

from florence2.errors import FlorenceError, RequestError
from serve.app import Florence2App
from serve.cli.main import main
from serve.gui import Florence2Gui
from serve.model_service import params_for_name
from serve.platform.experiments import INFO_NAME, write_experiment
from serve.platform.team_files import find_experiments, upload_experiment

# isort: split
from supervisely.app.singleton import Singleton
from supervisely.nn.experiments import get_experiment_info_by_artifacts_dir, get_experiment_infos
from supervisely.nn.inference.gui.serving_gui import ServingGUI
from supervisely.nn.inference.inference import AutoRestartInfo

SETTINGS = {
    "task_prompt": "<CAPTION_TO_PHRASE_GROUNDING>",
    "mapping": {"vehicle": ["car", "house"], "moon": "moon"},
}
DEPLOYED_DEMO = {"deploy_params": {"device": "cpu"}, "model_name": "demo"}


@pytest.fixture
def checkpoint(api, platform, experiment) -> str:
    """Its path in the team files."""
    return upload_experiment(api, TEAM_ID, experiment)


@pytest.fixture
def demo_again(app):
    """The app of all tests has the demo checkpoint afterwards."""
    yield
    assert app.post("deploy_from_api", DEPLOYED_DEMO).status_code == 200


def folder_of(checkpoint: str) -> str:
    return checkpoint.rpartition("/checkpoints/")[0]


def by_path(api, checkpoint):
    api.nn.deploy(checkpoint, device="cpu", workspace_id=WORKSPACE_ID, agent_id=TASK_ID)


def by_session(api, checkpoint):
    api.nn.connect(TASK_ID).load(checkpoint, device="cpu")


def by_experiment(api, checkpoint):
    info = get_experiment_info_by_artifacts_dir(api, TEAM_ID, folder_of(checkpoint))
    api.nn._deploy_api.load_custom_model_from_experiment_info(TASK_ID, info, device="cpu")


def test_a_fine_tune_is_deployed_says_what_it_is_and_gives_way_again(
    api, app, running_app, platform, checkpoint, demo_again
):
    by_path(api, checkpoint)
    info = app.post("get_deploy_info").json()
    expected = {
        "model_source": "Custom models",
        "checkpoint_name": "best.pt",
        "custom_checkpoint_path": checkpoint,
        "checkpoint_url": f"/files/{platform.state.files[checkpoint].id}",
        "model_name": "Florence-2-base",
        "architecture": "Florence-2",
        "task_type": "prompt-based object detection",
        "device": "cpu",
    }
    assert {name: info[name] for name in expected} == expected
    session = app.post("get_session_info").json()
    assert session["model_name"] == "street <b>"
    model = api.nn.connect(TASK_ID)
    assert model.get_classes()[:2] == ["vehicle", "moon"]
    offered = yaml.safe_load(model.get_settings())
    assert {name: offered[name] for name in SETTINGS} == SETTINGS
    # Nothing said is what it was trained for; a question of one's own is that question.
    own, back, other = (
        app.upload_images([CITY], settings)[0]["annotation"]
        for settings in ({}, offered, {"text": "car"})
    )
    assert set(classes_in(own)) == {"vehicle", "moon"}
    assert classes_in(back) == classes_in(own)
    assert classes_in(other) == ["car", "car"]

    app.post("deploy_from_api", DEPLOYED_DEMO)
    assert app.post("get_deploy_info").json()["model_source"] == "Pretrained models"
    assert "vehicle" not in model.get_classes()[:2]
    assert yaml.safe_load(model.get_settings())["task_prompt"] is None
    assert classes_in(app.upload_images([CITY], {"text": "car"})[0]["annotation"]) == ["car", "car"]


@pytest.mark.parametrize("deploy", [by_session, by_experiment])
def test_what_is_here_already_is_not_downloaded_again(
    api, app, running_app, platform, checkpoint, demo_again, monkeypatch, deploy
):
    monkeypatch.setenv("TEAM_ID", str(TEAM_ID))
    deploy(api, checkpoint)
    assert app.post("get_deploy_info").json()["custom_checkpoint_path"] == checkpoint
    before = platform.count("file-storage.download")
    deploy(api, checkpoint)
    downloaded = [
        call.payload["path"].rpartition("/")[2]
        for call in platform.calls
        if call.method == "file-storage.download"
    ][before:]
    assert set(downloaded) == {"experiment_info.json", "model_meta.json"}


def test_a_version_that_was_superseded_is_removed_once_the_new_one_answers(
    api, app, running_app, platform, demo_again, tmp_path
):
    out = tmp_path / "harbour"
    shutil.copytree(DEMO, out / "best")
    (out / "training.json").write_text(json.dumps(TRAINING), encoding="utf-8")
    checkpoint = upload_experiment(api, TEAM_ID, write_experiment(out))
    by_path(api, checkpoint)
    [fine_tunes] = Path(running_app.environment["SLY_APP_DATA_DIR"]).rglob("fine-tunes")
    home = fine_tunes / str(TEAM_ID)
    versions = home.joinpath(*PurePosixPath(folder_of(checkpoint)).parts[1:])
    [first] = versions.iterdir()
    another = home / "experiments" / "other" / "0123456789ab" / "best" / "model.safetensors"
    left = [first / "best" / "model.safetensors.1-1.part", another.with_suffix(".1-1.part")]
    for file in (another, *left):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"part")
    written = another.with_suffix(".2-2.part")

    (out / "best" / "notes.json").write_text("{}")
    upload_experiment(api, TEAM_ID, write_experiment(out))
    path = f"{folder_of(checkpoint)}/checkpoints/best/notes.json"
    right = platform.state.files[path].content
    # One that is refused takes nothing away.
    platform.state.files[path].content = b"[]"
    files = {"checkpoint": checkpoint}
    params = {"model_source": "Custom models", "model_files": files, "device": "cpu"}
    refused = app.post("deploy_from_api", {"deploy_params": params})
    assert_refused(refused, says="changed in the team files")
    assert first.is_dir()
    platform.state.files[path].content = right
    with written.open("wb") as stream:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX)
        by_path(api, checkpoint)
        [second] = versions.iterdir()
        assert second != first
        assert (second / "best" / "notes.json").is_file()
        assert [one.exists() for one in (another, written, *left)] == [True, True, False, False]
    assert app.post("get_deploy_info").json()["custom_checkpoint_path"] == checkpoint


def write_training(out, base):
    """A training of an adapter that changes the base a little."""
    (out / "best").mkdir(parents=True)
    width = json.loads((DEMO / "config.json").read_text())["text_config"]["d_model"]
    layer = "base_model.model.model.language_model.encoder.layers.0.self_attn.q_proj"
    halves = {"A": torch.ones(2, width), "B": torch.full((width, 2), 1e-4)}
    named = {f"{layer}.lora_{half}.weight": tensor for half, tensor in halves.items()}
    save_file(named, out / "best" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    settings["base_model_name_or_path"] = base
    (out / "best" / "adapter_config.json").write_text(json.dumps(settings))
    (out / "training.json").write_text(json.dumps({**TRAINING, "method": "lora"}))
    return out


@pytest.mark.parametrize("base", ["demo", str(DEMO)], ids=["by name", "a folder"])
def test_an_adapter_is_deployed_with_its_base(api, app, platform, tmp_path, demo_again, base):
    out = write_training(tmp_path / "adapter", base)
    checkpoint = upload_experiment(api, TEAM_ID, write_experiment(out))
    params = {"model_source": "Custom models", "model_files": {"checkpoint": checkpoint}}
    answer = app.post("deploy_from_api", {"deploy_params": {**params, "device": "cpu"}})
    assert answer.status_code == 200, answer.text
    session = app.post("get_session_info").json()
    assert session["model_name"] == "adapter"
    weights = (out / "best" / "adapter_model.safetensors").read_bytes()
    assert session["adapter"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert "vehicle" in classes_in(app.upload_images([CITY], {})[0]["annotation"])


def test_an_adapter_of_a_base_that_nobody_allowed_is_refused(api, app, tmp_path, demo_again):
    out = write_training(tmp_path / "adapter", "someone/huge-model")
    checkpoint = upload_experiment(api, TEAM_ID, write_experiment(out))
    params = {"model_source": "Custom models", "model_files": {"checkpoint": checkpoint}}
    answer = app.post("deploy_from_api", {"deploy_params": {**params, "device": "cpu"}})
    assert answer.status_code == 400
    assert "this one names someone/huge-model; upload it with its base" in answer.text
    assert app.post("get_session_info").json()["model_name"] == "demo"


def changed(name, content):
    def change(platform, folder):
        platform.state.files[f"{folder}/{name}"].content = content

    return change


def removed(name):
    return lambda platform, folder: platform.state.files.pop(f"{folder}/{name}")


def told(**values):
    """The experiment says something else."""

    def change(platform, folder):
        file = platform.state.files[f"{folder}/{INFO_NAME}"]
        file.content = json.dumps(json.loads(file.content) | values).encode()

    return change


def cut(platform, folder):
    # Of another content, or it is here already.
    path = f"{folder}/checkpoints/best/merges.txt"
    platform.state.files[path].content += b"\n"
    info = platform.state.files[f"{folder}/{INFO_NAME}"]
    content = json.loads(info.content)
    content.pop("florence2")
    info.content = json.dumps(content).encode()
    platform.faults.cut_file(path)


INNER = "checkpoints/best/model.safetensors"
DAMAGED = {
    "no experiment": (removed(INFO_NAME), "There is no /experiments/"),
    "no checkpoint": (removed("checkpoints/best.pt"), "best.pt in the team files"),
    "no JSON": (changed(INFO_NAME, b"{"), "is damaged: it is no JSON"),
    "a list": (changed(INFO_NAME, b"[]"), "instead of an object"),
    "nothing in it": (changed(INFO_NAME, b"{}"), "it is incomplete"),
    "another framework's": (told(framework_name="RT-DETRv2"), "was trained with 'RT-DETRv2'"),
    "no files": (told(model_files={}), "names no files"),
    "a path out of it": (told(model_files={"a": "../a"}), "no file inside of it"),
    "another checkpoint": (told(best_checkpoint="last.pt"), "lists the files of 'last.pt'"),
    "settings of others": (told(florence2={"settings": {"conf": "a"}}), "cannot be used"),
    "no weights": (removed(INNER), "is missing in the team files"),
    "shorter weights": (changed(INNER, b"short"), "has 5 bytes in the team files instead of"),
    "other classes": (changed("model_meta.json", b'{"classes": 3}'), "classes of the experiment"),
    "changed": (changed("checkpoints/best/merges.txt", b"?" * 4050), "changed in the team files"),
    "cut on its way": (cut, "when it is downloaded"),
    "foreign files": (
        told(model_files={"config": "model_meta.json"}, florence2={}),
        "holds no config.json",
    ),
}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGED.values(), ids=DAMAGED)
def test_an_experiment_that_is_damaged_is_refused_and_the_model_runs_on(
    app, platform, checkpoint, damage, sentence
):
    damage(platform, folder_of(checkpoint))
    state = {
        "deploy_params": {
            "model_source": "Custom models",
            "model_files": {"checkpoint": checkpoint},
            "device": "cpu",
        }
    }
    assert_refused(app.post("deploy_from_api", state), says=sentence)
    assert app.post("get_deploy_info").json()["checkpoint_name"] == "demo"
    assert app.get("is_ready").status_code == 200


@pytest.mark.parametrize("path", [None, 5, "best.pt", "/experiments/../checkpoints/best.pt", {}])
def test_a_checkpoint_that_is_no_path_of_an_experiment_is_refused(app, path):
    params = {"model_source": "Custom models", "model_files": {"checkpoint": path}}
    answer = app.post("deploy_from_api", {"deploy_params": params})
    assert_refused(answer, 400, says="named by its checkpoint in team files")


def test_a_platform_that_fails_is_told_about(app, platform, checkpoint):
    platform.faults.fail("file-storage.list", times=50, status=503)
    params = {"model_source": "Custom models", "model_files": {"checkpoint": checkpoint}}
    answer = app.post("deploy_from_api", {"deploy_params": params})
    assert_refused(answer, 424, says="The platform did not give")


# Uploading


def test_an_upload_that_breaks_off_is_not_listed_and_goes_on_where_it_was(
    api, platform, experiment
):
    platform.faults.fail("file-storage.bulk.upload", call=5, times=3)
    with pytest.raises(requests.RequestException):
        upload_experiment(api, TEAM_ID, experiment)
    assert find_experiments(api, TEAM_ID) == []
    assert len(platform.state.files) == 4
    before, told = platform.count("file-storage.bulk.upload"), []
    platform.faults.fail("file-storage.bulk.upload")
    upload_experiment(api, TEAM_ID, experiment, told.append)
    files = [path for path in experiment.rglob("*") if path.is_file()]
    assert platform.count("file-storage.bulk.upload") - before == len(files) - 4 + 1
    assert told[-1].done_bytes == told[-1].total_bytes == sum(one.stat().st_size for one in files)
    uploaded = [one.path.rpartition("/")[2] for one in platform.state.files.values()]
    assert uploaded[-1] == INFO_NAME
    [listed] = find_experiments(api, TEAM_ID)
    assert listed.training.metric == ("mAP", 0.8351)


@pytest.fixture
def uploads(platform, api, monkeypatch, tmp_path, capsys):
    """``florence2 upload-model`` of a folder: its status, and what it prints."""
    environment = {
        "SERVER_ADDRESS": platform.address,
        "API_TOKEN": api.token,
        "HOME": str(tmp_path),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TEAM_ID", raising=False)

    def upload(out: Path, *options: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["upload-model", str(out), *options])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return upload


def test_a_training_is_uploaded_by_a_command(api, platform, experiment, uploads, monkeypatch):
    status, printed, said = uploads(experiment.parent, "--team", str(TEAM_ID), "--name", "Streets")
    assert status == 0, said
    assert printed.strip() in platform.state.files
    assert [one.info.experiment_name for one in find_experiments(api, TEAM_ID)] == ["Streets"]
    monkeypatch.setenv("TEAM_ID", "99")
    status, printed, said = uploads(experiment.parent)
    assert (status, printed) == (2, "")
    assert "it refused the token or this account's rights" in said
    monkeypatch.delenv("API_TOKEN")
    status, printed, said = uploads(experiment.parent)
    assert status == 2
    assert "Uploading needs a platform and a team" in said


def test_the_sdk_lists_it_and_finds_its_files(api, platform, checkpoint):
    [info] = get_experiment_infos(api, TEAM_ID, "Florence-2")
    assert folder_of(checkpoint) + "/" == info.artifacts_dir
    named = [info.model_meta, info.hyperparameters, *info.checkpoints, *info.model_files.values()]
    assert all(info.artifacts_dir + name in platform.state.files for name in named)
    assert info.evaluation_metrics == {"mAP": 0.8351}


# The page


@pytest.fixture
def page(api, platform, monkeypatch, tmp_path):
    """Makes the app with its page in this process."""
    monkeypatch.setattr(Singleton, "_instances", {})
    environment = {
        "SERVER_ADDRESS": platform.address,
        "API_TOKEN": api.token,
        "TEAM_ID": str(TEAM_ID),
        "SLY_APP_DATA_DIR": str(tmp_path),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    made = []

    def make() -> Florence2App:
        made.append(Florence2App(use_gui=True, use_serving_gui_template=True))
        return made[-1]

    yield make
    for one in made:
        one.shutdown_model()


def rows_of(app: Florence2App) -> list:
    return app.gui.experiment_selector._rows


FOREIGN = {
    "/experiments/a/1_RT-DETRv2/experiment_info.json": {},
    "/experiments/a/2_Florence-2/experiment_info.json": ["no object"],
    "/experiments/a/3_Florence-2/experiment_info.json": {"framework_name": "Florence-2"},
    "/experiments/notes.txt": "",
}


def test_the_page_lists_fine_tunes_with_task_classes_and_metric(page, platform, checkpoint):
    for path, content in FOREIGN.items():
        platform.state.add_file(TEAM_ID, path, json.dumps(content).encode())
    # A copy of it, whose task and project the SDK's own list cannot take.
    told(task_id=None, project_id="none")(platform, folder_of(checkpoint))
    copied = platform.state.files[f"{folder_of(checkpoint)}/{INFO_NAME}"].content
    platform.state.add_file(TEAM_ID, f"/experiments/b/4_Florence-2/{INFO_NAME}", copied)
    app = page()
    texts = {row._experiment_info.artifacts_dir: row._model_wiget.text for row in rows_of(app)}
    assert texts.keys() == {f"{folder_of(checkpoint)}/", "/experiments/b/4_Florence-2/"}
    for text in texts.values():
        assert "<b>street &lt;b&gt;</b>" in text
        assert "Florence-2-base" in text
        assert "&lt;CAPTION_TO_PHRASE_GROUNDING&gt; · 2 classes: vehicle, moon · mAP 0.835" in text


def test_a_fine_tune_that_is_chosen_on_the_page_is_served_and_comes_back_after_a_restart(
    page, api, platform, experiment, tmp_path
):
    app = page()
    assert rows_of(app) == []
    checkpoint = upload_experiment(api, TEAM_ID, experiment)
    app.gui.list_again()
    app.gui.model_source_tabs.set_active_tab("Custom models")
    app.gui.experiment_selector.table.select_row(0)
    app.gui.deploy_with_current_params()
    assert app.deployment.current.model.name == "street <b>"
    assert app.checkpoint_info.custom_checkpoint_path == checkpoint
    assert app.get_classes()[:2] == ["vehicle", "moon"]
    assert "# What to look for" in app.custom_inference_settings
    [shown] = [one for one in app.custom_inference_settings.splitlines() if "mapping:" in one]
    assert shown == 'mapping: {"vehicle": ["car", "house"], "moon": "moon"}'

    kept = json.loads(json.dumps(app._deploy_params))
    app.shutdown_model()
    assert app.get_classes()[0] == "object"
    shutil.rmtree(tmp_path / "models")
    app.autorestart = AutoRestartInfo(kept)
    app._deploy_on_autorestart()
    assert app.get_classes()[:2] == ["vehicle", "moon"]


def test_a_session_whose_model_cannot_be_had_again_starts_no_other(page, api, platform):
    app = page()
    checkpoint = "/experiments/gone <b>/1_Florence-2/checkpoints/best.pt"
    app.autorestart = AutoRestartInfo(
        {
            "model_source": "Custom models",
            "model_files": {"checkpoint": checkpoint},
            "model_info": {},
            "device": "cpu",
            "runtime": "PyTorch",
        }
    )
    app.gui.is_starting = True
    with pytest.raises(FlorenceError):
        app._deploy_on_autorestart()
    app.gui.deploy_with_current_params()
    assert not app.deployment.is_deployed
    said = app.gui._before_deploy_msg.text
    assert said.startswith("The model that this session had before it was started again could not")
    assert "/experiments/gone &lt;b&gt;" in said
    # Whoever chooses another one gets it.
    app.gui.is_starting = False
    app.sdk.load(params_for_name("demo", app.pretrained_models, "cpu"))
    assert app.deployment.current.model.name == "demo"
    assert app.gui._before_deploy_msg.text == "Deploy model to see the information."


@pytest.mark.parametrize("has_model", [False, True])
def test_with_several_gpus_people_have_time_to_choose_one_and_are_told(
    page, monkeypatch, has_model
):
    chosen = []
    monkeypatch.setattr(ServingGUI, "deploy_with_current_params", lambda gui: chosen.append(gui))
    app = page()
    app.gui.is_starting, app.gui.autostart_delay_s = True, 0.3
    app.gui.deploy_with_current_params()
    assert chosen == []
    assert "choose one and press Serve" in app.gui._before_deploy_msg.text
    # Nothing waits that would hold a session which is ended.
    assert all(one.daemon for one in enumerate_threads() if isinstance(one, Timer))
    app.gui.is_starting, app.gui.has_model = False, lambda: has_model
    time.sleep(0.6)
    assert chosen == ([] if has_model else [app.gui])


def test_a_program_deploys_by_a_path_in_team_files(page, checkpoint):
    app = page()
    app._deploy_headless(checkpoint, device="cpu")
    assert app.checkpoint_info.custom_checkpoint_path == checkpoint


def test_serving_without_a_choice_is_refused_with_a_sentence(page):
    app = page()
    app.gui.model_source_tabs.set_active_tab("Custom models")
    with pytest.raises(RequestError, match="No custom model is chosen"):
        app.gui.deploy_with_current_params()
    assert "No custom model is chosen" in app.gui._before_deploy_msg.text


@pytest.mark.parametrize("method", ["file-storage.list", "file-storage.download"])
def test_team_files_that_cannot_be_listed_leave_the_page_with_an_empty_tab(
    page, platform, checkpoint, method
):
    platform.faults.fail(method, times=50)
    app = page()
    assert rows_of(app) == []
    assert app.gui.model_source == "Pretrained models"


def test_team_files_that_are_not_listed_in_time_keep_nobody_waiting(page, platform, monkeypatch):
    monkeypatch.setattr(Florence2Gui, "list_patience_s", 0.2)
    with platform.faults.held("file-storage.list"):
        app = page()
        assert rows_of(app) == []
    assert not app.gui.unlisted.is_hidden()


def test_a_list_that_cannot_be_made_again_stays_and_is_said(page, platform, checkpoint):
    app = page()
    assert len(rows_of(app)) == 1
    assert app.gui.unlisted.is_hidden()
    platform.faults.fail("file-storage.list", times=50)
    app.gui.list_again()
    assert len(rows_of(app)) == 1
    assert not app.gui.unlisted.is_hidden()


def test_projects_that_cannot_be_shown_leave_their_fine_tunes_in_the_list(
    page, platform, checkpoint
):
    told(project_id=12)(platform, folder_of(checkpoint))
    platform.faults.fail("projects.list", times=50)
    assert len(rows_of(page())) == 1

"""Runs that go on where an earlier one stopped: killed, cancelled, refused, or thought alive."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import forked_processes
import psutil
import pytest
from app_server import ROOT, SDK_ENVIRONMENT
from contract_calls import BIKE, CITY, HOME, STREET, wait_for
from html_pages import Tags
from platform_double import TOKEN
from platform_state import TEAM_ID
from requests import HTTPError

from florence2.records import Failure
from serve.cli.main import main
from serve.platform import lease, run_records, run_store, team_files
from serve.platform.images import Target
from serve.platform.lease import Lease
from serve.platform.request_state import Destination
from serve.platform.run_records import RunRecord
from serve.platform.run_store import CUSTOM_DATA_KEY
from serve.platform.undo import undo_run
from serve.sdk import LabelingStatus, sly
from serve.settings import parse_settings

NUM_IMAGES = 6
PERSONS = sly.ObjClass("thing", sly.Rectangle)
OPTIONS = ["--model", "demo", "--device", "cpu", "--num-beams", "1", "--batch", "2"]
SETTINGS = {"task_prompt": "<OD>", "num_beams": 1}


@pytest.fixture
def project(platform):
    """A project of some images, none of them labeled: its id, and its images' ids."""
    state = platform.state
    made = state.add_project("night")
    dataset = state.add_dataset(made.id, "all")
    scenes = (CITY, STREET, HOME, BIKE)
    images = [
        state.add_image(dataset.id, f"{number}.jpg", scenes[number % 4].read_bytes()).id
        for number in range(NUM_IMAGES)
    ]
    return made.id, images


@pytest.fixture
def run(app, project):
    """A run over the project, waited for, in batches of two: its progress, and its results."""

    def start(**state):
        return app.done("inference_project_id_async", asked_for(project, **state))

    return start


def asked_for(project, **state):
    settings = {**SETTINGS, **state.pop("settings", {})}
    own = {"project_id": project[0], "upload_mode": "append", "batch_size": 2}
    return {**own, "settings": settings, **state}


@pytest.fixture
def in_background(app, platform, project):
    """A run by single images, one of whose uploads is on its way: inside, it is held up there."""

    @contextmanager
    def start(method="annotations.bulk.add", **state):
        answer = app.post("inference_project_id_async", asked_for(project, batch_size=1, **state))
        uuid = answer.json()["inference_request_uuid"]
        wait_for(lambda: platform.count(method) >= 1, "no call")
        with platform.faults.held(method):
            before = platform.count(method)
            wait_for(lambda: platform.count(method) > before, "no further call")
            yield uuid

    return start


@pytest.fixture
def command(api, platform, project, monkeypatch, capsys):
    """``florence2 label --project`` in this process: its exit code and what it prints."""
    monkeypatch.setenv("SERVER_ADDRESS", platform.address)
    monkeypatch.setenv("API_TOKEN", TOKEN)

    def call(*words, project_id=None):
        capsys.readouterr()
        named = ["--project", str(project_id or project[0])]
        with pytest.raises(SystemExit) as ended:
            main(["label", *named, *OPTIONS, *words])
        heard = capsys.readouterr()
        return ended.value.code, heard.out + heard.err

    return call


def runs(platform, project_id):
    return platform.state.project(project_id).custom_data.get(CUSTOM_DATA_KEY, {})


def lines_of(platform, project_id, run_id):
    folder = f"/florence2/runs/{project_id}/{run_id}"
    return {
        row["image_id"]: row
        for file in platform.state.files_in(TEAM_ID, folder, recursive=True)
        if "/images-" in file.path
        for row in map(json.loads, file.content.decode().splitlines())
    }


def check_each_once(platform, project, run_id):
    """Every image has the run's labels, none of them twice, and a line that says so."""
    project_id, images = project
    lines = lines_of(platform, project_id, run_id)
    assert set(lines) == set(images)
    for image_id in images:
        objects = platform.state.image(image_id).annotation["objects"]
        kinds = [(one["classTitle"], json.dumps(one["points"])) for one in objects]
        assert len(set(kinds)) == len(kinds), "labeled twice"
        assert len(lines[image_id].get("labels", ())) == len(objects) > 0
        assert lines[image_id]["outcome"] == "labeled"


def environment(platform):
    own = {"SERVER_ADDRESS": platform.address, "API_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    return {**os.environ, **SDK_ENVIRONMENT, **own, "PYTHONPATH": path}


def label_command(project_id, *words):
    command = [sys.executable, "-m", "serve.cli.main", "label", "--project", str(project_id)]
    return [*command, *OPTIONS, *words]


@contextmanager
def labeling(folder, platform, project_id, *words):
    """``florence2 label --project`` in a process of its own, and the file with what it says."""
    heard = folder / "said.txt"
    with heard.open("wb") as said:
        command = label_command(project_id, *words)
        process = forked_processes.start(command, environment(platform), folder, said, said)
    try:
        yield process, heard
    finally:
        process.kill()


SOAK = pytest.mark.soak
KILLED = {
    "labels with the tag": ((), {}, None),
    "labels without it": ((), {"run_tag": False}, SOAK),
    "captions, which have none": (("--task", "<CAPTION>"), {"task_prompt": "<CAPTION>"}, SOAK),
}


@pytest.mark.parametrize(
    ("words", "settings"),
    [pytest.param(*one, marks=mark or (), id=name) for name, (*one, mark) in KILLED.items()],
)
def test_a_killed_command_is_gone_on_with_by_the_app_and_no_image_labeled_twice(
    run, platform, project, tmp_path, words, settings
):
    project_id, images = project
    upload = "annotations.bulk.add"
    if "run_tag" in settings:
        (tmp_path / "settings.yaml").write_text("run_tag: false\ntask_prompt: <OD>\n")
        words = ("--settings", str(tmp_path / "settings.yaml"))
    words = ("--batch", "1", *words)
    with labeling(tmp_path, platform, project_id, *words) as (command, heard):
        wait_for(lambda: platform.count(upload) >= 1 or command.poll() is not None, "no upload")
        assert command.poll() is None, heard.read_text()
        with platform.faults.held(upload):
            before = platform.count(upload)
            wait_for(lambda: platform.count(upload) > before, "no further upload")
            command.kill()
        # What was on its way arrives after its sender is gone.
        time.sleep(0.2)
    [(run_id, cut_off)] = runs(platform, project_id).items()
    assert cut_off["state"] == "running"
    assert f"process {command.pid}" in cut_off["holder"]
    labeled = {
        image.id
        for image in platform.state.images.values()
        if image.annotation["objects"] or image.annotation["tags"]
    }
    assert 0 < len(labeled) < NUM_IMAGES
    before = len(platform.calls)

    progress, _ = run(resume=True, settings=settings)

    assert progress["exception"] is None
    [(same, manifest)] = runs(platform, project_id).items()
    assert (same, manifest["state"], manifest["resumed"]) == (run_id, "done", 1)
    assert manifest["counts"]["images"] == manifest["counts"]["labeled"] == NUM_IMAGES
    if "task_prompt" in settings:
        tags = [len(platform.state.image(one).annotation["tags"]) for one in images]
        assert tags == [1] * NUM_IMAGES
    else:
        check_each_once(platform, project, run_id)
    calls = platform.calls[before:]
    uploads = [at for at, call in enumerate(calls) if call.method == upload]
    # Afterwards images come for their labels on the page.
    downloads = [one for one in calls[: uploads[-1]] if one.method == "images.bulk.download"]
    asked = {image_id for call in downloads for image_id in call.payload["imageIds"]}
    assert not asked & labeled, "done images were asked about again"


@pytest.mark.soak
def test_workers_of_a_cluster_label_a_project_and_one_that_ends_loses_no_image(platform, project):
    pytest.importorskip("ray")
    project_id, _ = project
    upload = "annotations.bulk.add"
    words = ("--batch", "1", "--ray", "local", "--workers", "2")
    with subprocess.Popen(
        label_command(project_id, *words),
        env=environment(platform),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as command:
        wait_for(lambda: platform.count(upload) >= 1 or command.poll() is not None, "no upload")
        assert command.poll() is None, command.communicate()[0]
        with platform.faults.held(upload):
            killed = [
                one
                for one in psutil.Process(command.pid).children(recursive=True)
                if "_Answering" in " ".join(one.cmdline())
            ]
            killed[0].kill()
        said, _ = command.communicate(timeout=240)
    assert command.returncode == 0, said
    [run_id] = runs(platform, project_id)
    check_each_once(platform, project, run_id)


def page_of(platform, project_id, run_id):
    path = f"/florence2/runs/{project_id}/{run_id}/report.html"
    return "".join(Tags(platform.state.files[path].content.decode()).text)


def test_ctrl_c_ends_the_command_after_the_batch_and_the_next_one_goes_on(
    command, platform, project
):
    project_id, _ = project

    def press():
        # Few batches are asked about before the first one is uploaded.
        with platform.faults.held("annotations.bulk.add"):
            held.set()
            wait_for(lambda: platform.count("annotations.bulk.add") >= 1, "no upload")
            os.kill(os.getpid(), signal.SIGINT)
            # It is handled by the main thread, once that has its turn.
            time.sleep(0.5)

    held = threading.Event()
    threading.Thread(target=press).start()
    held.wait()
    code, said = command("--batch", "1")
    assert code == 130, said
    assert "images are still to do; go on with:" in said
    assert "florence2 label --project" in said
    [(run_id, manifest)] = runs(platform, project_id).items()
    assert manifest["state"] == "stopped"
    num_done = manifest["counts"]["images"]
    assert 0 < num_done < NUM_IMAGES
    page = page_of(platform, project_id, run_id)
    assert f"florence2 label --project {project_id}" in page
    assert f"The run was started in {Path.cwd()} on {socket.gethostname()}" in page
    assert "resume" not in page, "which is nothing to be typed"

    code, said = command()
    assert code == 0, said
    assert f"Going on with run {run_id}" in said
    assert f"{NUM_IMAGES} labeled" in said
    assert f"this run: {NUM_IMAGES - num_done} images" in said
    check_each_once(platform, project, run_id)


@pytest.mark.parametrize(
    "mode", ["append", pytest.param("iou_merge", marks=SOAK), "skip_labeled", "replace_own"]
)
def test_labels_that_were_written_and_not_noted_are_found_by_their_tag(
    run, platform, project, mode
):
    project_id, images = project
    state = platform.state
    theirs = state.image(images[0])
    if mode == "skip_labeled":
        state.set_meta(state.project(project_id), sly.ProjectMeta([PERSONS]).to_json())
        label = sly.Label(sly.Rectangle(1, 1, 9, 9), PERSONS).to_json()
        state.set_annotation(theirs, {**theirs.annotation, "objects": [subpixel(label)]})
    run(upload_mode=mode)
    before = {one: json.dumps(state.image(one).annotation["objects"]) for one in images}
    [(run_id, manifest)] = runs(platform, project_id).items()
    # As if it had been killed before it noted anything.
    manifest |= {"state": "running", "counts": {}}
    for path in list(state.files):
        del state.files[path]
    uploads = platform.count("annotations.bulk.add")

    progress, _ = run(upload_mode=mode, resume=True)

    assert progress["exception"] is None
    assert platform.count("annotations.bulk.add") == uploads
    assert {one: json.dumps(state.image(one).annotation["objects"]) for one in images} == before
    lines = lines_of(platform, project_id, run_id)
    if mode == "skip_labeled":
        assert lines.pop(images[0])["outcome"] == "skipped"
    assert {line["outcome"] for line in lines.values()} == {"labeled"}
    assert all(
        len(line["labels"]) == len(state.image(one).annotation["objects"])
        for one, line in lines.items()
    )


def subpixel(label):
    (left, top), (right, bottom) = label["points"]["exterior"]
    points = {"exterior": [[left, top], [right + 1, bottom + 1]], "interior": []}
    return {**label, "points": points, "tags": []}


def test_an_image_that_was_only_to_be_labeled_is_not_taken_for_a_labeled_one(
    run, platform, project
):
    project_id, images = project
    asked = {"settings": {"run_tag": False}, "upload_mode": "skip_labeled"}
    run(**asked)
    state = platform.state
    [(run_id, manifest)] = runs(platform, project_id).items()
    # As if it had been killed while the labels of the first image were sent.
    manifest |= {"state": "running", "counts": {}}
    first = state.image(images[0])
    expected = len(first.annotation["objects"])
    state.set_annotation(first, {**first.annotation, "objects": []})
    folder = f"/florence2/runs/{project_id}/{run_id}"
    intended = {"image_id": images[0], "outcome": "intended", "labels": ["a"], "image_tags": []}
    rows = [*lines_of(platform, project_id, run_id).values()][1:]
    texts = {"images-000000": rows, "unsaved": [intended]}
    for name, lines in texts.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        state.add_file(TEAM_ID, f"{folder}/{name}.jsonl", text.encode())

    progress, _ = run(**asked, resume=True)

    assert progress["exception"] is None
    assert len(state.image(images[0]).annotation["objects"]) == expected
    assert lines_of(platform, project_id, run_id)[images[0]]["outcome"] == "labeled"


def test_labels_without_the_tag_are_found_by_what_was_to_be_written(
    api, platform, project, monkeypatch
):
    """Of three images one was noted, one had its labels sent, and one was only to have them."""
    monkeypatch.setattr(lease, "CONFIRM_S", 0.0)
    project_id, images = project
    state = platform.state
    state.set_meta(state.project(project_id), sly.ProjectMeta([PERSONS]).to_json())
    settings = parse_settings({"run_tag": False})
    first = RunRecord(api, settings, {"name": "demo"}, Destination("append"), 3)

    def write(place, *, is_sent=True, is_noted=True):
        image_id = images[place]
        info = api.image.get_info_by_id(image_id)
        label = sly.Label(sly.Rectangle(place, place, 30, 30), PERSONS)
        annotation = sly.Annotation((info.height, info.width), [label])
        first.before_upload(project_id, image_id, annotation)
        first.keep_intents(project_id)
        if is_sent:
            label.status = LabelingStatus.AUTO
            api.annotation.upload_ann(image_id, annotation)
        if is_noted:
            first.settled(project_id, Target(image_id, project_id, info))

    write(0)
    write(1, is_noted=False)
    write(2, is_sent=False, is_noted=False)
    for file in state.files.values():
        if file.path.endswith("/holder.json"):
            gone = {**json.loads(file.content), "token": "gone", "is_released": True}
            file.content = json.dumps(gone).encode()

    def resumed():
        record = RunRecord(api, settings, {"name": "demo"}, Destination("append"), 3)
        assert record.resume(project_id, images[:3], lambda: False) == {images[0]}
        return record

    with resumed():
        # It is stopped before it gets to any image.
        pass
    with resumed() as failing:
        target = Target(images[1], project_id, api.image.get_info_by_id(images[1]))
        failing.settled(project_id, target, Failure("any", "It fails."))
    with resumed() as last:
        stored = dict(zip(images, api.annotation.download_json_batch(
            state.image(images[0]).dataset_id, images), strict=True))  # fmt: skip
        found = [last.found(one, stored[one], project_id) for one in images[:3]]
    assert found == [False, True, False]
    assert last.counts["labels"] == 1


def test_an_upload_that_failed_or_was_stopped_is_looked_for_by_the_next_run(
    api, project, monkeypatch
):
    project_id, images = project
    settings = parse_settings({"run_tag": False})
    first, second = (
        RunRecord(api, settings, {"name": "demo"}, Destination("append"), 3) for _ in range(2)
    )
    monkeypatch.setattr(lease, "CONFIRM_S", 0.0)
    infos = [api.image.get_info_by_id(one) for one in images[:3]]
    with first:
        for info in infos:
            label = sly.Label(sly.Rectangle(1, 1, 30, 30), PERSONS)
            annotation = sly.Annotation((info.height, info.width), [label])
            first.before_upload(project_id, info.id, annotation)
            first.keep_intents(project_id)
            if info is not infos[2]:
                why = Failure("upload_failed", "No answer.") if info is infos[0] else None
                first.settled(project_id, Target(info.id, project_id, info), why)
    second.resume(project_id, images[:3], lambda: False)
    with second:
        assert [second.is_intended(info.id) for info in infos] == [True, False, True]


def test_team_files_that_take_nothing_are_not_tried_for_every_image(api, project, monkeypatch):
    tries = []

    def write_text(api, team_id, path, text):
        if "/images-" in path:
            tries.append(path)
            raise OSError("full")

    monkeypatch.setattr(run_records, "write_text", write_text)
    record = RunRecord(api, parse_settings({}), {"name": "demo"}, Destination("append"), 1100)
    with record:
        for image_id in range(1, 1101):
            record.settled(project[0], Target(image_id, project[0]))
    assert len(tries) <= 2 + 1


def test_what_is_saved_last_has_the_say_about_an_image(api, platform, project):
    """As after a run whose last lines went into its manifest, and that was killed later."""
    project_id, [first, *_] = project
    folder = f"/florence2/runs/{project_id}/3f9a01bc"
    rows = {
        "images-000000.jsonl": {"outcome": "labeled", "labels": ["a"]},
        "manifest.json": {"outcome": "failed", "labels": ["b"]},
        "unsaved.jsonl": {"outcome": "intended", "labels": ["c"]},
    }
    for expected in ("a", "c"):
        for name, row in rows.items():
            row = {"image_id": first, **row}
            text = json.dumps({"images": [row]} if name == "manifest.json" else row)
            platform.state.add_file(TEAM_ID, f"{folder}/{name}", text.encode())
        [line] = run_store.image_lines(api, project_id, "3f9a01bc")
        assert line.written.labels == (expected,)
        rows.pop("images-000000.jsonl", None)
        platform.state.files.pop(f"{folder}/images-000000.jsonl", None)


def test_the_command_names_what_failed_and_the_same_one_tries_it_again(command, platform, project):
    damaged = project[1][2]
    platform.faults.damage(damaged)
    code, said = command()
    assert code == 1, said
    assert f"{NUM_IMAGES - 1} labeled" in said
    assert "Failed: 1 bad_image" in said
    assert said.count(f"mage {damaged}") == 1, "once, in the report"
    code, said = command("--again", "--max-failures", "0", "--batch", "1")
    assert (code, "Stopped early: The run stopped after" in said) == (1, True), said
    platform.faults.damaged.clear()
    api = sly.Api(platform.address, TOKEN)
    first, stopped = runs(platform, project[0])
    undo_run(api, project[0], stopped)
    code, said = command()
    assert (code, f"Going on with run {first}" in said) == (0, True), said
    check_each_once(platform, project, first)


def test_the_command_tells_every_other_warning_wherever_it_comes_from(
    command, platform, project, monkeypatch
):
    warn = compile("logger.warning('The disk is nearly full.')", "/of/some/package/run.py", "exec")
    settled = RunRecord.settled

    def settled_with_warning(*words, **more):
        exec(warn, {"logger": sly.logger})
        return settled(*words, **more)

    monkeypatch.setattr(RunRecord, "settled", settled_with_warning)
    code, said = command()
    assert code == 0, said
    assert said.count("The disk is nearly full.") == NUM_IMAGES


def test_an_image_that_failed_and_is_gone_is_no_failure_any_more(command, platform, project):
    damaged = project[1][2]
    platform.faults.damage(damaged)
    assert command()[0] == 1
    del platform.state.images[damaged]
    code, said = command()
    assert code == 0, said
    assert " 0 failed" in said


def test_a_run_that_is_whole_is_not_done_again_but_by_again(run, command, platform, project):
    project_id, _ = project
    run()
    before = platform.count("annotations.bulk.add")
    code, said = command()
    assert (code, f"has done all {NUM_IMAGES} images" in said) == (0, True)
    assert platform.count("annotations.bulk.add") == before
    [(run_id, _)] = runs(platform, project_id).items()
    check_each_once(platform, project, run_id)

    dataset = platform.state.add_dataset(project_id, "later")
    added = platform.state.add_image(dataset.id, "later.png", BIKE.read_bytes())
    code, said = command("--dataset", "later", "--again")
    assert (code, "1 labeled" in said) == (0, True)
    assert len(runs(platform, project_id)) == 2
    assert added.annotation["objects"]
    assert len(platform.state.images) == NUM_IMAGES + 1


def test_a_few_images_that_were_labeled_since_do_not_hide_the_run_over_the_project(
    app, run, platform, project
):
    run()
    asked = {**asked_for(project), "images_ids": project[1][:2]}
    del asked["project_id"]
    app.done("inference_batch_ids_async", asked)
    uploads = platform.count("annotations.bulk.add")
    run(resume=True)
    assert platform.count("annotations.bulk.add") == uploads
    assert len(runs(platform, project[0])) == 2


@pytest.mark.parametrize("named", ["../../experiments", ""])
def test_a_run_whose_name_is_no_id_is_not_gone_on_with(run, platform, project, named):
    run()
    stored = runs(platform, project[0])
    [(run_id, manifest)] = stored.items()
    stored[run_id] = {**manifest, "run": named}
    folder = f"/florence2/runs/{project[0]}/"
    file = platform.state.files[f"{folder}{run_id}/manifest.json"]
    file.content = json.dumps({**manifest, "run": named}).encode()
    run(resume=True)
    assert len(runs(platform, project[0])) == 2
    written = list(platform.state.files)
    assert all(path.startswith(folder) for path in written)


def test_a_run_that_another_process_wrote_out_of_the_custom_data_is_not_lost(
    app, api, run, platform, project
):
    """As where two read a project's custom data at once, and each adds its own run."""
    run()
    [(run_id, manifest)] = runs(platform, project[0]).items()
    api.project.update_custom_data(project[0], {}, silent=True)
    [listed] = app.post("list_runs", {"project_id": project[0]}).json()
    assert (listed["run"], listed["state"]) == (run_id, "done")
    uploads = platform.count("annotations.bulk.add")
    run(resume=True)
    assert platform.count("annotations.bulk.add") == uploads
    assert list(runs(platform, project[0])) == [run_id]
    check_each_once(platform, project, run_id)
    earlier = {**manifest, "state": "running", "finished": None, "counts": {}}
    custom_data = {CUSTOM_DATA_KEY: {run_id: earlier}}
    api.project.update_custom_data(project[0], custom_data, silent=True)
    assert [one.state for one in run_store.runs_of(api, project[0])] == ["done"]
    api.project.update_custom_data(project[0], {}, silent=True)
    undone = app.post("undo_run", {"project_id": project[0], "run": run_id}).json()
    assert undone["deleted"] == manifest["counts"]["labels"]
    for lost in ({}, {CUSTOM_DATA_KEY: {run_id: manifest}}):
        api.project.update_custom_data(project[0], lost, silent=True)
        assert [one.state for one in run_store.runs_of(api, project[0])] == ["undone"]
    run(resume=True)
    assert len(runs(platform, project[0])) == 2


def test_a_run_that_goes_on_and_that_the_custom_data_do_not_have_is_listed(
    app, api, in_background, platform, project
):
    with in_background() as uuid:
        [(run_id, _)] = runs(platform, project[0]).items()
        api.project.update_custom_data(project[0], {}, silent=True)
        [listed] = app.post("list_runs", {"project_id": project[0]}).json()
        assert (listed["run"], listed["state"]) == (run_id, "running")
    assert app.finished(uuid)[0]["exception"] is None


def test_of_clicks_that_were_left_out_of_the_custom_data_nobody_is_told(
    api, platform, project, monkeypatch
):
    monkeypatch.setattr(run_store, "MAX_RUNS", 3)
    record = RunRecord(api, parse_settings({}), {"name": "demo"}, Destination("append"), 2)
    with record:
        for image_id in project[1][:2]:
            record.settled(project[0], Target(image_id, project[0]))
    annotation = sly.Annotation((90, 90), [sly.Label(sly.Rectangle(1, 1, 30, 30), PERSONS)])
    for image_id in project[1]:
        with RunRecord(api, parse_settings({}), {}, Destination("append"), 1) as click:
            click.before_upload(project[0], image_id, annotation)
            click.settled(project[0], Target(image_id, project[0]))
    found = run_store.runs_of(api, project[0])
    assert len(found) == 3
    assert record.run_id in {one.run for one in found}
    stored = runs(platform, project[0])
    del stored[record.run_id]
    stored["0"] = {**next(iter(stored.values())), "run": "0"}
    assert record.run_id in {one.run for one in run_store.runs_of(api, project[0])}


def test_who_may_not_list_files_of_the_team_sees_the_runs_of_the_custom_data(
    api, run, platform, project
):
    run()
    platform.faults.fail("file-storage.list", status=403)
    assert len(run_store.runs_of(api, project[0])) == 1


def test_a_run_of_other_settings_is_another_run(run, platform, project):
    project_id, _ = project
    run()
    run(resume=True, settings={"task_prompt": "<CAPTION_TO_PHRASE_GROUNDING>", "text": "car"})
    assert len(runs(platform, project_id)) == 2


def test_a_cancelled_run_says_so_and_is_gone_on_with(app, run, in_background, platform, project):
    with in_background() as uuid:
        app.post("stop_inference", {"inference_request_uuid": uuid})
    progress, _ = app.finished(uuid)
    assert (progress["stage"], progress["exception"]) == ("Cancelled", None)
    [(run_id, manifest)] = runs(platform, project[0]).items()
    assert (manifest["state"], manifest["error"]) == ("stopped", None)
    progress, _ = run(resume=True)
    assert progress["exception"] is None
    check_each_once(platform, project, run_id)


def test_a_run_that_goes_on_is_not_taken_over(app, run, in_background, platform, project):
    with in_background() as uuid:
        progress, _ = run(resume=True)
        said = progress["exception"]["message"]
        assert "is worked on by" in said
        assert ", process " in said
    assert app.finished(uuid)[0]["exception"] is None
    [(run_id, _)] = runs(platform, project[0]).items()
    check_each_once(platform, project, run_id)


def test_of_two_that_begin_before_either_has_labeled_anything_one_is_refused(
    app, run, platform, project
):
    with platform.faults.held("images.bulk.download"):
        answer = app.post("inference_project_id_async", asked_for(project, resume=True))
        uuid = answer.json()["inference_request_uuid"]
        wait_for(lambda: platform.count("images.bulk.download"), "no download")
        progress, _ = run(resume=True)
        assert "with the same settings is worked on by" in progress["exception"]["message"]
    assert app.finished(uuid)[0]["exception"] is None
    [run_id] = runs(platform, project[0])
    run(resume=True)
    check_each_once(platform, project, run_id)


HOLDER = "/florence2/runs/1/3f9a01bc/holder.json"


@pytest.mark.parametrize("status", [400, 404])
def test_a_file_is_missing_only_where_the_platform_does_not_list_it(
    api, platform, monkeypatch, status
):
    monkeypatch.setattr(team_files, "time", SimpleNamespace(sleep=lambda seconds: None))
    platform.faults.fail("file-storage.download", times=50, status=status)
    assert team_files.read_text(api, TEAM_ID, HOLDER) is None
    held, other = (Lease(api, TEAM_ID, HOLDER, "Run 3f9a01bc") for _ in range(2))
    held.start()
    with pytest.raises(HTTPError):
        other.take(lambda: False)
    platform.faults.statuses.clear()
    held.check()
    held.release()
    assert json.loads(platform.state.files[HOLDER].content)["who"] == held.who


def test_the_wait_for_who_may_hold_a_run_can_be_stopped(app, run, platform, project):
    run()
    for file in platform.state.files.values():
        if file.path.endswith("/holder.json"):
            away = {**json.loads(file.content), "machine": "other", "is_released": False}
            file.content = json.dumps(away).encode()
    reads = platform.count("file-storage.download")
    answer = app.post("inference_project_id_async", asked_for(project, resume=True))
    uuid = answer.json()["inference_request_uuid"]
    wait_for(lambda: platform.count("file-storage.download") > reads, "no wait")
    app.post("stop_inference", {"inference_request_uuid": uuid})
    progress, _ = app.finished(uuid)
    assert (progress["stage"], progress["exception"]) == ("Cancelled", None)


PASSING = {
    "busy": lambda faults: faults.fail("annotations.bulk.add", times=2, status=503),
    "its answer is lost": lambda faults: faults.lose("annotations.bulk.add"),
    "no image comes": lambda faults: faults.fail("images.bulk.download", times=2, status=502),
    "labels do not come": lambda faults: faults.fail("annotations.bulk.info", status=500),
}


@pytest.mark.parametrize("break_it", PASSING.values(), ids=PASSING)
def test_what_passes_costs_no_image(run, platform, project, break_it):
    break_it(platform.faults)
    progress, results = run()
    assert progress["exception"] is None
    assert not any(one.get("error") for one in results)
    [run_id] = runs(platform, project[0])
    check_each_once(platform, project, run_id)


def test_a_refused_last_upload_is_named_at_once_and_done_by_the_next_run(run, platform, project):
    # Its batch, and then each of its two images.
    platform.faults.fail("annotations.bulk.add", call=NUM_IMAGES // 2, times=3, status=413)
    progress, results = run()
    failed = [one["image_id"] for one in results if one.get("error")]
    assert failed == project[1][-2:]
    assert progress["stage"] == "Error"
    assert "status 413" in progress["exception"]["message"]
    assert platform.count("annotations.bulk.add") == NUM_IMAGES // 2 + 2, "tried again for nothing"
    [(run_id, manifest)] = runs(platform, project[0]).items()
    assert (manifest["counts"]["failed"], manifest["counts"]["labeled"]) == (2, NUM_IMAGES - 2)
    assert f"2 of {NUM_IMAGES} images failed" in manifest["error"]

    progress, _ = run(resume=True)
    assert progress["exception"] is None
    manifest = runs(platform, project[0])[run_id]
    assert manifest["counts"].get("failed") is None
    assert manifest["error"] is None
    check_each_once(platform, project, run_id)


@pytest.mark.parametrize("place", [0, 3], ids=["before the others", "after them"])
@pytest.mark.parametrize("mode", ["append", "create"])
def test_an_image_that_is_not_there_is_named_in_the_run_and_the_others_are_labeled(
    app, api, platform, project, place, mode
):
    ids = project[1][:3]
    ids.insert(place, 999)
    asked = {"images_ids": ids, "upload_mode": mode, "settings": SETTINGS, "batch_size": 2}
    progress, results = app.done("inference_batch_ids_async", asked)
    assert progress["exception"]["message"].startswith("1 of 4 images failed")
    assert {one["image_id"]: (one.get("error") or {}).get("code") for one in results} == {
        **dict.fromkeys(project[1][:3]),
        999: "not_found",
    }
    labeled = project[0] if mode == "append" else max(platform.state.projects)
    [run] = run_store.runs_of(api, labeled)
    assert run.state == "done"
    assert {key: run.counts[key] for key in ("images", "labeled", "failed")} == {
        "images": 4,
        "labeled": 3,
        "failed": 1,
    }
    assert lines_of(platform, labeled, run.run)[999]["code"] == "not_found"


def delete_project(state, project):
    del state.projects[project[0]]


def delete_dataset(state, project):
    [row] = state.datasets_of(project[0])
    del state.datasets[row.id]


def delete_image(state, project):
    del state.images[project[1][-1]]


# What is deleted while a run goes on, what its end says of it, and what its record says.
DELETED = {
    "the project": (delete_project, "was deleted while the run went on", None),
    "the dataset": (delete_dataset, "Dataset", "done"),
    "an image": (delete_image, f"1 of {NUM_IMAGES} images failed", "done"),
}


@pytest.mark.parametrize(("delete", "says", "state"), DELETED.values(), ids=DELETED)
def test_what_is_deleted_meanwhile_is_said_at_the_end(
    app, in_background, platform, project, delete, says, state
):
    with in_background() as uuid:
        delete(platform.state, project)
    progress, _ = app.finished(uuid)
    assert progress["stage"] == "Error"
    assert says in progress["exception"]["message"]
    if state is not None:
        [manifest] = runs(platform, project[0]).values()
        assert manifest["state"] == state
        assert manifest["error"] == progress["exception"]["message"]


def test_a_class_that_is_deleted_meanwhile_comes_back(app, in_background, platform, project):
    with in_background() as uuid:
        stored = platform.state.project(project[0])
        stored.meta = {**stored.meta, "classes": []}
        for image in platform.state.images.values():
            image.annotation["objects"] = []
    progress, _ = app.finished(uuid)
    assert progress["exception"] is None
    assert platform.state.project(project[0]).meta["classes"]
    assert platform.state.image(project[1][-1]).annotation["objects"]


WRONG = {
    "a folder beside it": (["photos", "--out", "x"], "IMAGES and --project both name"),
    "an option of folders": (["--coco"], "--coco is not for a project"),
    "an option of shards": (
        ["--ray", "local", "--shard-size", "5"],
        "--shard-size is not for a project",
    ),
    "workers without a cluster": (["--workers", "2"], "--workers is for a run on a Ray cluster"),
    "no such mode": (["--upload-mode", "apend"], "Did you mean 'append'"),
    "no such dataset": (["--dataset", "inside"], "its own: all"),
    "no such share": (["--max-failures", "few"], "such as 5%"),
}


@pytest.mark.parametrize(("words", "says"), WRONG.values(), ids=WRONG)
def test_a_command_that_cannot_be_done_is_refused_in_a_sentence(command, platform, words, says):
    code, said = command(*words)
    assert (code, says in said) == (2, True), said
    assert platform.count("images.list") == 0


def test_a_project_that_is_not_there_or_nobody_may_see_is_named(command, monkeypatch):
    code, said = command(project_id=77)
    assert (code, "Project 77 does not exist" in said) == (2, True)
    monkeypatch.delenv("API_TOKEN")
    code, said = command()
    assert (code, "API_TOKEN is not set" in said) == (2, True)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"resume": 1}, "true or false"),
        ({"resume": True, "upload_mode": None}, "no upload_mode"),
        ({"resume": True, "upload_mode": "create"}, "cannot be gone on with"),
    ],
)
def test_a_resume_that_means_nothing_is_refused(run, state, says):
    progress, _ = run(**state)
    assert says in progress["exception"]["message"]

"""Which run made a label: its tag, what is kept of the run, and the way back."""

from __future__ import annotations

import json

import pytest
from contract_calls import annotation_of, assert_refused, meta_of
from platform_double import TOKEN
from platform_state import TEAM_ID

from serve.cli.main import main
from serve.platform.run_store import CUSTOM_DATA_KEY
from serve.provenance import RUN_TAG
from serve.sdk import sly


@pytest.fixture
def run(app, platform, seeded):
    """A run over the project that is waited for; its manifest."""

    def start(**state):
        known = set(_runs(platform, seeded.project_id))
        settings = {"num_beams": 1, **state.pop("settings", {})}
        asked = {"projectId": seeded.project_id, "settings": settings, **state}
        progress, _ = app.done("inference_project_id_async", asked)
        assert progress["exception"] is None
        runs = _runs(platform, seeded.project_id)
        [made] = set(runs) - known
        return runs[made]

    return start


@pytest.fixture
def undo(app, seeded):
    def ask(run_id, **more):
        state = {"project_id": seeded.project_id, "run": run_id, **more}
        answer = app.post("undo_run", state)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return ask


def _runs(platform, project_id):
    return platform.state.project(project_id).custom_data.get(CUSTOM_DATA_KEY, {})


def figures(platform, image_id):
    return platform.state.image(image_id).annotation["objects"]


def all_labels(api, seeded):
    return {
        image_id: [label.to_json() for label in annotation_of(api, image_id).labels]
        for image_id in seeded.image_ids.values()
    }


def run_tags(label, name=RUN_TAG.name):
    return [tag.value for tag in label.tags if tag.name == name]


def test_every_label_says_which_run_wrote_it_and_the_project_knows_the_run(
    run, api, platform, seeded
):
    manifest = run(upload_mode="append", settings={"text": "car"})

    labels = [
        label for key in seeded.image_ids.values() for label in annotation_of(api, key).labels
    ]
    ours = [label for label in labels if run_tags(label)]
    assert len(ours) == len(labels) - 1, "a person's label has no tag of ours"
    assert {value for label in ours for value in run_tags(label)} == {manifest["run"]}
    assert manifest["state"] == "done"
    assert manifest["task"] == "<CAPTION_TO_PHRASE_GROUNDING>"
    assert manifest["prompts"] == ["car"]
    assert manifest["model"]["name"] == "demo"
    assert manifest["mode"] == "append"
    assert manifest["started"] <= manifest["finished"]
    assert manifest["counts"]["images"] == 5
    assert manifest["counts"]["labels"] == len(ours)
    folder = f"/florence2/runs/{seeded.project_id}/{manifest['run']}"
    kept = platform.state.files_in(TEAM_ID, folder, recursive=True)
    lines = [
        json.loads(line)
        for file in kept
        if file.path.endswith(".jsonl")
        for line in file.content.decode().splitlines()
    ]
    assert {line["image_id"] for line in lines} == set(seeded.image_ids.values())
    assert {line["outcome"] for line in lines} <= {"labeled", "empty"}


def test_other_custom_data_of_the_project_stay(run, platform, seeded):
    platform.state.project(seeded.project_id).custom_data = {"mine": [1, 2]}
    first, second = run(upload_mode="append"), run(upload_mode="append")
    assert platform.state.project(seeded.project_id).custom_data["mine"] == [1, 2]
    assert set(_runs(platform, seeded.project_id)) == {first["run"], second["run"]}


def test_the_tag_can_be_left_out_and_the_run_is_undone_all_the_same(run, undo, api, seeded):
    before = all_labels(api, seeded)
    manifest = run(upload_mode="append", settings={"run_tag": False})
    assert manifest["run_tag"] is None
    assert meta_of(api, seeded.project_id).get_tag_meta(RUN_TAG.name) is None
    told = undo(manifest["run"])
    assert told["deleted"] == manifest["counts"]["labels"]
    assert [len(one) for one in all_labels(api, seeded).values()] == [
        len(one) for one in before.values()
    ]


def test_a_persons_tag_of_the_same_name_and_another_type_stays_as_it_is(run, undo, api, seeded):
    meta = meta_of(api, seeded.project_id)
    other = sly.TagMeta(RUN_TAG.name, sly.TagValueType.ANY_NUMBER)
    api.project.update_meta(seeded.project_id, meta.add_tag_meta(other))

    manifest = run(upload_mode="append")

    assert manifest["run_tag"] == "florence2_run_nn"
    meta = meta_of(api, seeded.project_id)
    assert meta.get_tag_meta(RUN_TAG.name).value_type == sly.TagValueType.ANY_NUMBER
    ours = [
        label
        for label in annotation_of(api, seeded.labeled_id).labels
        if run_tags(label, "florence2_run_nn") == [manifest["run"]]
    ]
    assert len(ours) == 3
    assert undo(manifest["run"])["deleted"] == manifest["counts"]["labels"]


def move(figure):
    figure["points"]["exterior"][0][0] += 3


def rename(figure):
    figure["classTitle"] = "outline2"


def review(figure):
    figure["tags"].append({"id": 1, "name": "reviewed", "value": None})


def adopt(figure):
    figure["tags"] = [tag for tag in figure["tags"] if tag["name"] != RUN_TAG.name]


def rescore(figure):
    [score] = [tag for tag in figure["tags"] if tag["name"] == "confidence"]
    score["value"] = 1


# What somebody does to a label of a run, and whether it is named as one that stays.
CHANGES = {
    "moved": (move, True),
    "of another class": (rename, True),
    "given a tag": (review, True),
    "its score set": (rescore, True),
    "the tag of the run taken off": (adopt, False),
}


def test_undo_deletes_what_nobody_changed_and_names_the_rest(run, undo, platform, seeded):
    manifest = run(upload_mode="append")
    theirs, copied, *_ = figures(platform, seeded.labeled_id)
    copy = {**copied, "id": platform.state.new_id()}
    figures(platform, seeded.labeled_id).append(copy)
    written = [one for key in seeded.image_ids.values() for one in figures(platform, key)]
    changed = dict(
        zip(CHANGES, [one for one in written if one not in (theirs, copied, copy)], strict=False)
    )
    for name, (change, _) in CHANGES.items():
        change(changed[name])

    def stored():
        return json.dumps([figures(platform, key) for key in seeded.image_ids.values()])

    before = stored()
    shown = undo(manifest["run"], show=True)
    assert stored() == before
    told = undo(manifest["run"])

    num_deleted = manifest["counts"]["labels"] - len(CHANGES)
    for answer in (shown, told):
        assert (answer["deleted"], answer["kept"], answer["gone"]) == (num_deleted, 5, 1)
    assert told["failed"] == []
    left = [one["id"] for key in seeded.image_ids.values() for one in figures(platform, key)]
    assert set(left) == {theirs["id"], copy["id"], *(one["id"] for one in changed.values())}
    kept = "; ".join(told["kept_labels"])
    for name, (_, is_named) in CHANGES.items():
        assert (f"label {changed[name]['id']} " in kept) is is_named, name
    [state] = {one["state"] for one in _runs(platform, seeded.project_id).values()}
    assert state == "undone in part"


def test_a_later_append_does_not_hide_what_the_first_run_wrote(run, undo, api, platform, seeded):
    first = run(upload_mode="append")
    second = run(upload_mode="append", settings={"text": "moon"})
    told = undo(first["run"])
    assert (told["deleted"], told["kept"], told["gone"]) == (first["counts"]["labels"], 0, 0)
    left = [
        label
        for image_id in seeded.image_ids.values()
        for label in annotation_of(api, image_id).labels
        if run_tags(label)
    ]
    assert len(left) == second["counts"]["labels"]


@pytest.mark.parametrize(
    ("task", "geometry"), [("segmentation", "polygon"), ("segmentation", "bitmap"), ("ocr", "")]
)
def test_outlines_masks_and_lines_of_text_are_known_again(
    app, undo, platform, seeded, task, geometry
):
    tasks = {
        "segmentation": {"task": "<REFERRING_EXPRESSION_SEGMENTATION>", "text": "car"},
        "ocr": {"task": "<OCR_WITH_REGION>"},
    }
    settings = {**tasks[task], "geometry": geometry, "num_beams": 1}
    ids = [seeded.labeled_id, seeded.image_ids["scene_street.jpg"]]
    asked = {"image_ids": ids, "upload_mode": "append", "settings": settings}
    progress, _ = app.done("inference_batch_ids_async", asked)
    assert progress["exception"] is None
    [(run_id, manifest)] = _runs(platform, seeded.project_id).items()
    told = undo(run_id)
    assert told["deleted"] == manifest["counts"]["labels"] > 0
    assert (told["kept"], told["gone"]) == (0, 0)
    assert [len(figures(platform, key)) for key in ids] == [1, 0]


def test_captions_are_undone_too(run, undo, api, seeded):
    manifest = run(upload_mode="append", settings={"task": "<CAPTION>"})
    assert len(annotation_of(api, seeded.labeled_id).img_tags) == 1
    assert undo(manifest["run"])["image_tags_deleted"] == 5
    assert len(annotation_of(api, seeded.labeled_id).img_tags) == 0


def test_copies_in_a_project_of_their_own_are_undone_there(app, platform, seeded):
    before = set(platform.state.projects)
    app.done(
        "inference_project_id_async", {"projectId": seeded.project_id, "upload_mode": "create"}
    )
    [created] = set(platform.state.projects) - before
    assert not _runs(platform, seeded.project_id)
    [(run_id, manifest)] = _runs(platform, created).items()

    told = app.post("undo_run", {"project_id": created, "run": run_id}).json()

    assert told["deleted"] == manifest["counts"]["labels"] > 0
    assert not any(
        figures(platform, image.id)
        for row in platform.state.datasets_of(created)
        for image in platform.state.images_of(row.id)
    )


def test_replace_own_takes_the_place_of_unchanged_labels_of_earlier_runs_only(
    run, api, platform, seeded
):
    run(upload_mode="append")
    theirs, changed, *_ = figures(platform, seeded.labeled_id)
    move(changed)
    changed_at = [list(point) for point in changed["points"]["exterior"]]

    second = run(upload_mode="replace_own", settings={"text": "moon"})

    kept = figures(platform, seeded.labeled_id)
    assert theirs["points"] in [one["points"] for one in kept]
    assert changed_at in [one["points"]["exterior"] for one in kept]
    others = [
        label
        for label in annotation_of(api, seeded.labeled_id).labels
        if run_tags(label) == [second["run"]]
    ]
    assert len(kept) == 2 + len(others)
    assert {label.obj_class.name for label in others} <= {"moon"}
    again = run(upload_mode="replace_own", settings={"text": "moon"})
    assert again["counts"]["labels"] == second["counts"]["labels"]
    assert len(figures(platform, seeded.labeled_id)) == len(kept)


def test_one_image_in_an_annotation_tool_is_a_run_too(app, undo, platform, seeded):
    asked = {"image_id": seeded.labeled_id, "upload_mode": "append", "settings": {"num_beams": 1}}
    app.post("inference_image_id", asked)
    own = ("projects.editInfo", "file-storage.bulk.upload")
    assert [platform.count(method) for method in own] == [1, 1]
    [run_id] = _runs(platform, seeded.project_id)
    told = undo(run_id)
    assert (told["deleted"], told["kept"]) == (3, 0)
    app.post("inference_image_id", {**asked, "settings": {"conf": 1.0}})
    assert list(_runs(platform, seeded.project_id)) == [run_id], "it wrote nothing"


def test_skip_labeled_leaves_images_with_labels_alone(app, run, platform, seeded):
    before = list(figures(platform, seeded.labeled_id))
    manifest = run(upload_mode="skip_labeled")
    assert figures(platform, seeded.labeled_id) == before
    assert manifest["counts"]["skipped"] == 1
    asked = {"image_ids": [seeded.labeled_id], "upload_mode": "skip_labeled"}
    progress, [entry] = app.done("inference_batch_ids_async", asked)
    assert (progress["stage"], progress["exception"]) == ("Finished", None)
    assert (entry["skipped"], entry["annotation"]) == (True, None)
    assert manifest["counts"]["labeled"] == 4


def test_a_run_that_is_killed_in_the_middle_is_known(run, undo, platform, seeded):
    manifest = run(upload_mode="append")
    stored = _runs(platform, seeded.project_id)[manifest["run"]]
    stored["state"] = "running"
    for path in list(platform.state.files):
        del platform.state.files[path]
    told = undo(manifest["run"])
    assert (told["deleted"], told["kept"]) == (0, manifest["counts"]["labels"])
    assert "cut off" in told["kept_labels"][0]


def test_labels_that_the_platform_does_not_delete_are_named_and_undone_later(
    run, undo, platform, seeded
):
    manifest = run(upload_mode="append")
    platform.faults.fail("figures.bulk.remove", times=200, status=403)
    assert undo(manifest["run"])["failed"]
    platform.faults.statuses.clear()
    assert undo(manifest["run"])["failed"] == []
    assert len(figures(platform, seeded.labeled_id)) == 1


def test_a_platform_that_keeps_no_files_costs_no_labels(app, platform, seeded):
    platform.faults.fail("projects.editInfo", times=50, status=403)
    platform.faults.fail("file-storage.bulk.upload", times=50, status=403)
    progress, _ = app.done(
        "inference_project_id_async", {"projectId": seeded.project_id, "upload_mode": "append"}
    )
    assert progress["exception"] is None
    assert len(figures(platform, seeded.labeled_id)) == 4


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({}, "project"),
        ({"run": "0123abcd"}, "project"),
        ({"project_id": 1, "run": "0123abcd"}, "does not exist"),
        ({"project_id": "ours"}, "run is the id"),
        ({"project_id": "ours", "run": "../x"}, "run is the id"),
        ({"project_id": "ours", "run": "0123abcd"}, "knows no run"),
        ({"project_id": "ours", "run": "0123abcd", "show": 1}, "true or false"),
    ],
)
def test_a_request_to_undo_that_names_no_run_is_refused(app, seeded, state, says):
    if state.get("project_id") == "ours":
        state = {**state, "project_id": seeded.project_id}
    assert_refused(app.post("undo_run", state), says=says)


def test_runs_are_listed_the_newest_first(run, app, seeded):
    run(upload_mode="append")
    listed = app.post("list_runs", {"project_id": seeded.project_id}).json()
    assert [one["state"] for one in listed] == ["done"]


@pytest.fixture
def command(api, platform, seeded, monkeypatch, capsys):
    """A ``florence2`` command about the project: its exit code and what it prints."""
    monkeypatch.setenv("SERVER_ADDRESS", platform.address)
    monkeypatch.setenv("API_TOKEN", TOKEN)

    def call(name, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([name, str(seeded.project_id), *words])
        heard = capsys.readouterr()
        return ended.value.code, heard.out + heard.err

    return call


def test_the_commands_list_and_undo_runs_of_the_platform(run, command, platform, seeded):
    manifest = run(upload_mode="append")
    code, said = command("runs")
    assert (code, said.split()[:3]) == (0, [manifest["run"], manifest["started"], "done"])
    code, said = command("undo", "--run", manifest["run"], "--show")
    assert (code, f"{manifest['counts']['labels']} labels would be" in said) == (0, True)
    assert len(figures(platform, seeded.labeled_id)) == 4
    assert command("undo", "--run", manifest["run"])[0] == 0
    assert len(figures(platform, seeded.labeled_id)) == 1
    assert "undone" in command("runs")[1]


def test_commands_say_what_is_missing(command, monkeypatch):
    code, said = command("undo", "--run", "0123abcd")
    assert (code, "knows no run" in said) == (2, True)
    monkeypatch.delenv("API_TOKEN")
    code, said = command("runs")
    assert (code, "API_TOKEN is not set" in said) == (2, True)

"""The runs that labeled a folder: listed, and undone as far as nobody changed what they wrote."""

from __future__ import annotations

import json

import pytest
from label_fakes import files_below, one_box, paint, read_project, result

from florence2.records import Box
from serve.labeling.undo import runs_in, undo_in
from serve.sdk import sly

TAG = "florence2_run"


def annotation_file(out, name):
    return out / "project" / "ds0" / "ann" / f"{name}.json"


def edited(out, name, change):
    path = annotation_file(out, name)
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    return stored


@pytest.fixture
def command(capsys):
    """A command's exit code and what it says on stdout and stderr."""

    def run(*words):
        from serve.cli.main import main

        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        heard = capsys.readouterr()
        return ended.value.code, heard.out, heard.err

    return run


@pytest.fixture
def tagged(tmp_path):
    """The option that has labels say which run wrote them."""
    file = tmp_path / "settings.yaml"
    file.write_text("task_prompt: <OD>\nrun_tag: true\n")
    return "--settings", str(file)


def test_each_run_is_noted_with_what_it_did(label, images, model, journal_of):
    out = label(images).out
    paint(images / "new.png", 77)
    label(images)
    label(images)

    second, first = runs_in(out)
    assert [first.state, second.state] == ["done", "done"]
    assert first.counts == {"images": 5, "labeled": 5, "labels": 5}
    assert second.counts == {"images": 1, "labeled": 1, "labels": 1}
    assert (first.model["name"], first.task) == ("Florence-2-large", "<OD>")
    runs = {key: entry["run"] for key, entry in journal_of(out).items()}
    assert set(runs.values()) == {first.run, second.run}
    assert runs["new.png"] == second.run


def test_a_run_is_found_whatever_signs_its_settings_have(label, images, command):
    # By these Unicode parts lines, and JSON does not.
    out = label(images.rename(images.parent / "a\u2028b\x85c")).out
    [manifest] = runs_in(out)
    code, said, _ = command("undo", out, "--run", manifest.run)
    assert (code, said) == (0, "5 labels deleted, on 5 images.\n")


def test_labels_have_the_tag_only_where_it_is_asked_for(label, images, tmp_path, tagged):
    without = label(images).out
    annotations, project = read_project(without)
    assert project.meta.get_tag_meta(TAG) is None
    with_tag = label(images, *tagged, out=tmp_path / "tagged").out
    found, project = read_project(with_tag)
    [manifest] = runs_in(with_tag)
    assert manifest.run_tag == TAG
    assert project.meta.get_tag_meta(TAG).value_type == sly.TagValueType.ANY_STRING
    for name, annotation in found.items():
        [label_] = annotation.labels
        assert label_.tags.get(TAG).value == manifest.run
        assert len(annotations[name].labels[0].tags) == len(label_.tags) - 1


def test_an_undone_folder_is_as_if_it_had_never_been_labeled(label, images, model, command):
    out = label(images, "--draw").out
    [manifest] = runs_in(out)
    before = files_below(out)

    code, said, _ = command("undo", out, "--run", manifest.run, "--show")
    assert (code, said) == (0, "5 labels would be deleted, on 5 images.\n")
    assert files_below(out) == before
    code, said, _ = command("undo", out / "project", "--run", manifest.run)
    assert (code, said) == (0, "5 labels deleted, on 5 images.\n")

    assert not list((out / "project" / "ds0").rglob("*.*"))
    assert not list((out / "previews").iterdir())
    assert runs_in(out)[0].state == "undone"
    code, said, _ = command("undo", out, "--run", manifest.run)
    assert (code, said) == (0, "0 labels deleted, on 0 images.\n")
    again = label(images)
    assert (again.code, len(model.asked)) == (0, 10)
    assert len(read_project(out)[0]) == 5


def test_only_the_named_run_is_undone(label, images, model):
    out = label(images).out
    [first] = runs_in(out)
    paint(images / "new.png", 77)
    label(images)
    assert undo_in(out, first.run).num_deleted == 5
    assert list(read_project(out)[0]) == ["new.png"]
    assert label(images).code == 0
    assert len(model.asked) == 11


def move(stored):
    stored["objects"][0]["points"]["exterior"][0] = [0, 0]


def rename(stored):
    stored["objects"][0]["classTitle"] = "dog"


def score(stored):
    stored["objects"][0]["tags"] = [{"name": "confidence", "value": 0.1}]


def add(stored):
    first = stored["objects"][0]
    stored["objects"].append({**first, "nnCreated": False, "nnUpdated": False})


def describe(stored):
    stored["tags"].append({"name": "caption", "value": "by a person"})


def rewrite(stored):
    stored["objects"][0]["labelerLogin"] = "someone"


# What somebody did: the labels deleted of that image, and those that stay.
CHANGES = {
    "moved": (move, 0, 1),
    "of another class": (rename, 0, 1),
    "its score set": (score, 0, 1),
    "another label added": (add, 1, 1),
    "a caption added": (describe, 1, 0),
    "only written anew": (rewrite, 1, None),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_tagged", [False, True])
def test_what_somebody_changed_stays_and_is_named(
    label, images, model, tagged, command, change, is_tagged
):
    out = label(images, *(tagged if is_tagged else ())).out
    [manifest] = runs_in(out)
    changing, deleted, left = CHANGES[change]
    edited(out, "2.png", changing)

    code, said, _ = command("undo", out, "--run", manifest.run)

    assert code == 0
    assert f"{4 + deleted} labels deleted" in said
    assert ("2.png: " in said) is (left is not None)
    names = [path.name for path in (out / "project" / "ds0" / "img").iterdir()]
    assert names == ([] if left is None else ["2.png"])
    if left is not None:
        stored = json.loads(annotation_file(out, "2.png").read_text())
        assert len(stored["objects"]) == left
        assert len(stored["tags"]) == (change == "a caption added")
        # Somebody's work is not labeled over.
        label(images, *(tagged if is_tagged else ()))
        assert len(model.asked) == 5 + 4
        assert json.loads(annotation_file(out, "2.png").read_text()) == stored


def test_captions_empty_and_failed_images_are_undone_too(label, images, model):
    (images / "broken.png").write_bytes(b"no picture")
    model.answer = lambda ask: result(ask.task, text="a thing")
    out = label(images, "--task", "<CAPTION>").out
    undone = undo_in(out, runs_in(out)[0].run)
    assert (undone.num_deleted, undone.num_image_tags, undone.num_images) == (0, 5, 5)
    paint(images / "broken.png", 99)
    model.answer = lambda ask: result(ask.task, text="")
    assert label(images, "--task", "<CAPTION>").code == 0
    assert len(model.asked) == 11


def test_two_equal_labels_of_which_one_was_copied_by_a_person(label, images, model):
    box = Box((4.0, 4.0, 20.0, 20.0), "cat", 0.9)
    model.answer = lambda ask: result(ask.task, box, Box((30.0, 4.0, 50.0, 20.0), "cat", 0.9))
    out = label(images).out
    edited(out, "1.png", lambda stored: stored["objects"].append(stored["objects"][0]))
    undone = undo_in(out, runs_in(out)[0].run)
    assert (undone.num_deleted, undone.num_kept) == (10, 1)


def test_a_run_that_was_interrupted_is_undone_too(label, images, model):
    def stops(ask):
        if len(model.asked) > 2:
            raise KeyboardInterrupt
        return one_box(ask)

    model.answer = stops
    out = label(images, "--batch", "1").out
    [manifest] = runs_in(out)
    assert manifest.state == "stopped"
    assert undo_in(out, manifest.run).num_deleted == manifest.counts["labels"] > 0


def test_a_damaged_annotation_is_named_and_the_others_are_undone(label, images, command):
    out = label(images).out
    annotation_file(out, "3.png").write_text("{")
    code, said, _ = command("undo", out, "--run", runs_in(out)[0].run)
    assert code == 1
    assert "4 labels deleted" in said
    assert "3.png: the annotation is no JSON" in said


def test_runs_are_listed_for_people(label, images, command, tmp_path):
    out = label(images, "--prompt", "red car. dog").out
    [manifest] = runs_in(out)
    code, said, _ = command("runs", out)
    assert code == 0
    assert said.startswith(f"{manifest.run}  {manifest.started}  done  Florence-2-large")
    assert "red car; dog" in said
    for words in (("runs", tmp_path), ("undo", tmp_path, "--run", "01234567")):
        code, _, said = command(*words)
        assert (code, "was given as --out" in said) == (2, True)
    code, _, said = command("undo", out, "--run", "nothing")
    assert (code, f"choose one of {manifest.run}" in said) == (2, True)

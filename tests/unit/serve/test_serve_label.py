from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
from label_fakes import color_in, color_of, one_box, paint, result
from PIL import Image

from florence2.ask import Ask
from florence2.errors import CheckpointError, DeviceError
from florence2.records import Box, Failure, Polygon, Text
from serve.labeling.files import opened_workspace
from serve.sdk import sly


def read_project(out):
    project = sly.Project(str(out), sly.OpenMode.READ)
    (dataset,) = project.datasets
    return {
        name: sly.Annotation.load_json_file(dataset.get_ann_path(name), project.meta)
        for name in dataset.get_items_names()
    }, project


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_folder_becomes_a_project_the_sdk_reads(label, images, model, report_of):
    done = label(images, "--prompt", "Red Car. dog", "--batch", "2")
    annotations, project = read_project(done.out)
    assert done.code == 0
    assert sorted(annotations) == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    names = [item.obj_class.name for item in annotations["0.png"].labels]
    assert names == ["Red Car", "dog"]
    assert [c.name for c in project.meta.obj_classes] == ["Red Car", "dog"]
    assert (done.out / "ds0/img/3.png").read_bytes() == (images / "3.png").read_bytes()
    report = report_of(done.out)
    assert (report["labeled"], report["empty"], report["failed"]) == (5, 0, 0)
    assert report["objects"] == 10
    assert report["this_run"]["images_per_second"] > 0
    assert done.loads == [("Florence-2-large", "auto", "auto")]


def test_the_second_run_of_one_command_does_nothing(label, images, model):
    first = label(images)
    before = files_below(first.out / "ds0")
    asked = len(model.asked)
    second = label(images)
    assert second.code == 0
    assert len(model.asked) == asked
    assert len(second.loads) == 1, "no model is loaded when there is nothing to do"
    assert files_below(first.out / "ds0") == before


def test_empty_images_are_written_and_not_looked_at_again(label, images, model, journal_of):
    model.answer = lambda ask: result(ask.task, size=ask.image.size_wh)
    done = label(images)
    assert done.code == 0
    assert {entry["state"] for entry in journal_of(done.out).values()} == {"empty"}
    assert all(not annotation.labels for annotation in read_project(done.out)[0].values())
    label(images)
    assert len(model.asked) == 5


def test_new_images_of_the_folder_are_all_that_a_later_run_looks_at(label, images, model):
    label(images)
    paint(images / "new.png", 77)
    done = label(images)
    assert model.asked[5:] == [color_of(77)]
    assert len(read_project(done.out)[0]) == 6


def test_one_bad_image_fails_alone_and_is_not_in_the_project(
    label, images, report_of, journal_of, capsys
):
    whole = (images / "2.png").read_bytes()
    (images / "1.png").write_bytes(b"this is no image")
    (images / "2.png").write_bytes(whole[: len(whole) // 2])
    done = label(images)
    assert done.code == 1
    assert sorted(read_project(done.out)[0]) == ["0.png", "3.png", "4.png"]
    report = report_of(done.out)
    assert (report["labeled"], report["failed"]) == (3, 2)
    assert report["failed_by_code"] == {"bad_image": 2}
    rows = list(csv.DictReader((done.out / "failed.csv").open()))
    assert [row["image"] for row in rows] == ["1.png", "2.png"]
    assert report["retry_command"].endswith("--retry-failed")
    assert "--retry-failed" in capsys.readouterr().err


def test_failures_are_retried_only_when_told_to(label, images, model, report_of):
    model.answer = lambda ask: (
        Failure("too_slow", "The answer took too long.")
        if color_in(ask) == color_of(3)
        else one_box(ask)
    )
    assert label(images).code == 1
    model.answer = one_box
    model.asked.clear()
    assert label(images).code == 1
    assert model.asked == []
    paint(images / "new.png", 77)
    done = label(images, "--retry-failed")
    assert model.asked == [color_of(3)]
    assert done.code == 0
    report = report_of(done.out)
    assert (report["labeled"], report["failed"], report["pending"]) == (5, 0, 1)
    assert not (done.out / "failed.csv").exists()


def test_one_failed_prompt_fails_the_image(label, images, model, report_of):
    model.answer = lambda ask: Failure("internal", "No.") if ask.text == "dog" else one_box(ask)
    done = label(images, "--prompt", "cat. dog")
    assert done.code == 2
    assert report_of(done.out)["failed"] == 5
    assert not list((done.out / "ds0/img").iterdir())


@pytest.mark.parametrize(
    "options",
    [["--threshold", "0.5"], ["--prompt", "dog"], ["--task", "ocr"], ["--model", "demo"],
     ["--recursive"], ["--num-beams", "1"]],
)  # fmt: skip
def test_other_settings_into_the_same_folder_are_refused(label, images, model, options, capsys):
    out = label(images).out
    before, asked = files_below(out), len(model.asked)
    done = label(images, *options)
    assert done.code == 2
    assert "One folder holds one kind of labels" in capsys.readouterr().err
    assert files_below(out) == before
    assert len(model.asked) == asked


def test_another_images_folder_into_the_same_out_is_refused(label, images, tmp_path, capsys):
    label(images)
    paint(tmp_path / "others" / "0.png", 9)
    assert label(tmp_path / "others").code == 2
    assert "images" in capsys.readouterr().err


def test_overwrite_sets_the_old_labels_aside(label, images, model):
    out = label(images).out
    old = (out / "journal.jsonl").read_bytes()
    done = label(images, "--threshold", "0.5", "--overwrite")
    assert done.code == 0
    assert len(read_project(out)[0]) == 5
    assert (out.with_name("out.old-1") / "journal.jsonl").read_bytes() == old
    assert len(read_project(out.with_name("out.old-1"))[0]) == 5
    assert label(images, "--overwrite").code == 0
    assert out.with_name("out.old-2").exists()


def test_what_a_person_corrected_is_never_written_over(label, images):
    out = label(images).out
    annotation = out / "ds0/ann/2.png.json"
    corrected = json.loads(annotation.read_text())
    corrected["objects"] = []
    annotation.write_text(json.dumps(corrected))
    paint(images / "new.png", 77)
    label(images)
    assert json.loads(annotation.read_text())["objects"] == []


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda out: (out / "ds0/ann/2.png.json").write_text(""), id="cut to nothing"),
        pytest.param(lambda out: (out / "ds0/ann/2.png.json").unlink(), id="annotation gone"),
        pytest.param(lambda out: (out / "ds0/img/2.png").unlink(), id="image gone"),
    ],
)
def test_what_a_crash_of_the_machine_took_is_labeled_again(label, images, model, harm, report_of):
    out = label(images).out
    harm(out)
    model.asked.clear()
    for _ in range(2):
        assert label(images).code == 0
        assert report_of(out)["labeled"] == 5
    assert model.asked == [color_of(2)]
    assert len(read_project(out)[0]) == 5


@pytest.mark.parametrize("tail", [b'{"image": "4.p', b"\xff\xfe", b'{"image": 1}\n', b"[]\n"])
def test_a_torn_journal_line_costs_one_image_at_most(label, images, model, tail, journal_of):
    out = label(images).out
    journal = out / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + tail)
    model.asked.clear()
    assert label(images).code == 0
    assert model.asked == [color_of(4)]
    model.asked.clear()
    assert label(images).code == 0
    assert model.asked == []


def test_same_names_in_different_folders_do_not_collide(label, tmp_path, model, journal_of):
    tree = tmp_path / "tree"
    keys = ["a/1.png", "b/1.png", "1.png", "a/b/1.png", "a__b/1.png", "a/b__1.png", "a__1.png",
            "a_/_1.png", "a/__1.png", "a/1.JPG"]  # fmt: skip
    for number, key in enumerate(keys):
        paint(tree / key, number)
    done = label(tree, "--recursive")
    journal = journal_of(done.out)
    assert sorted(journal) == sorted(keys)
    assert len({entry["name"] for entry in journal.values()}) == len(keys)
    assert len(read_project(done.out)[0]) == len(keys)
    for number, key in enumerate(keys):
        stored = Image.open(done.out / "ds0/img" / journal[key]["name"]).getpixel((0, 0))
        if key.endswith("png"):
            assert stored == color_of(number)
    assert journal["a/1.png"]["name"] == "a__1.png"


def test_subfolders_are_left_out_unless_asked_for(label, images, model):
    paint(images / "sub" / "9.png", 99)
    label(images)
    assert len(model.asked) == 5


def test_an_output_inside_the_images_is_not_labeled(label, images, model):
    out = images / "labels"
    first = label(images, "--recursive", "--draw", out=out)
    assert first.code == 0
    assert label(images, "--recursive", "--draw", out=out).code == 0
    assert label(images, "--recursive", "--threshold", "0.1", out=images / "other").code == 0
    assert len(model.asked) == 10


def test_hidden_files_and_other_types_are_passed_over(label, images, model, report_of):
    (images / "notes.txt").write_text("hello")
    (images / "phone.heic").write_bytes(b"x")
    shutil.copy(images / "0.png", images / "._0.png")
    done = label(images)
    assert done.code == 0
    assert report_of(done.out)["unsupported_files"] == 1
    assert len(model.asked) == 5


def test_a_single_image_is_enough(label, images, model):
    done = label(images / "3.png")
    assert done.code == 0
    assert list(read_project(done.out)[0]) == ["3.png"]


def test_links_share_the_file_and_copies_do_not(label, images, tmp_path):
    linked = label(images, "--link", out=tmp_path / "linked").out
    copied = label(images, out=tmp_path / "copied").out
    original = (images / "0.png").stat().st_ino
    assert (linked / "ds0/img/0.png").stat().st_ino == original
    assert (copied / "ds0/img/0.png").stat().st_ino != original
    assert label(images, "--link", out=linked).code == 0


def test_an_image_on_its_side_is_labeled_upright(label, tmp_path, model):
    folder = tmp_path / "phone"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(folder / "1.jpg", exif=exif)
    done = label(folder)
    assert read_project(done.out)[0]["1.jpg"].img_size == (64, 48)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_kind_of_pixel_is_read(label, tmp_path, mode, model):
    folder = tmp_path / "modes"
    folder.mkdir()
    Image.new(mode, (64, 48)).save(folder / ("1.tif" if mode == "CMYK" else "1.png"))
    assert label(folder).code == 0
    assert len(model.asked) == 1


def test_a_class_in_two_shapes_becomes_one_of_any_shape(label, images, model):
    ring = (1.0, 1.0, 30.0, 1.0, 30.0, 30.0)

    def answer(ask: Ask):
        if color_in(ask) == color_of(2):
            return result(ask.task, Polygon((ring,), "cat", 0.9), size=ask.image.size_wh)
        return one_box(ask)

    model.answer = answer
    done = label(
        images, "--task", "open_vocabulary_detection", "--prompt", "cat", "--coco", "--yolo"
    )
    annotations, project = read_project(done.out)
    assert project.meta.get_obj_class("cat").geometry_type == sly.AnyGeometry
    assert sum(len(annotation.labels) for annotation in annotations.values()) == 5
    coco = json.loads((done.out / "coco/ds0/annotations/coco_instances.json").read_text())
    assert len(coco["annotations"]) == 5
    assert (done.out / "yolo/labels/train/ds0_2.txt").read_text()


def test_coco_and_yolo_hold_the_same_objects(label, images, model):
    done = label(images, "--class", "Dog=puppy,hound", "--class", "red car", "--coco", "--yolo")
    coco = json.loads((done.out / "coco/ds0/annotations/coco_instances.json").read_text())
    assert [category["name"] for category in coco["categories"]] == ["Dog", "red car"]
    assert len(coco["images"]) == 5
    assert len(coco["annotations"]) == 10
    assert coco["annotations"][0]["bbox"][:2] == [4, 4]
    lines = (done.out / "yolo/labels/train/ds0_0.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1"]
    assert "names: [Dog, red car]" in (done.out / "yolo/data_config.yaml").read_text()
    assert label(images, "--class", "Dog=puppy,hound", "--class", "red car", "--coco").code == 0
    assert len(read_project(done.out)[0]) == 5


def test_captions_go_to_cocos_captions(label, images, model):
    model.answer = lambda ask: result(
        ask.task, Text("A cat.", 0.9), text="A cat.", size=ask.image.size_wh
    )
    done = label(images, "--task", "caption", "--coco")
    assert done.code == 0
    captions = json.loads((done.out / "coco/ds0/annotations/coco_captions.json").read_text())
    assert [caption["caption"] for caption in captions["annotations"]] == ["A cat."] * 5


def test_outlines_go_to_yolo_as_outlines(label, images, model):
    ring = (1.0, 1.0, 30.0, 1.0, 30.0, 30.0)
    model.answer = lambda ask: result(ask.task, Polygon((ring,), "", 0.9), size=ask.image.size_wh)
    done = label(images, "--task", "referring_segmentation", "--prompt", "the cat", "--yolo")
    line = (done.out / "yolo/labels/train/ds0_0.txt").read_text().split()
    assert len(line) == 7


def test_previews_show_the_labels_also_for_what_was_labeled_before(label, images):
    out = label(images).out
    assert not (out / "previews").exists()
    paint(images / "new.png", 77, size=(2000, 1000))
    label(images, "--draw")
    assert len(list((out / "previews").iterdir())) == 6
    drawn = Image.open(out / "previews/0.png.jpg")
    assert drawn.size == (64, 48)
    assert len(drawn.getcolors(10_000)) > 3
    assert Image.open(out / "previews/new.png.jpg").size == (1600, 800)


def test_region_and_search_settings_reach_the_model(label, images, model):
    seen = []

    def answer(ask: Ask):
        seen.append((ask.region.box_xyxy, ask.num_beams, ask.max_new_tokens))
        return result(ask.task, Text("cat", 0.7), text="cat", size=ask.image.size_wh)

    model.answer = answer
    done = label(
        images, "--task", "region_category", "--region", "1,2,30,40", "--num-beams", "2",
        "--max-new-tokens", "9",
    )  # fmt: skip
    assert set(seen) == {((1.0, 2.0, 30.0, 40.0), 2, 9)}
    tags = read_project(done.out)[0]["0.png"].labels[0].tags
    assert {tag.name: tag.value for tag in tags} == {"category": "cat", "confidence": 0.7}


def test_cut_answers_are_counted(label, images, model, report_of, capsys):
    model.answer = lambda ask: result(
        ask.task, Box((1.0, 1.0, 5.0, 5.0), "x", 0.9), size=ask.image.size_wh, truncated=True
    )
    done = label(images)
    assert report_of(done.out)["truncated"] == 5
    assert "--max-new-tokens" in capsys.readouterr().err


def test_a_second_run_into_the_folder_in_use_is_refused(label, images, tmp_path, model, capsys):
    with opened_workspace(tmp_path / "out"):
        assert label(images).code == 2
    assert "in use by another" in capsys.readouterr().err
    assert model.asked == []
    assert label(images).code == 0


def test_an_engine_that_gives_up_keeps_what_was_labeled(label, images, model, report_of, capsys):
    def answer(ask: Ask):
        if color_in(ask) == color_of(3):
            raise DeviceError("The device went away; choose another with --device.")
        return one_box(ask)

    model.answer = answer
    done = label(images, "--batch", "1")
    assert done.code == 1
    report = report_of(done.out)
    assert (report["labeled"], report["pending"]) == (3, 2)
    assert "The device went away" in report["this_run"]["error"]
    assert "The device went away" in capsys.readouterr().err
    model.answer = one_box
    assert label(images, "--batch", "1").code == 0


def test_a_request_no_image_can_answer_ends_the_run_before_it_begins(label, images, model, capsys):
    model.answer = lambda ask: Failure("bad_request", "The prompt has 700 tokens of at most 400.")
    done = label(images, "--prompt", "dog")
    assert done.code == 2
    assert "700 tokens" in capsys.readouterr().err
    model.answer = one_box
    assert label(images, "--prompt", "cat").code == 0, "nothing was labeled, so nothing is refused"


def test_a_model_that_does_not_load_leaves_the_folder_free(label, images, model, monkeypatch):
    import serve.commands.label as command

    def refuse(*_):
        raise CheckpointError("Unknown checkpoint 'demmo'.")

    with monkeypatch.context() as patched:
        patched.setattr(command, "load_model", refuse)
        assert label(images, "--model", "demmo").code == 2
    assert label(images, "--model", "demo").code == 0


def test_a_full_disk_is_one_sentence_and_the_run_can_go_on(
    label, images, monkeypatch, report_of, capsys
):
    from serve.labeling.project import GrowingProject

    add = GrowingProject.add

    def full(self, file, annotation):
        if file.name == "2.png":
            raise OSError(28, "No space left on device")
        add(self, file, annotation)

    with monkeypatch.context() as patched:
        patched.setattr(GrowingProject, "add", full)
        done = label(images, "--batch", "1")
    assert done.code == 1
    assert "No space left on device" in capsys.readouterr().err
    assert label(images, "--batch", "1").code == 0
    assert report_of(done.out)["labeled"] == 5


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("missing", "does not exist"),
        ("empty", "holds none."),
        ("only below", "holds none; add --recursive"),
        ("both ways", "give one of them"),
        ("text file", "ends in one of"),
        ("same folder", "two folders"),
        ("out is a file", "must be writable"),
        ("out holds other work", "begins in an empty folder"),
        ("out holds another journal", "begins with its settings"),
    ],
)
def test_bad_folders_get_one_sentence(case, sentence, label, images, tmp_path, capsys, model):
    source, out = images, tmp_path / "out"
    if case == "missing":
        source = tmp_path / "nowhere"
    elif case == "empty":
        source = tmp_path / "empty"
        source.mkdir()
    elif case == "text file":
        source = tmp_path / "notes.txt"
        source.write_text("hello")
    elif case == "same folder":
        out = images
    elif case in ("both ways", "only below"):
        pass
    elif case == "out is a file":
        out.write_text("hello")
        out = out / "below"
    else:
        out.mkdir()
        name = "journal.jsonl" if "journal" in case else "thesis.doc"
        (out / name).write_text("hello\n")
    if case == "only below":
        source = paint(tmp_path / "above" / "below" / "1.png", 1).parents[1]
    options = ["--overwrite", "--retry-failed"] if case == "both ways" else []
    done = label(source, *options, out=out)
    assert done.code == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert model.asked == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_gets_one_sentence(label, images, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert label(images, out=tmp_path / "locked" / "out").code == 2
    assert "must be writable" in capsys.readouterr().err


def test_debug_adds_the_traceback(label, tmp_path, capsys):
    assert label(tmp_path / "nowhere", "--debug").code == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_file_name_that_is_not_text_is_labeled_too(label, tmp_path, journal_of):
    folder = tmp_path / "odd"
    paint(folder / "x.png", 1)
    os.rename(folder / "x.png", os.fsencode(folder) + b"/caf\xe9.png")
    paint(folder / "день 1.png", 2)
    paint(folder / ("n" * 240 + ".png"), 3)
    done = label(folder)
    assert done.code == 0
    assert "caf\\xe9.png" in journal_of(done.out)
    assert len(read_project(done.out)[0]) == 3


def test_overwrite_moves_nothing_when_the_model_does_not_load(label, images, monkeypatch, capsys):
    import serve.commands.label as command

    def refuse(*_):
        raise DeviceError("There is no device cuda:9.")

    out = label(images).out
    before = files_below(out)
    monkeypatch.setattr(command, "load_model", refuse)
    assert label(images, "--overwrite").code == 2
    assert files_below(out) == before
    assert not out.with_name("out.old-1").exists()


def test_overwrite_puts_the_labels_back_when_no_image_can_be_asked(label, images, model):
    out = label(images).out
    before = files_below(out)
    model.answer = lambda ask: Failure("bad_request", "The prompt has 700 tokens of at most 400.")
    assert label(images, "--overwrite").code == 2
    after = files_below(out)
    assert {path: after[path] for path in before} == before
    assert not out.with_name("out.old-1").exists()


def test_overwrite_of_the_folder_one_stands_in(label, images, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert label(images, out=Path(".")).code == 0
    assert label(images, "--overwrite", out=Path(".")).code == 0
    assert (tmp_path / "here.old-1" / "journal.jsonl").exists()
    assert len(read_project(tmp_path / "here")[0]) == 5


def test_a_stopped_retry_goes_on_with_all_images(label, images, model, report_of):
    model.answer = lambda ask: Failure("too_slow", "The answer took too long.")
    label(images)
    paint(images / "new.png", 77)
    done = label(images, "--retry-failed")
    report = report_of(done.out)
    assert report["pending"] == 1
    assert "--retry-failed" not in report["resume_command"]
    assert report["retry_command"].count("--retry-failed") == 1


@pytest.mark.parametrize("batch", ["1", "8"])
def test_a_region_beyond_one_image_fails_that_image_only(label, tmp_path, model, report_of, batch):
    folder = tmp_path / "mixed"
    paint(folder / "a.png", 1, size=(100, 80))
    paint(folder / "b.png", 2, size=(640, 480))
    model.answer = lambda ask: result(ask.task, text="cat", size=ask.image.size_wh)
    done = label(
        folder, "--task", "region_category", "--region", "200,200,400,400", "--batch", batch
    )
    assert done.code == 1
    report = report_of(done.out)
    assert (report["labeled"], report["failed_by_code"]) == (1, {"bad_request": 1})
    assert model.asked == [color_of(2)]


def test_notes_on_answers_are_counted_by_image(label, images, model, report_of, capsys):
    def answer(ask: Ask):
        notes = ("boxes without area: 3", "cut: 1") if color_in(ask) == color_of(3) else ("cut: 2",)
        return result(ask.task, size=ask.image.size_wh, notes=notes)

    model.answer = answer
    done = label(images)
    assert report_of(done.out)["notes"] == {"cut": 5, "boxes without area": 1}
    assert "Dropped or repaired parts of answers: 5 images" in capsys.readouterr().err
    assert report_of(label(images).out)["notes"] == {"cut": 5, "boxes without area": 1}


def test_a_correction_that_the_journal_does_not_know_is_kept_aside(label, images, model):
    """After a kill between writing the files and the journal's line."""
    out = label(images).out
    journal = out / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-2]))
    annotation = out / "ds0/ann/4.png.json"
    corrected = json.loads(annotation.read_text()) | {"description": "mine"}
    annotation.write_text(json.dumps(corrected))
    assert label(images).code == 0
    assert json.loads(annotation.read_text())["description"] == ""
    (kept,) = (out / "edited").iterdir()
    assert json.loads(kept.read_text()) == corrected


def test_an_image_that_vanishes_before_it_is_copied_fails_alone(label, images, model, report_of):
    def answer(ask: Ask):
        if color_in(ask) == color_of(2):
            (images / "2.png").unlink()
        return one_box(ask)

    model.answer = answer
    done = label(images)
    assert done.code == 1
    report = report_of(done.out)
    assert (report["labeled"], report["failed_by_code"]) == (4, {"bad_image": 1})
    assert not (done.out / "ds0/ann/2.png.json").exists()


def test_a_subfolder_that_cannot_be_read_is_named_and_left_out(
    label, images, monkeypatch, report_of, capsys
):
    paint(images / "locked" / "9.png", 9)
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    done = label(images, "--recursive")
    assert done.code == 0
    assert report_of(done.out)["unreadable_folders"] == ["locked"]
    assert "'locked' cannot be read (Permission denied)" in capsys.readouterr().err


def test_a_model_that_breaks_midway_leaves_a_report(label, images, model, report_of, capsys):
    def answer(ask: Ask):
        if color_in(ask) == color_of(3):
            raise RuntimeError("out of memory")
        return one_box(ask)

    model.answer = answer
    done = label(images, "--batch", "1")
    assert done.code == 1
    assert report_of(done.out)["labeled"] == 3
    assert "RuntimeError: out of memory" in capsys.readouterr().err


def test_pictures_in_memory_are_bounded_by_their_pixels(tmp_path, monkeypatch):
    import serve.labeling.images as reading

    alive, most = 0, 0

    def load(file):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return reading.Loaded(file, None)

    files = [
        reading.ImageFile(paint(tmp_path / f"{n}.png", n, size=(100, 100)), str(n), str(n))
        for n in range(20)
    ]
    monkeypatch.setattr(reading, "_load", load)
    monkeypatch.setattr(reading, "MAX_PIXELS_IN_FLIGHT", 30_000)
    for _ in reading.read_ahead(files, threads=3, ahead=10):
        alive -= 1
    assert most <= 4


def test_a_signal_while_nothing_is_labeled_stops_at_once():
    from serve.labeling.progress import StopSwitch

    switch = StopSwitch()
    with pytest.raises(KeyboardInterrupt):
        switch.pull(2, None)
    with switch.after_batch():
        switch.pull(2, None)
        assert switch()


def test_a_replaced_checkpoint_is_refused_and_an_older_journal_is_not(
    label, images, monkeypatch, capsys
):
    import serve.commands.label as command

    monkeypatch.setattr(command, "fingerprint", lambda _: None)
    label(images)
    monkeypatch.setattr(command, "fingerprint", lambda _: "first")
    out = label(images).out
    assert label(images, "--overwrite").code == 0
    assert label(images).code == 0
    monkeypatch.setattr(command, "fingerprint", lambda _: "second")
    capsys.readouterr()
    assert label(images).code == 2
    assert 'checkpoint "first", not "second"' in capsys.readouterr().err
    assert out.exists()


def test_a_fingerprint_changes_with_the_weights(tmp_path, monkeypatch):
    import serve.commands.loading as loading

    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(5000))
    first = loading._hash(file)
    file.write_bytes(bytes(4999) + b"x")
    assert loading._hash(file) != first
    monkeypatch.setattr(loading, "_WHOLE_BYTES", 100)
    monkeypatch.setattr(loading, "_PIECE_BYTES", 10)
    large = loading._hash(file)
    file.write_bytes(bytes(5000))
    assert loading._hash(file) != large


def test_precision_reaches_the_model(label, images, monkeypatch):
    import serve.commands.label as command

    seen = []
    load = command.load_model
    monkeypatch.setattr(command, "load_model", lambda *given: seen.append(given) or load(*given))
    label(images, "--precision", "fp32")
    assert seen == [("Florence-2-large", "auto", "auto", "fp32")]

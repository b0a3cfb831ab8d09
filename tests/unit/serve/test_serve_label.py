"""Labeling a folder: what comes out, what a later run does, what fails alone."""

from __future__ import annotations

import csv

from label_fakes import color_in, color_of, files_below, one_box, paint, read_project, result

from florence2.engine.ask import Ask
from florence2.records import Box, Failure, Text


def test_a_folder_becomes_a_project_the_sdk_reads(label, images, model, report_of):
    done = label(images, "--prompt", "Red Car. dog", "--batch", "2")
    annotations, project = read_project(done.out)
    assert done.code == 0
    assert sorted(annotations) == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    names = [item.obj_class.name for item in annotations["0.png"].labels]
    assert names == ["Red Car", "dog"]
    assert [c.name for c in project.meta.obj_classes] == ["Red Car", "dog"]
    assert (done.out / "project/ds0/img/3.png").read_bytes() == (images / "3.png").read_bytes()
    report = report_of(done.out)
    assert (report["labeled"], report["empty"], report["failed"]) == (5, 0, 0)
    assert report["objects"] == 10
    assert report["this_run"]["images_per_second"] > 0
    assert done.loads == [("Florence-2-large", "auto", "auto")]


def test_the_second_run_of_one_command_does_nothing(label, images, model):
    first = label(images)
    before = files_below(first.out / "project/ds0")
    asked = len(model.asked)
    second = label(images)
    assert second.code == 0
    assert len(model.asked) == asked
    assert len(second.loads) == 1, "no model is loaded when there is nothing to do"
    assert files_below(first.out / "project/ds0") == before


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
    assert not list((done.out / "project/ds0/img").iterdir())


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


FORMULAS = {
    "equals": "=1+1.png",
    "plus": "+1.png",
    "minus": "-1.png",
    "at": "@SUM(1).png",
    "a tab": "\t=1.png",
    "a line's end": "\r=1.png",
    "a new line": "\n=1.png",
    "after spaces": "  =1.png",
    "after a quote": '"=1.png',
    "in full width": "\uff1d1.png",
    "a command": "=cmd|' -C calc'!A0.png",
}
PLAIN = ["1.png", "a=b.png", "name -1.png", "' quoted'.png", "\u56fe.png", "a,b.png"]


def test_no_cell_of_the_table_of_failures_is_a_formula(label, tmp_path):
    images = tmp_path / "hostile"
    images.mkdir()
    for name in [*FORMULAS.values(), *PLAIN]:
        (images / name).write_bytes(b"this is no image")
    paint(images / "good.png", 1)
    done = label(images)
    with (done.out / "failed.csv").open(encoding="utf-8", newline="") as table:
        cells = [row["image"] for row in csv.DictReader(table)]
    assert sorted(cells) == sorted([f"'{name}" for name in FORMULAS.values()] + PLAIN)

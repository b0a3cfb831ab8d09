"""Which files are labeled and how they are read; what is written beside the labels."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from label_fakes import color_in, color_of, one_box, paint, read_project, result
from PIL import Image

from florence2.budget import Budget
from florence2.engine.ask import Ask
from florence2.records import Polygon, Text
from serve.sdk import sly


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
        stored = Image.open(done.out / "project/ds0/img" / journal[key]["name"]).getpixel((0, 0))
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
    assert (linked / "project/ds0/img/0.png").stat().st_ino == original
    assert (copied / "project/ds0/img/0.png").stat().st_ino != original
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
    lines = [path.read_text().split() for path in (done.out / "yolo/labels").rglob("*.txt")]
    assert sorted(map(len, lines)) == [7, 9, 9, 9, 9]


def test_coco_and_yolo_hold_the_same_objects(label, images, model):
    done = label(images, "--class", "Dog=puppy,hound", "--class", "red car", "--coco", "--yolo")
    coco = json.loads((done.out / "coco/ds0/annotations/coco_instances.json").read_text())
    assert [category["name"] for category in coco["categories"]] == ["Dog", "red car"]
    assert len(coco["images"]) == 5
    assert len(coco["annotations"]) == 10
    assert coco["annotations"][0]["bbox"][:2] == [4, 4]
    for path in (done.out / "yolo/labels").rglob("*.txt"):
        assert path.read_text() == "0 0.187500 0.250000 0.250000 0.333333\n" + (
            "1 0.187500 0.250000 0.250000 0.333333\n"
        )
    assert "names: [Dog, red car]" in (done.out / "yolo/data.yaml").read_text()
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
    for path in (done.out / "yolo/labels").rglob("*.txt"):
        assert len(path.read_text().split()) == 7


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
    assert not (done.out / "project/ds0/ann/2.png.json").exists()


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


def test_pictures_in_memory_are_bounded_by_their_pixels(tmp_path, monkeypatch):
    import serve.labeling.images as reading

    alive, most = 0, 0

    def note(loaded):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return SimpleNamespace(held_pixels=10_000)

    files = [
        reading.ImageFile(paint(tmp_path / f"{n}.png", n, size=(100, 100)), str(n), str(n))
        for n in range(20)
    ]
    monkeypatch.setattr(reading, "MAX_PIXELS_IN_FLIGHT", 30_000)
    budget = Budget(10**6, "pixels")
    for _ in reading.read_ahead(files, note, threads=3, ahead=10, budget=budget):
        alive -= 1
    assert most <= 4


SIZES = {
    "each larger than everything": [(300, 200)] * 4,
    "small ones before a large one": [(50, 50)] * 3 + [(300, 200)] + [(50, 50)] * 3,
    "just what fits": [(100, 100)] * 6,
    "damaged ones between": [(300, 200), None, (300, 200), None],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_run_never_holds_more_pixels_than_fit_and_never_waits_for_itself(
    label, tmp_path, monkeypatch, journal_of, sizes
):
    budget = Budget(40_000, "pixels")
    monkeypatch.setattr("serve.labeling.pipeline.open_pixels", lambda: budget)
    most = []
    change = budget._change
    budget._change = lambda amount: (change(amount), most.append(budget.held))
    images = tmp_path / "sized"
    for number, size in enumerate(sizes):
        path = paint(images / f"{number}.png", number, size=size or (9, 9))
        if size is None:
            path.write_bytes(b"x")
    done = label(images, "--batch", "3")
    states = [entry["state"] for entry in journal_of(done.out).values()]
    assert states.count("failed") == sizes.count(None)
    assert len(states) == len(sizes)
    largest = max(width * height for width, height in filter(None, sizes))
    assert max(most) <= max(40_000, largest + 10_000)
    assert budget.held == 0


def test_files_that_cannot_be_read_after_all_hold_no_room(tmp_path, monkeypatch):
    """They were there when their headers were read."""
    from serve.labeling import images as reading

    def gone(path):
        raise OSError(5, "Input/output error")

    budget = Budget(10_000, "pixels")
    files = [
        reading.ImageFile(paint(tmp_path / f"{n}.png", n), f"{n}.png", f"{n}.png") for n in range(9)
    ]
    monkeypatch.setattr(reading, "stamp_of", gone)
    problems = []

    def note(loaded):
        problems.append(loaded.problem)
        return SimpleNamespace(held_pixels=0)

    list(reading.read_ahead(files, note, threads=2, ahead=2, budget=budget))
    assert [str(one) for one in problems] == ["The image cannot be read: Input/output error."] * 9
    assert budget.held == 0

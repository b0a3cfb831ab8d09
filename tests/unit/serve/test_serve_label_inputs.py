"""Other people's folders: whatever is not labeled, or only in part, or is not the same any more, is
named."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
from label_fakes import (
    color_in,
    color_of,
    dataset_of,
    files_below,
    one_box,
    paint,
    read_project,
    result,
)
from PIL import Image

from florence2.engine.ask import Ask
from serve.sdk import sly


def failed_rows(out: Path) -> dict[str, dict[str, str]]:
    return {row["image"]: row for row in csv.DictReader((out / "failed.csv").open(newline=""))}


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two folders with an image each, and one outside with another."""
    paint(tmp_path / "tree" / "a" / "1.png", 1)
    paint(tmp_path / "tree" / "b" / "2.png", 2)
    paint(tmp_path / "outside" / "deep" / "3.png", 3)
    return tmp_path / "tree"


LINKS = [
    ("an image", "c.png", "a/1.png", ["c.png"], None),
    ("a folder outside", "c", "../outside", ["c/deep/3.png"], None),
    ("a folder inside", "c", "a", [], "c"),
    ("the folder itself", "c", ".", [], "c"),
    ("the folder above", "a/up", "..", [], "a/up"),
    ("what holds the folder", "c", "..", [], "c"),
]


@pytest.mark.parametrize(
    ("link", "target", "more", "passed_over"), [row[1:] for row in LINKS], ids=[r[0] for r in LINKS]
)
def test_a_link_is_followed_once_or_named(
    label, tree, journal_of, report_of, capsys, link, target, more, passed_over
):
    (tree / link).symlink_to(target)
    done = label(tree, "--recursive")
    assert sorted(journal_of(done.out)) == sorted(["a/1.png", "b/2.png", *more])
    assert list(report_of(done.out)["folders_passed_over"]) == (
        [passed_over] if passed_over else []
    )
    assert not passed_over or f"The folder '{passed_over}'" in capsys.readouterr().err


def test_of_two_links_to_one_folder_one_is_followed(label, tree, journal_of, report_of):
    for name in ("c", "d"):
        (tree / name).symlink_to("../outside")
    (tree / "e").symlink_to("../outside/deep")
    done = label(tree, "--recursive")
    assert sorted(journal_of(done.out)) == ["a/1.png", "b/2.png", "c/deep/3.png"]
    assert report_of(done.out)["folders_passed_over"] == {
        "d": "is the same folder as 'c'",
        "e": "is the same folder as 'c/deep'",
    }


@pytest.mark.parametrize("target", ["nowhere.png", "loop.png", "a/1.png/x"])
def test_a_link_to_no_image_is_a_failed_image(label, tree, model, target, report_of):
    (tree / "loop.png").symlink_to(target)
    done = label(tree, "--recursive")
    assert done.code == 1
    assert target in failed_rows(done.out)["loop.png"]["message"]
    (tree / "loop.png").unlink()
    paint(tree / "loop.png", 4)
    assert label(tree, "--recursive", "--retry-failed").code == 0
    assert model.asked[2:] == [color_of(4)]


def test_a_link_to_nothing_and_what_is_no_file_are_named(label, tree, capsys):
    (tree / "data").symlink_to("/nowhere/at/all")
    (tree / "labels.txt").symlink_to("nowhere.txt")
    os.mkfifo(tree / "pipe.png")
    done = label(tree, "--recursive")
    codes = {path: row["code"] for path, row in failed_rows(done.out).items()}
    assert codes == {"data": "broken_link", "pipe.png": "no_file"}
    assert "/nowhere/at/all" in capsys.readouterr().err


def test_subfolders_that_are_left_out_are_counted(label, tree, report_of, capsys):
    paint(tree / "0.png", 0)
    (tree / "c").symlink_to("../outside")
    done = label(tree)
    assert report_of(done.out)["subfolders_left_out"] == 3
    assert "3 subfolders were not looked into" in capsys.readouterr().err


def test_kinds_that_a_project_cannot_hold_are_named_and_sidecars_are_not(
    label, images, report_of, capsys
):
    named = ["a.heic", "b.HEIC", "c.gif", "d.avif", "e.pdf", "f.svg", "g.dng", "h.mp4", "IMG_7"]
    sidecars = [
        "0.txt",
        "0.json",
        "0.xml",
        "classes.names",
        "data.yaml",
        "Thumbs.db",
        ".hidden.gif",
    ]
    for name in named + sidecars:
        (images / name).write_bytes(b"x")
    done = label(images)
    assert done.code == 0, "whatever can be labeled is"
    report = report_of(done.out)
    assert report["unsupported_files"] == len(named)
    assert report["unsupported_kinds"][".heic"] == 2
    assert sorted(failed_rows(done.out)) == sorted(named)
    assert "2 .heic" in capsys.readouterr().err
    for name in named:
        (images / name).unlink()
    assert not (label(images).out / "failed.csv").exists()


def test_a_folder_of_nothing_but_other_kinds_says_which(label, tmp_path, capsys):
    folder = tmp_path / "phone"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.heic").write_bytes(b"x")
    assert label(folder).code == 2
    assert "holds none, but 3 .heic" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["tif", "png", "webp"])
def test_of_many_pages_or_frames_the_first_is_labeled_and_that_is_said(
    label, images, model, report_of, capsys, suffix
):
    frames = [Image.new("RGB", (64, 48), color_of(number)) for number in (20, 21, 22)]
    kept = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(images / f"many.{suffix}", save_all=True, append_images=frames[1:], **kept)
    for _ in range(2):
        done = label(images)
        assert report_of(done.out)["first_page_only"] == [f"many.{suffix}"]
        assert f"only the first was labeled: many.{suffix}" in capsys.readouterr().err
    assert color_of(20) in model.asked
    assert len(model.asked) == 6


def repainted(path: Path, number: int) -> None:
    """Another picture in a file of the same size: an uncompressed one."""
    size = path.stat().st_size
    Image.new("RGB", (64, 48), color_of(number)).save(path)
    assert path.stat().st_size == size


@pytest.fixture
def bitmaps(tmp_path) -> Path:
    folder = tmp_path / "bitmaps"
    for number in range(4):
        paint(folder / f"{number}.bmp", number)
    return folder


CHANGES = [
    ("content", lambda path: repainted(path, 9), True),
    ("size", lambda path: paint(path, 9, size=(32, 32)), True),
    ("only the time", lambda path: os.utime(path, ns=(1, 1)), False),
    ("nothing", lambda path: None, False),
]


@pytest.mark.parametrize(
    ("change", "is_said"), [r[1:] for r in CHANGES], ids=[r[0] for r in CHANGES]
)
def test_an_image_that_changed_is_said_and_labeled_again_on_demand(
    label, bitmaps, model, report_of, capsys, change, is_said
):
    label(bitmaps)
    change(bitmaps / "2.bmp")
    asked = len(model.asked)
    capsys.readouterr()
    done = label(bitmaps)
    assert done.code == 0
    assert len(model.asked) == asked, "without the option nothing is done twice"
    assert report_of(done.out)["changed"] == (["2.bmp"] if is_said else [])
    assert ("--relabel-changed" in capsys.readouterr().err) is is_said
    label(bitmaps, "--relabel-changed")
    assert model.asked[asked:] == ([color_of(9)] if is_said else [])
    report = report_of(label(bitmaps).out)
    assert (report["labeled"], report["changed"], report["objects"]) == (4, [], 4)
    stored = Image.open(dataset_of(done.out) / "img/2.bmp").getpixel((0, 0))
    assert stored == (color_of(9) if is_said else color_of(2))
    assert not (done.out / "edited").exists(), "labels that nobody edited are no person's"


def test_contents_are_read_again_only_on_doubt(label, bitmaps, monkeypatch):
    import serve.labeling.run as session

    label(bitmaps)
    read = []
    monkeypatch.setattr(session, "hash_of", lambda path: read.append(path.name))
    label(bitmaps)
    assert read == []
    os.utime(bitmaps / "1.bmp", ns=(1, 1))
    label(bitmaps)
    assert read == ["1.bmp"]


def test_what_a_person_made_of_labels_is_kept_when_the_image_is_labeled_again(label, bitmaps):
    out = label(bitmaps).out
    annotation = dataset_of(out) / "ann/2.bmp.json"
    corrected = json.loads(annotation.read_text()) | {"description": "mine"}
    annotation.write_text(json.dumps(corrected))
    repainted(bitmaps / "2.bmp", 9)
    label(bitmaps, "--relabel-changed")
    (kept,) = (out / "edited").iterdir()
    assert json.loads(kept.read_text()) == corrected


def test_a_changed_image_that_fails_keeps_its_labels_and_is_a_failure(
    label, bitmaps, report_of, capsys
):
    out = label(bitmaps).out
    before = files_below(dataset_of(out))
    (bitmaps / "2.bmp").write_bytes(b"no image")
    assert label(bitmaps, "--relabel-changed").code == 1
    assert "its earlier labels stay" in capsys.readouterr().err
    assert failed_rows(out)["2.bmp"]["code"] == "bad_image"
    assert files_below(dataset_of(out)) == before
    report = report_of(label(bitmaps).out)
    assert (report["labeled"], report["failed"], report["changed"]) == (4, 0, ["2.bmp"])


def test_an_image_that_changes_while_it_is_labeled_fails(label, bitmaps, model, journal_of):
    def answer(ask: Ask):
        if color_in(ask) == color_of(2):
            paint(bitmaps / "2.bmp", 9, size=(32, 32))
        return one_box(ask)

    model.answer = answer
    done = label(bitmaps)
    assert journal_of(done.out)["2.bmp"]["state"] == "failed"
    assert len(read_project(done.out)[0]) == 3
    model.answer = one_box
    assert label(bitmaps, "--retry-failed").code == 0
    assert read_project(done.out)[0]["2.bmp"].img_size == (32, 32)


def test_an_image_that_is_gone_is_counted(label, images, report_of, capsys):
    label(images)
    (images / "3.png").unlink()
    report = report_of(label(images).out)
    assert (report["labeled"], report["gone"]) == (5, 1)
    assert "1 images that were looked at are not in the folder" in capsys.readouterr().err


def test_a_folder_that_holds_outputs_has_none_of_them_labeled(label, images, model, report_of):
    """Whatever its name is: moved aside, renamed, copied."""
    out = label(images, "--recursive", "--draw", "--coco", out=images / "labels").out
    label(images, "--recursive", "--draw", "--overwrite", out=out)
    shutil.copytree(out, images / "kept for later")
    (images / "linked").symlink_to(images / "kept for later" / "previews")
    model.asked.clear()
    done = label(images, "--recursive", "--draw", out=images / "new")
    assert len(model.asked) == 5
    passed_over = report_of(done.out)["folders_passed_over"]
    assert sorted(passed_over) == ["kept for later", "labels", "labels.old-1", "linked"]


def test_labels_that_a_kill_left_half_moved_are_no_images(label, images, model, monkeypatch):
    out = label(images, "--recursive", "--draw", out=images / "labels").out
    rename = Path.rename

    def killed(self, target):
        if self.name == "previews":
            rename(self, target)
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        label(images, "--recursive", "--draw", "--overwrite", out=out)
    assert (images / "labels.old-1" / "previews").is_dir()
    assert not (images / "labels.old-1" / "journal.jsonl").exists()
    model.asked.clear()
    label(images, "--recursive", out=images / "new")
    assert len(model.asked) == 5


@pytest.mark.parametrize("part", [".", "previews", "coco"])
def test_an_output_is_no_folder_of_images(label, images, model, tmp_path, capsys, part):
    out = label(images, "--draw", "--coco").out
    model.asked.clear()
    assert label(out / part, "--recursive", out=tmp_path / "again").code == 2
    assert "Previews and exports are not labeled" in capsys.readouterr().err
    assert model.asked == []


def test_the_images_of_a_project_can_be_labeled_in_another_way(label, images, model, tmp_path):
    out = label(images).out
    assert label(dataset_of(out) / "img", "--task", "ocr", out=tmp_path / "again").code == 0
    assert len(model.asked) == 10


def test_a_journal_of_somebody_else_hides_no_images(label, images, model):
    paint(images / "sub" / "9.png", 9)
    (images / "sub" / "journal.jsonl").write_text('{"mine": true}\n')
    label(images, "--recursive")
    assert color_of(9) in model.asked


def test_a_folder_whose_name_is_not_text_gets_its_report(label, tmp_path, report_of):
    folder = paint(tmp_path / "x" / "1.png", 1).parent
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.rename(odd)
    (odd / "2.png").write_bytes(b"no image")
    done = label(odd)
    assert done.code == 1
    assert "caf" in report_of(done.out)["settings"]["images"]
    assert list(failed_rows(done.out)) == ["2.png"]


def test_names_cannot_command_the_terminal(label, images, capsys):
    (images / "\x1b[2J\r.png").write_bytes(b"no image")
    done = label(images)
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert "\\x1b[2J" in err
    assert list(failed_rows(done.out)) == ["\x1b[2J\r.png"]


def test_an_empty_answer_is_still_empty_after_a_change(label, bitmaps, model, report_of):
    """Totals count each image once, whatever it was before."""
    label(bitmaps)
    repainted(bitmaps / "0.bmp", 9)
    model.answer = lambda ask: result(ask.task, size=ask.image.size_wh)
    report = report_of(label(bitmaps, "--relabel-changed").out)
    assert (report["labeled"], report["empty"], report["objects"]) == (3, 1, 3)
    assert report == report_of(label(bitmaps).out) | {key: report[key] for key in ("this_run",)}


def test_names_that_are_written_alike_are_different_images(label, tmp_path, model, report_of):
    """A byte that is not text is written as the name beside it has it in letters."""
    names = [b"\xff.png", rb"\xff.png", rb"\x5cxff.png", b"\\\xff.png", rb"\\xff.png"]
    folder = tmp_path / "odd"
    for number, name in enumerate(names):
        paint(folder / "x.png", number).rename(folder / os.fsdecode(name))
    done = label(folder, "--batch", "1")
    report = report_of(done.out)
    assert (report["labeled"], report["gone"]) == (len(names), 0)
    stored = [
        Image.open(path).getpixel((0, 0)) for path in (dataset_of(done.out) / "img").iterdir()
    ]
    assert sorted(stored) == [color_of(number) for number in range(len(names))]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("GIF", "a.jpg"),
        ("ICO", "a.png"),
        ("JPEG2000", "a.jpeg"),
        ("PPM", "a.tif"),
        ("AVIF", "a.webp"),
    ],
)
def test_a_file_of_another_kind_than_its_name_fails_until_it_is_converted(
    label, images, model, report_of, kind, name
):
    """The SDK looks into a file, and reads none of these."""
    picture = Image.open(paint(images / "x.bmp", 9))
    (images / "x.bmp").unlink()
    try:
        picture.save(images / name, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    done = label(images)
    assert (done.code, report_of(done.out)["labeled"]) == (1, 5)
    row = failed_rows(done.out)[name]
    assert row["code"] == "unsupported_kind"
    assert f"this file is {kind}" in row["message"]
    assert not (dataset_of(done.out) / "img" / name).exists()
    picture.save(images / name, "PNG")
    assert label(images, "--retry-failed").code == 0


def test_a_wrong_suffix_of_a_kind_that_a_project_holds_does_no_harm(label, tmp_path):
    for suffix, kind in [("jpg", "PNG"), ("png", "BMP"), ("webp", "TIFF"), ("bmp", "MPO")]:
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", (64, 48)).save(tmp_path / "in" / f"a.{suffix}", kind)
    done = label(tmp_path / "in")
    assert done.code == 0
    for path in (dataset_of(done.out) / "img").iterdir():
        sly.image.validate_format(str(path))


def test_folders_may_lie_deeper_than_calls_can(label, tmp_path, model):
    folder = tmp_path / "deep"
    for _ in range(550):
        folder /= "d"
    here = tmp_path / "deep"
    here.mkdir()
    while here != folder:
        here /= "d"
        here.mkdir()
    paint(folder / "1.png", 1)
    assert label(tmp_path / "deep", "--recursive").code == 0
    assert model.asked == [color_of(1)]


def test_what_a_path_is_too_long_for_is_named_and_stops_no_run(label, images, model):
    """The same as without the right to look into a folder: its names are there, and no more."""
    longest = os.pathconf("/", "PC_PATH_MAX")
    folder = images
    while (room := longest - 12 - len(os.fsencode(folder))) > 1:
        folder /= "d" * min(200, room)
        folder.mkdir()
    paint(images / "9.png", 9).rename(folder / "9.png")
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.close(os.open("much-too-long.png", os.O_CREAT | os.O_WRONLY, dir_fd=opened))
    finally:
        os.close(opened)
    done = label(images, "--recursive")
    assert done.code == 1
    assert color_of(9) in model.asked, "a folder that has no room for a journal is no output"
    assert len(model.asked) == 6
    (row,) = failed_rows(done.out).values()
    assert row["message"].startswith("The image cannot be read: File name too long")

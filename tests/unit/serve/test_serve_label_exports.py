"""COCO and YOLO files: nothing twice, nothing lost in silence, read by the tools they are for."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from faster_coco_eval import COCO
from label_fakes import color_in, paint, read_project, result
from PIL import Image

from florence2.records import Box, Polygon, Text
from serve.labeling.exports import file_names
from serve.labeling.previews import preview_pixels
from serve.sdk import sly

RING = (4.0, 4.0, 20.0, 4.0, 20.0, 24.0, 4.0, 24.0)


def coco_of(out: Path) -> dict:
    return json.loads((out / "coco/ds0/annotations/coco_instances.json").read_text("ascii"))


def yolo_of(out: Path) -> dict[str, list[str]]:
    """Lines of labels by image file, found as trainers find them, below ``data.yaml``'s folder."""
    root = out / "yolo"
    data = yaml.safe_load((root / "data.yaml").read_text("utf-8"))
    assert "path" not in data
    assert data["nc"] == len(data["names"]) > 0
    read: dict[str, list[str]] = {}
    for split in dict.fromkeys((data["train"], data["val"])):
        images = sorted((root / split).iterdir())
        assert images, split
        for image in images:
            assert image.suffix.lower() in {
                ".jpg", ".jpeg", ".mpo", ".bmp", ".png", ".webp", ".tif", ".tiff",
            }  # fmt: skip
            labels = str(image).replace("/images/", "/labels/").rsplit(".", 1)[0] + ".txt"
            assert image.name not in read
            read[image.name] = Path(labels).read_text("utf-8").splitlines()
    assert len(list((root / "labels").rglob("*.txt"))) == len(read)
    return read


def number_of(path: Path) -> int:
    red, green, _ = Image.open(path).convert("RGB").getpixel((0, 0))
    return red + 256 * green


def tell_apart(ask):
    """One object whose class is the number of the image."""
    red, green, _ = color_in(ask)
    return result(ask.task, Box((4.0, 4.0, 20.0, 20.0), f"n{red + 256 * green}", 0.9))


ODD_NAMES = {
    "the same stem": ["a.png", "a.bmp", "a.tiff", "a_bmp.png"],
    "case only": ["a.png", "A.png", "a.PNG", "A.PNG"],
    "folders": ["1.png", "x/1.png", "x/y/1.png", "x__1.png", "y/1.bmp"],
    "ways to write an accent": [unicodedata.normalize(f, "é.png") for f in ("NFC", "NFD")],
    "dots, spaces, brackets": ["a.b.png", "a.b.c.png", "a b.png", "[a] images labels.png"],
    "other scripts": ["день 1.png", "日本.png", "ß.png", "ss.png"],
}


@pytest.mark.parametrize("names", ODD_NAMES.values(), ids=ODD_NAMES)
def test_every_image_has_a_label_file_with_its_own_labels(label, model, tmp_path, names):
    model.answer = tell_apart
    for number, name in enumerate(names):
        paint(tmp_path / "in" / name, number)
    done = label(tmp_path / "in", "--recursive", "--yolo", "--coco")
    assert done.code == 0
    labels = yolo_of(done.out)
    assert len(labels) == len(names)
    stems = [unicodedata.normalize("NFC", name.rsplit(".", 1)[0]).casefold() for name in labels]
    assert len(set(stems)) == len(names)
    classes = yaml.safe_load((done.out / "yolo/data.yaml").read_text())["names"]
    for path in (done.out / "yolo/images").rglob("*.*"):
        [line] = labels[path.name]
        assert classes[int(line.split()[0])] == f"n{number_of(path)}"
    coco = coco_of(done.out)
    assert len({image["file_name"] for image in coco["images"]}) == len(names)


def test_an_image_has_its_own_name_where_no_other_has_it():
    names = ["a.jpg", "a.png", "a_png.jpg", "b.JFIF", "c.jpeg"]
    assert file_names(reversed(names)) == {
        "a.jpg": "a.jpg",
        "a.png": "a_png_2.png",
        "a_png.jpg": "a_png.jpg",
        "b.JFIF": "b.jpg",
        "c.jpeg": "c.jpeg",
    }


def test_images_with_another_name_are_counted(label, tmp_path, capsys):
    for number, name in enumerate(["a.png", "a.bmp", "b.png"]):
        paint(tmp_path / "in" / name, number)
    label(tmp_path / "in", "--yolo")
    assert "1 images have another name than in the project" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("box", "bbox"),
    [
        pytest.param((4, 4, 20, 24), [4, 4, 16, 20], id="box"),
        pytest.param((4, 4, 5, 24), [4, 4, 1, 20], id="a pixel wide"),
        pytest.param((4.2, 4.3, 4.4, 4.4), [4, 4, 1, 1], id="less than a pixel"),
        pytest.param((0, 0, 64, 48), [0, 0, 64, 48], id="the whole image"),
    ],
)
def test_a_box_is_as_wide_in_every_export_as_its_label(label, images, model, box, bbox):
    model.answer = lambda ask: result(ask.task, Box(tuple(map(float, box)), "cat", 0.75))
    done = label(images, "--coco", "--yolo")
    [annotation, *_] = read_project(done.out)[0].values()
    shape = annotation.labels[0].geometry
    assert [shape.left, shape.top, shape.width, shape.height] == bbox
    for entry in coco_of(done.out)["annotations"]:
        assert entry["bbox"] == bbox
        assert entry["area"] == bbox[2] * bbox[3] == shape.area
        assert entry["score"] == 0.75
    x, y, width, height = bbox
    for [line] in yolo_of(done.out).values():
        number, *places = map(float, line.split())
        scaled = [(x + width / 2) / 64, (y + height / 2) / 48, width / 64, height / 48]
        assert number == 0
        assert places == pytest.approx(scaled, abs=1e-6)


@pytest.mark.parametrize(
    "ring",
    [
        pytest.param((4.0, 4.0, 20.0, 4.0, 12.0, 4.0), id="along a row"),
        pytest.param((4.0, 4.0, 8.0, 8.0, 30.0, 30.0, 9.0, 9.0), id="a slanted line and back"),
        pytest.param((4.1, 4.0, 4.3, 20.0, 4.2, 30.0), id="narrower than a pixel"),
    ],
)
def test_an_outline_without_area_is_nowhere_and_is_noted(label, images, model, report_of, ring):
    flat, good = Polygon((ring,), "", 0.9), Polygon((ring, RING), "", 0.8)
    model.answer = lambda ask: result(ask.task, flat, good)
    done = label(images, "--task", "referring_segmentation", "--prompt", "cat", "--coco", "--yolo")
    for annotation in read_project(done.out)[0].values():
        assert [one.geometry.area for one in annotation.labels] == [320.0]
    for entry in coco_of(done.out)["annotations"]:
        assert (entry["area"], entry["bbox"], len(entry["segmentation"])) == (
            320,
            [4, 4, 16, 20],
            1,
        )
    assert [len(lines) for lines in yolo_of(done.out).values()] == [1] * 5
    assert report_of(done.out)["notes"] == {"outlines without area, left out": 5}


def a_mask() -> sly.Bitmap:
    mask = np.zeros((10, 10), bool)
    mask[2:8, 2:8] = True
    return sly.Bitmap(mask, sly.PointLocation(20, 30))


SQUARE = [sly.PointLocation(*point) for point in ((4, 4), (4, 20), (20, 20), (20, 4))]
HOLE = [sly.PointLocation(*point) for point in ((8, 8), (8, 12), (12, 12), (12, 8))]


@pytest.mark.parametrize(
    ("shape", "boxes", "sentence"),
    [
        pytest.param(
            sly.Polygon([sly.PointLocation(n, n) for n in (1, 9, 5)]), [],
            "1 labels without an area, left out", id="an outline on a line",
        ),
        pytest.param(
            sly.Polyline(SQUARE), [], "1 labels without an area, left out", id="a polyline"
        ),
        pytest.param(
            sly.Polygon(SQUARE, [HOLE]), [[4, 4, 16, 16]], "1 outlines with holes", id="a hole"
        ),
        pytest.param(a_mask(), [[32, 22, 6, 6]], "", id="a mask"),
    ],
)  # fmt: skip
def test_what_a_person_drew_is_exported_or_said(label, images, capsys, shape, boxes, sentence):
    out = label(images).out
    path = out / "project/ds0/ann/0.png.json"
    annotations, project = read_project(out)
    drawn = sly.Label(shape, sly.ObjClass("mine", type(shape)))
    annotation = annotations["0.png"].add_label(drawn)
    path.write_text(json.dumps(annotation.to_json()))
    meta = project.meta.add_obj_class(drawn.obj_class)
    (out / "project/meta.json").write_text(json.dumps(meta.to_json()))
    label(images, "--coco", "--yolo")
    found = coco_of(out)["annotations"]
    assert [one["bbox"] for one in found if one["category_id"] == 2] == boxes
    assert len(found) == 5 + len(boxes)
    assert sum(map(len, yolo_of(out).values())) == 5 + len(boxes)
    assert capsys.readouterr().err.count(sentence) >= 2


def test_an_object_of_two_rings_stays_one_object(label, images, model):
    far = (40.0, 30.0, 50.0, 30.0, 50.0, 40.0, 40.0, 40.0)
    model.answer = lambda ask: result(ask.task, Polygon((RING, far), "", 0.8))
    done = label(images, "--task", "referring_segmentation", "--prompt", "cat", "--coco", "--yolo")
    for entry in coco_of(done.out)["annotations"]:
        assert (entry["area"], len(entry["segmentation"])) == (420, 2)
        assert entry["bbox"] == [4, 4, 46, 36]
    for [line] in yolo_of(done.out).values():
        places = [float(word) for word in line.split()[1:]]
        points = {
            (round(x * 64), round(y * 48)) for x, y in zip(places[::2], places[1::2], strict=True)
        }
        wanted = [*zip(RING[::2], RING[1::2], strict=True), *zip(far[::2], far[1::2], strict=True)]
        assert points == set(wanted)


def test_a_file_has_either_boxes_or_outlines(label, images, model, capsys):
    """Trainers pass over an image whose file has both, or take its boxes for outlines."""

    def answer(ask):
        return result(
            ask.task, Box((4.0, 4.0, 20.0, 24.0), "cat", 0.9), Polygon((RING,), "dog", 0.8)
        )

    model.answer = answer
    done = label(images, "--task", "open_vocabulary_detection", "--prompt", "cat", "--yolo")
    for lines in yolo_of(done.out).values():
        assert [len(line.split()) for line in lines] == [9, 9]
        assert lines[0].split()[1:] == lines[1].split()[1:]
    assert "5 boxes written as four corners" in capsys.readouterr().err


def test_what_yolo_files_cannot_hold_is_said(label, images, model, capsys):
    done = label(images, "--yolo")
    assert "5 objects or images with tags, such as scores" in capsys.readouterr().err
    model.answer = lambda ask: result(ask.task, Text("A cat.", 0.9), text="A cat.")
    done = label(images, "--task", "caption", "--yolo", out=done.out.with_name("captions"))
    assert done.code == 0
    assert "no objects to train on" in capsys.readouterr().err
    assert not (done.out / "yolo/data.yaml").exists()


def test_coco_files_hold_every_tag_and_load(label, images, model):
    def answer(ask):
        return result(ask.task, Box((4.0, 4.0, 20.0, 20.0), "a cat on a mat", 0.9))

    model.answer = answer
    done = label(images, "--task", "dense_region_caption", "--coco")
    read = COCO(str(done.out / "coco/ds0/annotations/coco_instances.json"))
    assert len(read.getImgIds()) == len(read.getAnnIds()) == 5
    assert len({entry["id"] for entry in read.loadAnns(read.getAnnIds())}) == 5
    for entry in read.loadAnns(read.getAnnIds()):
        assert entry["attributes"] == {"description": "a cat on a mat"}
    assert not (done.out / "coco/ds0/annotations/coco_captions.json").exists()


def sides_of(out: Path) -> dict[str, str]:
    return {path.name: path.parent.name for path in (out / "yolo/images").rglob("*.*")}


def test_new_images_and_a_second_run_move_no_image_to_the_other_side(label, tmp_path):
    for number in range(60):
        paint(tmp_path / "in" / f"{number}.png", number)
    out = label(tmp_path / "in", "--yolo").out
    before = sides_of(out)
    assert 4 <= Counter(before.values())["val"] <= 22
    for number in range(60, 90):
        paint(tmp_path / "in" / f"0{number}.png", number)
    label(tmp_path / "in", "--yolo")
    after = sides_of(out)
    assert len(after) == 90
    assert after.items() >= before.items()
    half = label(tmp_path / "in", "--yolo", "--val-fraction", "0.5").out
    assert {name for name, side in after.items() if side == "val"} < {
        name for name, side in sides_of(half).items() if side == "val"
    }


@pytest.mark.parametrize(
    ("count", "fraction", "val"), [(2, "0.2", 1), (2, "0.99", 1), (1, "0.2", 0), (5, "0", 0)]
)
def test_both_sides_have_images_where_that_can_be(label, tmp_path, capsys, count, fraction, val):
    for number in range(count):
        paint(tmp_path / "in" / f"{number}.png", number)
    out = label(tmp_path / "in", "--yolo", "--val-fraction", fraction).out
    assert Counter(sides_of(out).values())["val"] == val
    assert len(yolo_of(out)) == count
    assert ("data.yaml names train for it" in capsys.readouterr().err) == (val == 0)


@pytest.mark.parametrize("fraction", ["1", "-0.1", "nan", "20"])
def test_a_share_for_validation_that_cannot_be_is_refused(label, images, fraction, capsys, model):
    assert label(images, "--yolo", f"--val-fraction={fraction}").code == 2
    assert "from 0 to below 1" in capsys.readouterr().err
    assert not model.asked


def test_an_export_is_made_anew_and_leaves_a_trainers_files(label, images, tmp_path):
    out = label(images, "--yolo").out
    (out / "yolo/runs").mkdir()
    (out / "yolo/runs/best.pt").write_text("weights")
    (out / "yolo/labels/train.cache").write_text("old")
    for name in ("0.png", "0.png.json"):
        (out / "project/ds0" / ("ann" if name.endswith("json") else "img") / name).unlink()
    (images / "0.png").unlink()
    label(images, "--yolo")
    assert len(yolo_of(out)) == 4
    assert (out / "yolo/runs/best.pt").exists()
    assert not (out / "yolo/labels/train.cache").exists()


def test_images_are_copies_that_a_trainer_may_write_into(label, images):
    out = label(images, "--link", "--yolo").out
    for path in (out / "yolo/images").rglob("*.png"):
        assert not path.is_symlink()
        assert path.stat().st_ino != (images / path.name).stat().st_ino


def test_an_export_that_cannot_be_written_is_one_sentence_and_a_failure(
    label, images, report_of, monkeypatch, capsys
):
    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    out = label(images).out
    monkeypatch.setattr("serve.labeling.exports.shutil.copyfile", full)
    assert label(images, "--yolo").code == 1
    assert "The labels are complete, but an export could not" in capsys.readouterr().err
    assert "No space left" in report_of(out)["this_run"]["error"]
    assert not (out / "yolo/data.yaml").exists()


def test_the_sdk_opens_the_project_without_a_warning(label, images, caplog):
    out = label(images, "--coco", "--yolo", "--draw").out
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
        "project", "previews", "coco", "yolo", "journal.jsonl", "report.html", "report.json",
        "runs.jsonl",
    }  # fmt: skip
    sly.logger.addHandler(caplog.handler)
    try:
        assert len(read_project(out)[0]) == 5
    finally:
        sly.logger.removeHandler(caplog.handler)
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []


def test_a_folder_begun_with_the_project_in_its_root_goes_on_there(label, images, model):
    """As earlier versions wrote it, with exports inside the project."""
    out = label(images, "--draw").out
    for path in (out / "project").iterdir():
        path.rename(out / path.name)
    (out / "project").rmdir()
    paint(images / "new.png", 99)
    assert label(images, "--draw", "--coco").code == 0
    assert len(model.asked) == 6
    assert not (out / "project").exists()
    assert len(list((out / "ds0/img").iterdir())) == len(list((out / "previews").iterdir())) == 6
    assert len(coco_of(out)["images"]) == 6
    assert label(images, "--overwrite").code == 0
    assert len(read_project(out)[0]) == 6
    assert not (out / "ds0").exists()
    assert (out.with_name("out.old-1") / "ds0/img/new.png").exists()


def test_overwrite_moves_every_export_aside(label, images):
    out = label(images, "--coco", "--yolo", "--draw").out
    label(images, "--overwrite")
    old = out.with_name("out.old-1")
    assert len(read_project(old)[0]) == 5
    assert len(yolo_of(old)) == len(coco_of(old)["images"]) == 5
    assert not any((out / name).exists() for name in ("coco", "yolo", "previews"))


def test_the_sdk_reads_the_coco_and_yolo_files_back(label, images, model):
    """Its importers are what a user of the platform drops these folders on."""
    from supervisely.convert.image.yolo.yolo_converter import YOLOConverter

    model.answer = tell_apart
    out = label(images, "--yolo").out
    converter = YOLOConverter(str(out / "yolo"), None, False)
    assert converter.validate_format()
    names = {one.name for one in converter._meta.obj_classes}
    assert names == {f"n{number}" for number in range(5)}
    for item in converter._items:
        annotation = converter.to_supervisely(item)
        [found] = annotation.labels
        assert found.obj_class.name == f"n{number_of(Path(item.path))}"
        assert (found.geometry.left, found.geometry.top) == (4, 4)


@pytest.mark.parametrize("text", ["{}", '{"size": 3, "objects": 1}', "[]", '{"size": {}}'])
def test_an_annotation_that_is_none_keeps_no_export_from_the_others(label, images, capsys, text):
    out = label(images, "--draw").out
    path = out / "project/ds0/ann/0.png.json"
    path.write_text(text)
    is_labeled_again = text == "[]"
    assert label(images, "--coco", "--yolo", "--draw").code == 0
    err = capsys.readouterr().err
    assert len(coco_of(out)["images"]) == 4 + is_labeled_again
    assert err.count("1 images whose annotation was changed") == (0 if is_labeled_again else 2)
    assert ("0.png has no preview: An annotation is" in err) is not is_labeled_again


def test_an_image_without_labels_and_a_damaged_one_keep_no_preview_from_the_others(
    label, images, capsys
):
    out = label(images).out
    paint(out / "project/ds0/img/byhand.png", 8)
    (out / "project/ds0/img/broken.png").write_bytes(b"no image")
    annotations = out / "project/ds0/ann"
    (annotations / "broken.png.json").write_text((annotations / "0.png.json").read_text())
    assert label(images, "--draw", "--coco").code == 0
    assert len(list((out / "previews").iterdir())) == 5
    assert "broken.png has no preview: " in capsys.readouterr().err


def test_previews_show_the_labels_as_they_are_now(label, images, model):
    out = label(images, "--draw").out
    before = {path.name: path.read_bytes() for path in (out / "previews").iterdir()}
    paint(images / "0.png", 77)
    label(images, "--relabel-changed")
    label(images, "--draw")
    after = {path.name: path.read_bytes() for path in (out / "previews").iterdir()}
    assert [name for name in before if after[name] != before[name]] == ["0.png.jpg"]


def test_a_preview_is_whole_or_absent(label, images, monkeypatch):
    def write_bytes(path, _):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    out = label(images).out
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", write_bytes)
        assert label(images, "--draw").code == 1
    assert label(images, "--draw").code == 0
    for path in (out / "previews").glob("*.jpg"):
        Image.open(path).load()
    assert len(list((out / "previews").glob("*.jpg"))) == 5


@pytest.mark.parametrize(
    ("size_wh", "preview_wh"),
    [((40, 30), (40, 30)), ((1920, 1080), (1600, 900)), ((3, 4000), (1, 1600))],
)
def test_a_preview_has_the_pixels_of_its_picture(size_wh, preview_wh):
    picture = Image.effect_noise(size_wh, 90).convert("RGB")
    picture.paste((250, 120, 10), (0, 0, 3, 1500))
    pixels = preview_pixels(picture)
    assert pixels.shape == (preview_wh[1], preview_wh[0], 3)
    assert tuple(pixels[0, 0]) == (10, 120, 250)
    if size_wh == preview_wh:
        assert (pixels == np.asarray(picture)[..., ::-1]).all()

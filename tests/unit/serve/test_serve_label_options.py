"""The server's settings as options of ``florence2 label``, down to the labels."""

from __future__ import annotations

import json

import pytest
from label_fakes import paint, read_project, result

from florence2.engine.ask import Ask
from florence2.records import Box, Polygon
from serve.sdk import sly

RING = (4.0, 4.0, 30.0, 4.0, 30.0, 30.0)


def seen(ask: Ask):
    """Two boxes of one object, one far less sure, a dog, and an outline."""
    boxes = (
        Box((4.0, 4.0, 24.0, 24.0), "cat", 0.9),
        Box((5.0, 4.0, 25.0, 24.0), "cat", 0.2),
        Box((30.0, 4.0, 44.0, 24.0), "dog", 0.5),
    )
    found = boxes if "SEGMENTATION" not in ask.task else (Polygon((RING,), "cat", 0.9),)
    return result(ask.task, *found, size=ask.image.size_wh)


def labels_of(out):
    [annotation] = read_project(out)[0].values()
    return [(label.obj_class.name, type(label.geometry)) for label in annotation.labels]


CAT, DOG = ("cat", sly.Rectangle), ("dog", sly.Rectangle)
SEGMENT = ["--task", "referring_expression_segmentation", "--prompt", "cat"]
CASES = {
    "as it always was": ([], None, [CAT, DOG]),
    "no NMS": (["--nms", "off"], None, [CAT, CAT, DOG]),
    "no NMS, by the file": ([], "nms_threshold: off", [CAT, CAT, DOG]),
    "the option before the file": (["--nms", "0.7"], "iou: off", [CAT, DOG]),
    "a threshold of a class": (["--class-threshold", "dog=0.6"], None, [CAT]),
    "a threshold in the file": ([], "conf: 0.6", [CAT]),
    "a threshold before the file's": (["--threshold", "0"], "conf: 0.6", [CAT, DOG]),
    "a suffix in the file": ([], "class_suffix: _x\nclasses: [dog]", [("dog_x", sly.Rectangle)]),
    "polygons": (SEGMENT, None, [("cat", sly.Polygon)]),
    "bitmaps": ([*SEGMENT, "--geometry", "bitmap"], None, [("cat", sly.Bitmap)]),
}


@pytest.mark.parametrize(("options", "file", "expected"), CASES.values(), ids=CASES)
def test_settings_decide_what_becomes_a_label(
    label, tmp_path, model, journal_of, options, file, expected
):
    model.answer = seen
    if file is not None:
        (tmp_path / "s.yaml").write_text(file)
        options = [*options, "--settings", str(tmp_path / "s.yaml")]
    paint(tmp_path / "images" / "1.png", 1)
    done = label(tmp_path / "images", "--coco", "--yolo", "--draw", *options)
    assert done.code == 0
    assert labels_of(done.out) == expected
    assert journal_of(done.out)["1.png"]["objects"] == len(expected)


def test_tiles_are_asked_about_one_by_one_and_the_image_is_labeled_once(label, tmp_path, model):
    paint(tmp_path / "images" / "1.png", 1, size=(100, 60))
    sizes = []
    model.answer = lambda ask: sizes.append(ask.image.size_wh) or seen(ask)
    tiling = "{width: 60, height: 60, overlap: 20}"
    done = label(tmp_path / "images", "--tiling", tiling)
    assert done.code == 0
    assert sorted(sizes) == [(60, 60), (60, 60), (100, 60)]
    settings = json.loads((done.out / "journal.jsonl").read_text().splitlines()[0])["settings"]
    assert settings["tiling"] == {
        "width": 60, "height": 60, "overlap": [20, 20], "full_image": True,
    }  # fmt: skip
    assert label(tmp_path / "images").code == 2, "labels of other settings do not mix"


def test_a_rectangle_beyond_one_image_fails_that_image_only(label, tmp_path, model, report_of):
    (tmp_path / "s.yaml").write_text("rectangle: [80, 10, 90, 30]")
    paint(tmp_path / "images" / "1.png", 1)
    paint(tmp_path / "images" / "2.png", 2, size=(100, 60))
    done = label(tmp_path / "images", "--settings", str(tmp_path / "s.yaml"))
    assert done.code == 1
    report = report_of(done.out)
    assert (report["labeled"], report["failed_by_code"]) == (1, {"bad_request": 1})


WRONG = {
    "no share": (["--nms", "2"], "--nms is a number from 0 to 1, or off, and '2' was received"),
    "no threshold": (["--class-threshold", "dog=7"], "of 'dog' in --class-threshold is a number"),
    "no shape": (["--geometry", "circle"], "Unknown --geometry 'circle'"),
    "no windows": (["--tiling", "[]"], "--tiling is a mapping"),
}


@pytest.mark.parametrize(("options", "sentence"), WRONG.values(), ids=WRONG)
def test_a_wrong_value_is_told_by_the_name_of_its_option(
    label, tmp_path, capsys, options, sentence
):
    paint(tmp_path / "images" / "1.png", 1)
    assert label(tmp_path / "images", *options).code == 2
    assert sentence in capsys.readouterr().err

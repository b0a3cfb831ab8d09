"""``florence2 evaluate DATA``, with a stand-in at the model's edge."""

from __future__ import annotations

import json
import re

import pytest
from label_fakes import FakeModel, paint, result

from florence2.records import Box, Failure, Polygon, Quad, Text
from serve.cli.main import main

DOG, CAT = [4, 4, 20, 20], [30, 10, 50, 40]
# In thousandths of 64x48: the boxes above, as answers spell them.
DOG_BINS = "<loc_62><loc_83><loc_313><loc_417>"
CAT_BINS = "<loc_469><loc_208><loc_782><loc_834>"


@pytest.fixture
def model(monkeypatch):
    model = FakeModel()
    checkpoint = model.engine.checkpoint
    checkpoint.name, checkpoint.revision = "stand-in", "abc"
    model.device, model.precision = "cpu", "fp32"
    model.loads = model.put_in(monkeypatch)
    return model


def coco(folder, *images, classes=("dog", "cat")):
    """A COCO file; each image is a list of (class, box) and has its number in its colour."""
    annotations, listed = [], []
    for number, objects in enumerate(images):
        paint(folder / f"{number}.png", number)
        listed.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 48})
        for name, (x1, y1, x2, y2) in objects:
            category = classes.index(name) + 1
            box = [x1, y1, x2 - x1, y2 - y1]
            ring = [x1, y1, x2, y1, x2, y2, x1, y2]
            annotations.append(
                {"image_id": number, "category_id": category, "bbox": box, "segmentation": [ring]}
            )
    categories = [{"id": n, "name": name} for n, name in enumerate(classes, 1)]
    content = {"images": listed, "annotations": annotations, "categories": categories}
    (folder / "labels.json").write_text(json.dumps(content), "utf-8")
    return folder


def lines(folder, *entries):
    folder.mkdir(exist_ok=True)
    paint(folder / "0.png", 0)
    text = "".join(json.dumps({"image": "0.png"} | one) + "\n" for one in entries)
    (folder / "annotations.jsonl").write_text(text, "utf-8")
    return folder


def evaluate(data, *options, code=0):
    """The figures of a run, as they are written."""
    out = data.parent / "figures"
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(data), "--out", str(out), *options])
    assert (ended.value.code or 0) == code
    return json.loads((out / "evaluation.json").read_text("utf-8")) if code == 0 else None


def boxes(*found):
    return lambda ask: result(ask.task, *(Box(tuple(map(float, b)), n, s) for n, b, s in found))


TWO = [("dog", DOG), ("cat", CAT)]


def test_detection_has_figures_for_each_class(tmp_path, model, capsys):
    model.answer = boxes(("dog", DOG, 0.9), ("cat", [30, 10, 40, 20], 0.8), ("bird", CAT, 0.7))
    content = evaluate(coco(tmp_path / "data", TWO, [("dog", DOG)]))
    (part,) = content["tasks"]
    assert (content["checkpoint"], content["images"], part["task"]) == ("stand-in", 2, "<OD>")
    figures = {one["name"]: one for one in part["objects"]["classes"]}
    assert figures["dog"]["recall"]["value"] == figures["dog"]["precision"]["value"] == 1.0
    assert figures["cat"]["recall"]["value"] == 0.0
    assert part["objects"]["unlabeled"] == {"bird": 2}
    printed = capsys.readouterr().out
    assert "bird (2)" in printed
    assert re.search(r"dog +2 +2 +1\.000", printed)
    page = (tmp_path / "figures/report.html").read_text("utf-8")
    assert page.count("<figure>") == 2
    assert "florence2 evaluate" in page


def test_settings_are_those_of_the_app(tmp_path, model):
    """A class with prompts, NMS and thresholds, as users would have them."""
    file = tmp_path / "settings.yaml"
    file.write_text("class_thresholds: {dog: 0.5}\nclass_suffix: ' (ai)'\nnms_threshold: 0.6\n")
    model.answer = lambda ask: result(
        ask.task,
        Box((4.0, 4.0, 20.0, 20.0), ask.text, {"puppy": 0.9, "hound": 0.6, "cat": 0.4}[ask.text]),
        Box((30.0, 10.0, 50.0, 40.0), ask.text, 0.3),
    )
    options = ("--settings", str(file), "--class", "dog=puppy; hound", "--class", "cat")
    (part,) = evaluate(coco(tmp_path / "data", TWO), *options)["tasks"]
    assert model.asks == [("<CAPTION_TO_PHRASE_GROUNDING>", t) for t in ("puppy", "hound", "cat")]
    dog, cat = part["objects"]["classes"]
    # Both prompts see the dog, which is one label; what has a score of 0.3 is none.
    assert (dog["num_found"], dog["precision"]["value"]) == (1, 1.0)
    assert (cat["num_found"], cat["precision"]["value"]) == (2, 0.5)
    assert dog["ap50"]["value"] == 1.0


def test_a_task_that_takes_text_asks_for_the_classes_by_name(tmp_path, model):
    folder = coco(tmp_path / "data", [("traffic_light", DOG)], classes=("traffic_light",))
    (part,) = evaluate(folder, "--task", "<CAPTION_TO_PHRASE_GROUNDING>")["tasks"]
    assert model.asks == [("<CAPTION_TO_PHRASE_GROUNDING>", "traffic light")]
    assert part["objects"]["total"]["recall"]["value"] == 1.0


def test_outlines_are_compared_by_what_they_cover(tmp_path, model):
    half = (4.0, 4.0, 20.0, 4.0, 20.0, 20.0)
    model.answer = lambda ask: result(ask.task, Polygon((half,), ask.text, 0.9))
    options = ("--task", "<REFERRING_EXPRESSION_SEGMENTATION>", "--class", "dog")
    (part,) = evaluate(coco(tmp_path / "data", TWO), *options)["tasks"]
    assert part["objects"]["by"] == "outlines"
    (dog,) = part["objects"]["classes"]
    assert dog["overlap"]["value"] == pytest.approx(0.5, abs=0.07)


REGION_TASKS = {
    "a class": ("<REGION_TO_CATEGORY>", lambda ask: result(ask.task, text="dog"), 0.5),
    "an outline": (
        "<REGION_TO_SEGMENTATION>",
        lambda ask: result(
            ask.task, Polygon(((4.0, 4.0, 20.0, 4.0, 20.0, 20.0, 4.0, 20.0),), "", 0.9)
        ),
        0.5,
    ),
}


@pytest.mark.parametrize(("task", "answer", "right"), REGION_TASKS.values(), ids=REGION_TASKS)
def test_region_tasks_ask_about_every_object(tmp_path, model, task, answer, right):
    model.answer = answer
    (part,) = evaluate(coco(tmp_path / "data", TWO), "--task", task)["tasks"]
    assert [asked for asked, _ in model.asks] == [task] * 2
    found = part["texts"]["total"]["exact"] if part["texts"] else part["objects"]["total"]["recall"]
    assert found["value"] == right


LINES = {
    "boxes": (
        {"prefix": "<OD>", "suffix": f"dog{DOG_BINS}cat{CAT_BINS}"},
        boxes(("dog", DOG, 0.9)),
        ("objects", "recall", 0.5),
    ),
    "phrases": (
        {"prefix": "<CAPTION_TO_PHRASE_GROUNDING>a dog", "suffix": f"a dog{DOG_BINS}"},
        boxes(("a dog", DOG, 0.9)),
        ("objects", "recall", 1.0),
    ),
    "proposals": (
        {"prefix": "<REGION_PROPOSAL>", "suffix": f"{DOG_BINS}{CAT_BINS}"},
        boxes(("", DOG, 0.9)),
        ("objects", "recall", 0.5),
    ),
    "a caption": (
        {"prefix": "<CAPTION>", "suffix": "A dog."},
        lambda ask: result(ask.task, Text("a dog", 0.9), text="a dog"),
        ("texts", "exact", 1.0),
    ),
    "read text": (
        {"prefix": "<OCR>", "suffix": "STOP"},
        lambda ask: result(ask.task, Text("SHOP", 0.9), text="SHOP"),
        ("texts", "character_errors", 0.25),
    ),
    "lines of text": (
        {
            "prefix": "<OCR_WITH_REGION>",
            "suffix": "STOP" + "<loc_62><loc_83>" * 2 + "<loc_313><loc_417>" * 2,
        },
        lambda ask: result(
            ask.task, Quad((4.0, 4.0, 20.0, 4.0, 20.0, 20.0, 4.0, 20.0), "STOP", 0.9)
        ),
        ("texts", "exact", 0.0),
    ),
    "a task of its own": (
        {"prefix": "<DocVQA>How much?", "suffix": "7 francs"},
        lambda ask: result(ask.task, text="7 francs" if ask.text == "How much?" else ""),
        ("texts", "exact", 1.0),
    ),
    "a region": (
        {"prefix": f"<REGION_TO_CATEGORY>{DOG_BINS}", "suffix": "dog"},
        lambda ask: result(ask.task, text="dog" if ask.region == DOG_BINS else "cat"),
        ("texts", "exact", 1.0),
    ),
}


@pytest.mark.parametrize(("line", "answer", "figure"), LINES.values(), ids=LINES)
def test_lines_ask_their_own_questions(tmp_path, model, line, answer, figure):
    model.answer = answer
    (part,) = evaluate(lines(tmp_path / "data", line))["tasks"]
    kind, name, value = figure
    assert part[kind]["total"][name]["value"] == pytest.approx(value)
    assert len(model.asks) == 1


def test_lines_of_several_tasks_have_figures_each(tmp_path, model):
    model.answer = lambda ask: result(ask.task, Text("A dog", 0.9), text="A dog")
    data = lines(
        tmp_path / "data",
        {"prefix": "<OD>", "suffix": f"dog{DOG_BINS}"},
        {"prefix": "<CAPTION>", "suffix": "A pet"},
        {"prefix": "<CAPTION>", "suffix": "A dog"},
    )
    detection, caption = evaluate(data)["tasks"]
    assert detection["objects"]["total"]["recall"]["value"] == 0.0
    # One of two captions is right, which is right.
    assert caption["texts"]["total"]["exact"]["value"] == 1.0


def test_a_failed_image_is_named_and_never_counts_as_empty(tmp_path, model, capsys):
    model.answer = boxes(("dog", DOG, 0.9))
    folder = coco(tmp_path / "data", [("dog", DOG)], [("dog", DOG)], [("dog", DOG)])
    # Its header is whole.
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:50])
    (folder / "2.png").unlink()
    content = evaluate(folder)
    (part,) = content["tasks"]
    assert part["objects"]["total"]["recall"]["value"] == 1.0
    assert [one["name"] for one in part["objects"]["failed"]] == ["1.png"]
    assert [one["name"] for one in content["left_out"]] == ["2.png"]
    printed = capsys.readouterr().out
    assert "1.png: An image must be complete" in printed
    assert "2.png: There is no image" in printed
    page = (tmp_path / "figures/report.html").read_text("utf-8")
    assert "could not be answered" in page


def test_only_the_images_of_a_split_are_asked(tmp_path, model):
    folder = coco(tmp_path / "data", TWO, TWO, TWO)
    (tmp_path / "val.txt").write_text("2.png\n0\n")
    content = evaluate(folder, "--split", f"file:{tmp_path / 'val.txt'}", "--batch", "1")
    assert content["images"] == 2
    assert sorted(color[0] for color in model.asked) == [0, 2]


def test_what_a_run_labeled_is_labeled_data(tmp_path, model):
    """Labels that nobody corrected are those that the same model gives."""
    model.answer = lambda ask: result(
        ask.task,
        Box((4.0, 4.0, 20.0, 20.0), "dog", 0.9),
        Polygon(((30.0, 10.0, 50.0, 10.0, 50.0, 40.0),), "cat", 0.8),
    )
    paint(tmp_path / "images/0.png", 0)
    out = tmp_path / "labeled"
    with pytest.raises(SystemExit):
        main(["label", str(tmp_path / "images"), "--out", str(out), "--coco", "--yolo"])
    for folder, data_format in (
        (out, "supervisely"),
        (out / "coco", "coco"),
        (out / "yolo", "yolo"),
    ):
        content = evaluate(folder)
        total = content["tasks"][0]["objects"]["total"]
        assert content["format"] == data_format
        assert (total["num_true"], total["f1"]["value"], total["ap"]["value"]) == (2, 1.0, 1.0)


def test_names_are_other_peoples(tmp_path, model, capsys):
    model.answer = boxes(("<img src=x onerror=1>", DOG, 0.9))
    folder = coco(
        tmp_path / "data",
        [("<b>[red]", CAT)],
        classes=("<b>[red]", "<img src=x onerror=1>"),
    )
    evaluate(folder)
    page = (tmp_path / "figures/report.html").read_text("utf-8")
    assert "<img src=x" not in page
    assert "<b>[" not in page
    assert "<b>[red]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("write", "options", "words"),
    [
        (lambda d: d / "gone", (), "does not exist"),
        (lambda d: coco(d / "data", TWO), ("--scenes", "3"), "--scenes is for scenes"),
        (lambda d: coco(d / "data", TWO), ("--tasks", "<OD>"), "--tasks is for scenes"),
        (lambda d: coco(d / "data", TWO), ("--task", "<CAPTION>"), "has a tag 'caption'"),
        (lambda d: coco(d / "data", TWO), ("--task", "<REGION_TO_OCR>"), "has a tag 'text'"),
        (lambda d: coco(d / "data", TWO), ("--task", "<OCR_WITH_REGION>"), "no object is labeled"),
        (
            lambda d: coco(d / "data", TWO),
            ("--class", "dgo"),
            "Unknown class 'dgo'. Did you mean 'dog'",
        ),
        (lambda d: coco(d / "data", TWO), ("--class", "=a"), "A class is written"),
        (lambda d: coco(d / "data", TWO), ("--threshold", "7"), "between 0 and 1"),
        (lambda d: coco(d / "data", TWO), ("--split", "val"), "have no datasets"),
        (lambda d: coco(d / "data", TWO), ("--json", "no/where.json"), "a folder that exists"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(tmp_path, model, capsys, write, options, words):
    evaluate(write(tmp_path), *options, code=2)
    said = capsys.readouterr().err
    assert words in said.replace("\n", " ")
    assert model.asks == []


@pytest.mark.parametrize("option", [("--split", "val"), ("--class", "dog"), ("--out", "x")])
def test_options_of_labeled_data_need_some(model, capsys, option):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *option])
    assert ended.value.code == 2
    assert f"{option[0]} is for labeled data, and none was named" in capsys.readouterr().err


def test_no_figures_where_no_image_was_answered(tmp_path, model, capsys):
    model.answer = lambda ask: Failure("out_of_memory", "There is no memory.")
    evaluate(coco(tmp_path / "data", TWO, TWO), code=2)
    assert "of 2 none was; the first: There is no memory." in capsys.readouterr().err.replace(
        "\n", " "
    )

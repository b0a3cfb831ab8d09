"""What arrives over HTTP is what the model says in this process: class, confidence, coordinates."""

from __future__ import annotations

import pytest
from contract_calls import CITY, HOME, STREET, expected_rows, image_size_wh, near, rows_of
from PIL import Image
from platform_seed import IMAGES

from florence2.records import Region
from serve.sdk import sly

SCENES = sorted(IMAGES.glob("scene_*"))


@pytest.mark.parametrize("path", SCENES, ids=lambda path: path.stem)
def test_detected_boxes_are_the_models(app, model, path):
    expected = expected_rows(model.run("<OD>", path), image_size_wh(path), {})
    [entry] = app.upload_images([path], {"task_prompt": "<OD>", "nms_threshold": "off"})
    assert expected
    assert near(rows_of(entry["annotation"]), expected)


GROUNDED = {
    "car": (CITY, "car", {"text": "car"}, "car"),
    "tree": (STREET, "tree", {"text": "tree"}, "tree"),
    "moon": (HOME, "moon", {"text": "moon"}, "moon"),
    "a class of the mapping": (CITY, "car", {"mapping": {"vehicle": "car"}}, "vehicle"),
}


@pytest.mark.parametrize(("path", "phrase", "asked", "name"), GROUNDED.values(), ids=GROUNDED)
def test_grounded_boxes_are_the_models_under_the_name_that_was_asked(
    app, model, path, phrase, asked, name
):
    [entry] = app.upload_images([path], {**asked, "nms_threshold": "off"})
    result = model.run("<CAPTION_TO_PHRASE_GROUNDING>", path, text=phrase)
    names = {found.label: name for found in result.objects}
    expected = expected_rows(result, image_size_wh(path), names)
    assert expected
    assert near(rows_of(entry["annotation"]), expected)


def test_a_caption_is_the_models(app, model):
    [entry] = app.upload_images([CITY], {"task_prompt": "<CAPTION>"})
    assert entry["annotation"]["objects"] == []
    tags = {tag["name"]: tag["value"] for tag in entry["annotation"]["tags"]}
    assert tags == {"caption": model.run("<CAPTION>", CITY).text}


def test_read_text_is_the_models_line_by_line(app, model):
    path = IMAGES / "scene_bread.jpg"
    [entry] = app.upload_images([path], {"task_prompt": "<OCR_WITH_REGION>"})
    said = [tag["value"] for item in entry["annotation"]["objects"] for tag in item["tags"]]
    result = model.run("<OCR_WITH_REGION>", path)
    assert {found.label for found in result.objects} <= set(said)
    assert {item["geometryType"] for item in entry["annotation"]["objects"]} == {"polygon"}


def test_a_region_is_described_on_the_region_that_was_given(app, model):
    box = model.run("<OD>", CITY).objects[0].box_xyxy
    settings = {"task_prompt": "<REGION_TO_CATEGORY>", "regions": [list(box)]}
    [entry] = app.upload_images([CITY], settings)
    [item] = entry["annotation"]["objects"]
    tags = {tag["name"]: tag["value"] for tag in item["tags"]}
    assert tags["category"] == model.run("<REGION_TO_CATEGORY>", CITY, region=Region(box)).text


def test_several_images_in_a_request_get_what_each_gets_alone(app):
    together = app.upload_images(SCENES, {"task_prompt": "<OD>"})

    alone = [app.upload_images([path], {"task_prompt": "<OD>"})[0] for path in SCENES]
    for one, other in zip(together, alone, strict=True):
        assert near(rows_of(one["annotation"]), rows_of(other["annotation"]))


def test_a_rotated_photo_is_labeled_upright(app, tmp_path):
    path = tmp_path / "turned.jpg"
    with Image.open(CITY) as upright:
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = upright.rotate(90, expand=True)
        turned.save(path, quality=95, exif=exif)

    [entry] = app.upload_images([path], {"task_prompt": "<OD>"})

    width, height = image_size_wh(CITY)
    assert entry["annotation"]["size"] == {"height": height, "width": width}
    [plain] = app.upload_images([CITY], {"task_prompt": "<OD>"})
    turned_rows, rows = rows_of(entry["annotation"]), rows_of(plain["annotation"])
    assert [row[0] for row in turned_rows] == [row[0] for row in rows]
    differences = [
        abs(one - two)
        for row, other in zip(turned_rows, rows, strict=True)
        for one, two in zip(row[2:], other[2:], strict=True)
    ]
    assert max(differences) <= 8


def test_every_label_says_that_a_model_made_it(app):
    [entry] = app.upload_images([CITY], {"task_prompt": "<OD>"})
    flags = {(item["nnCreated"], item["nnUpdated"]) for item in entry["annotation"]["objects"]}
    assert flags == {(True, True)}


def test_answers_fit_the_meta_that_the_app_gives_afterwards(app):
    tasks = ["<OD>", "<CAPTION>", "<OCR_WITH_REGION>", "<DENSE_REGION_CAPTION>"]
    entries = [app.upload_images([HOME], {"task_prompt": task})[0] for task in tasks]

    meta = sly.ProjectMeta.from_json(app.post("get_output_classes_and_tags").json())

    for entry in entries:
        annotation = sly.Annotation.from_json(entry["annotation"], meta)
        assert len(annotation.labels) == len(entry["annotation"]["objects"])

"""Labeled images of every format become the same records, and what cannot be used is named."""

import json
import re

import cv2
import numpy as np
import pytest
from PIL import Image

from florence2.errors import FlorenceError, RequestError
from florence2.labeled.records import WantedAnswer
from serve.labeled_data import open_labeled
from serve.sdk import sly

SIZE = (64, 48)
OBJECT_XYXY = (8.0, 12.0, 40.0, 36.0)
RING = (8.0, 12.0, 40.0, 12.0, 40.0, 36.0)


def draw(path, size=SIZE, orientation=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", size, "white").save(path, exif=exif)
    return path


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")
    return path


def coco(folder, annotations, images=None, categories=None, name="labels.json"):
    """A COCO file about one drawn image, ``a.png``, unless ``images`` lists others."""
    draw(folder / "a.png")
    annotations = [{"id": n, "image_id": 1} | one for n, one in enumerate(annotations, 1)]
    content = {
        "images": images or [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
        "annotations": annotations,
        "categories": categories or [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
    }
    return write_json(folder / name, content)


def yolo(folder, lines, **keys):
    """A data.yaml with one drawn training image, ``images/train/a.png``."""
    draw(folder / "images/train/a.png")
    (folder / "labels/train").mkdir(parents=True)
    (folder / "labels/train/a.txt").write_text("\n".join(lines), "utf-8")
    keys = {"train": "images/train", "names": ["dog", "cat"]} | keys
    # YAML's flow style is JSON.
    return write_json(folder / "data.yaml", keys)


def lines_of(folder, *lines, name="annotations.jsonl"):
    draw(folder / "a.png")
    folder.mkdir(exist_ok=True)
    path = folder / name
    text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
    path.write_text(text, "utf-8")
    return path


def project(folder, objects, tags=(), size=SIZE, dataset="ds0", name="a.png", orientation=None):
    """A Supervisely project with one drawn image."""
    classes = [
        {"title": title, "shape": shape, "color": "#00FF00"}
        for title, shape in (
            ("dog", "any"),
            ("cat", "any"),
        )
    ]
    tag = {"value_type": "any_string", "color": "#0000FF"}
    tag_metas = [{"name": one, **tag} for one in ("text", "caption")]
    tag_metas.append({"name": "checked", "value_type": "none", "color": "#0000FF"})
    write_json(
        folder / "meta.json", {"classes": classes, "tags": tag_metas, "projectType": "images"}
    )
    draw(folder / dataset / "img" / name, orientation=orientation)
    annotation = {
        "description": "",
        "size": {"height": size[1], "width": size[0]},
        "tags": list(tags),
        "objects": [{"classTitle": "dog", "tags": [], "description": ""} | one for one in objects],
    }
    write_json(folder / dataset / "ann" / f"{name}.json", annotation)
    return folder


def points(*exterior, interior=()):
    return {"exterior": [list(point) for point in exterior], "interior": list(interior)}


def bitmap(mask, origin_xy):
    encoded = sly.Bitmap.data_2_base64(np.array(mask, bool))
    return {"data": encoded, "origin": list(origin_xy)}


SLY_BOX = {"geometryType": "rectangle", "points": points((8, 12), (39, 35))}
SLY_RING = {"geometryType": "polygon", "points": points((8, 12), (40, 12), (40, 36))}
COCO_BOX = {"category_id": 1, "bbox": [8, 12, 32, 24]}
YOLO_BOX = "0 0.375 0.5 0.5 0.5"
YOLO_RING = "0 0.125 0.25 0.625 0.25 0.625 0.75"
# Of 64x48: bin 125 is 8.03 px.
LOCATIONS = "<loc_125><loc_250><loc_625><loc_750>"


def one_object(data):
    (image,) = data.images
    (found,) = image.objects
    return found


@pytest.mark.parametrize(
    ("write", "ring"),
    [
        pytest.param(lambda d: coco(d, [COCO_BOX]), None, id="COCO box"),
        pytest.param(
            lambda d: coco(d, [{"category_id": 1, "segmentation": [list(RING)]}]),
            RING,
            id="COCO polygon without a box",
        ),
        pytest.param(lambda d: yolo(d, [YOLO_BOX]), None, id="YOLO box"),
        pytest.param(lambda d: yolo(d, [YOLO_RING]), RING, id="YOLO outline"),
        pytest.param(
            lambda d: yolo(d, [f"{YOLO_BOX} 0.5 0.5 2"], kpt_shape=[1, 3]),
            None,
            id="YOLO box with keypoints",
        ),
        pytest.param(lambda d: project(d, [SLY_BOX]), None, id="Supervisely box"),
        pytest.param(lambda d: project(d, [SLY_RING]), RING, id="Supervisely polygon"),
    ],
)
def test_every_format_gives_the_same_object(tmp_path, write, ring):
    found = one_object(open_labeled(write(tmp_path)))
    assert found.label == "dog"
    assert found.box_xyxy == pytest.approx(OBJECT_XYXY)
    assert found.rings_xy == (() if ring is None else (pytest.approx(ring),))


def test_every_format_is_found_in_its_folder_too(tmp_path):
    for number, write in enumerate(
        [
            lambda d: coco(d, [COCO_BOX]),
            lambda d: yolo(d, [YOLO_BOX]),
            lambda d: lines_of(
                d, {"image": "a.png", "prefix": "<OD>", "suffix": f"dog{LOCATIONS}"}
            ),
            lambda d: project(d, [SLY_BOX]),
            # What ``florence2 label`` wrote.
            lambda d: project(d / "project", [SLY_BOX]),
        ]
    ):
        folder = tmp_path / str(number)
        write(folder)
        data = open_labeled(folder)
        assert one_object(data).label == "dog"
        assert data.format == ("coco", "yolo", "jsonl", "supervisely", "supervisely")[number]


def rle(mask):
    """COCO's uncompressed run lengths, column by column."""
    flat = np.array(mask).T.ravel()
    edges = np.flatnonzero(np.diff(np.r_[0, flat, 0]))
    lengths = np.diff(np.r_[0, edges, len(flat)])
    return [int(n) for n in lengths]


# The published encoding of run lengths as a string (pycocotools' mask.encode of this mask).
MASK = np.zeros((SIZE[1], SIZE[0]), int)
MASK[12:36, 8:40] = 1


def packed(lengths):
    """COCO's string of run lengths, as its own encoder writes it."""
    text = ""
    for place, length in enumerate(lengths):
        value = length - lengths[place - 2] if place > 2 else length
        while True:
            bits = value & 0x1F
            value >>= 5
            goes_on = value != (-1 if bits & 0x10 else 0)
            text += chr((bits | (0x20 if goes_on else 0)) + 48)
            if not goes_on:
                break
    return text


@pytest.mark.parametrize("encode", [rle, lambda mask: packed(rle(mask))], ids=["list", "string"])
def test_run_lengths_become_outlines(tmp_path, encode):
    outline = {"size": [48, 64], "counts": encode(MASK)}
    found = one_object(open_labeled(coco(tmp_path, [{"category_id": 1, "segmentation": outline}])))
    assert found.box_xyxy == OBJECT_XYXY
    assert found.rings_xy == ((8.0, 12.0, 8.0, 36.0, 40.0, 36.0, 40.0, 12.0),)


def test_run_lengths_are_those_of_the_evaluator(tmp_path):
    reference = pytest.importorskip("faster_coco_eval")
    rng = np.random.default_rng(5)
    mask = cv2.blur(rng.random(MASK.shape), (9, 9)) > 0.52
    encoded = reference.core.mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    outline = {"size": [48, 64], "counts": encoded["counts"].decode()}
    found = one_object(open_labeled(coco(tmp_path, [{"category_id": 1, "segmentation": outline}])))
    drawn = np.zeros(MASK.shape, np.uint8)
    for ring in found.rings_xy:
        cv2.fillPoly(drawn, [np.array(ring).reshape(-1, 2).round().astype(np.int32)], 1)
    filled = mask & (drawn > 0)
    assert filled.sum() > 0.97 * mask.sum()


def test_a_mask_of_a_project_is_outlined_and_bound_parts_are_one_object(tmp_path):
    parts = [
        {"geometryType": "bitmap", "bitmap": bitmap(np.ones((24, 10)), (8, 12))},
        {"geometryType": "bitmap", "bitmap": bitmap(np.ones((24, 10)), (30, 12))},
    ]
    key = {"instance": "one"}
    found = one_object(open_labeled(project(tmp_path, [part | key for part in parts])))
    assert found.box_xyxy == OBJECT_XYXY
    assert len(found.rings_xy) == 2


@pytest.mark.parametrize(
    ("prefix", "suffix", "objects"),
    [
        ("<OD>", f"dog{LOCATIONS}cat{LOCATIONS}", ["dog", "cat"]),
        ("Locate the objects with category name in the image.", f"dog{LOCATIONS}", ["dog"]),
        ("<CAPTION_TO_PHRASE_GROUNDING>a dog", f"a dog{LOCATIONS}", ["a dog"]),
        ("<OPEN_VOCABULARY_DETECTION>dog", f"dog{LOCATIONS}", ["dog"]),
        ("<OD>", "", []),
        ("<OCR_WITH_REGION>", "STOP" + LOCATIONS * 2, ["text"]),
        ("<DocVQA>How much?", "7 francs", []),
    ],
)
def test_lines_are_kept_whole_and_located_things_are_objects(tmp_path, prefix, suffix, objects):
    data = open_labeled(lines_of(tmp_path, {"image": "a.png", "prefix": prefix, "suffix": suffix}))
    (image,) = data.images
    assert image.answers == (WantedAnswer(prefix, suffix),)
    assert [one.label for one in image.objects] == objects
    assert set(data.classes) == set(objects)
    if objects == ["text"]:
        assert image.objects[0].texts == {"text": "STOP"}
    elif objects:
        assert image.objects[0].box_xyxy == pytest.approx(OBJECT_XYXY, abs=0.07)


def test_questions_about_one_image_come_together(tmp_path):
    first = {"image": "a.png", "prefix": "<OD>", "suffix": f"dog{LOCATIONS}"}
    second = {"image": "a.png", "prefix": "<CAPTION>", "suffix": "A dog."}
    third = {"file_name": "a.png", "text": "A dog on grass."}
    (image,) = open_labeled(lines_of(tmp_path, first, second, first, third)).images
    assert [one.prefix for one in image.answers] == ["<OD>", "<CAPTION>", "<CAPTION>"]
    assert [one.suffix for one in image.answers[1:]] == ["A dog.", "A dog on grass."]


def test_crowds_of_coco_are_no_objects_and_keep_their_place(tmp_path):
    whole = [0, 64 * 48]
    crowd = {"category_id": 2, "iscrowd": 1, "segmentation": {"size": [48, 64], "counts": whole}}
    (image,) = open_labeled(coco(tmp_path, [COCO_BOX, crowd, COCO_BOX | {"iscrowd": 1}])).images
    assert [one.label for one in image.objects] == ["dog"]
    assert [(one.label, one.box_xyxy) for one in image.crowds] == [
        ("cat", (0.0, 0.0, 64.0, 48.0)),
        ("dog", OBJECT_XYXY),
    ]


def test_captions_of_coco_are_answers(tmp_path):
    path = coco(tmp_path, [{"caption": "A  dog."}, {"caption": "A pet."}])
    (image,) = open_labeled(path).images
    wanted = [("<CAPTION>", "A dog."), ("<CAPTION>", "A pet.")]
    assert [(one.prefix, one.suffix) for one in image.answers] == wanted


def test_texts_tags_datasets_and_negatives_of_a_project(tmp_path):
    text = {"name": "text", "value": "STOP"}
    tags = [{"name": "caption", "value": "A dog."}, {"name": "checked", "value": None}]
    project(tmp_path, [SLY_BOX | {"tags": [text]}], tags=tags)
    project(tmp_path, [], dataset="ds0/datasets/inner")
    labeled, negative = open_labeled(tmp_path).images
    assert labeled.objects[0].texts == {"text": "STOP"}
    assert labeled.tags == {"caption": "A dog.", "checked": None}
    assert (labeled.name, labeled.dataset) == ("ds0/a.png", "ds0")
    assert (negative.name, negative.dataset, negative.objects) == (
        "ds0/inner/a.png",
        "ds0/inner",
        (),
    )


def test_splits_of_published_layouts_are_datasets(tmp_path):
    for split in ("train", "valid"):
        coco(tmp_path / "roboflow" / split, [COCO_BOX], name="_annotations.coco.json")
        entry = {"image": "a.png", "prefix": "<OD>", "suffix": f"dog{LOCATIONS}"}
        lines_of(tmp_path / "lines" / split, entry)
    coco(tmp_path / "coco/annotations", [COCO_BOX], name="instances_val2017.json")
    (tmp_path / "coco/val2017").mkdir()
    (tmp_path / "coco/annotations/a.png").rename(tmp_path / "coco/val2017/a.png")
    for folder, splits in (
        ("roboflow", ["train", "valid"]),
        ("lines", ["train", "valid"]),
        ("coco", ["val"]),
    ):
        data = open_labeled(tmp_path / folder)
        assert [image.dataset for image in data.images] == splits
        assert [image.name for image in data.images] == [f"{split}/a.png" for split in splits]


def test_other_json_files_beside_labels_are_passed_over(tmp_path):
    coco(tmp_path, [COCO_BOX])
    write_json(tmp_path / "evaluation.json", {"images": [{"name": "a.png"}], "tasks": []})
    data = open_labeled(tmp_path)
    assert (one_object(data).label, data.left_out) == ("dog", ())


def test_splits_of_a_data_yaml_are_folders_and_lists(tmp_path):
    draw(tmp_path / "images/val/b.png")
    draw(tmp_path / "images/more/c.png")
    (tmp_path / "val.txt").write_text("images/val/b.png\n", "utf-8")
    # Written as if from a folder beside it.
    keys = {"train": ["../images/train", "images/more"], "val": "val.txt", "names": {"0": "dog"}}
    data = open_labeled(yolo(tmp_path, [YOLO_BOX], **keys))
    found = {image.name: (image.dataset, len(image.objects)) for image in data.images}
    assert found == {
        "images/train/a.png": ("train", 1),
        "images/more/c.png": ("train", 0),
        "images/val/b.png": ("val", 0),
    }
    assert not data.left_out


def test_sizes_are_those_of_the_upright_image_and_nothing_is_decoded(tmp_path, monkeypatch):
    draw(tmp_path / "a.png")
    draw(tmp_path / "img/b.jpg", (48, 64), orientation=6)
    path = coco(
        tmp_path,
        [COCO_BOX, COCO_BOX | {"image_id": 2}],
        [
            {"id": 1, "file_name": "a.png"},
            {"id": 2, "file_name": "b.jpg", "width": 64, "height": 48},
        ],
    )
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert [image.size_wh for image in open_labeled(path).images] == [SIZE, SIZE]


FAR = {"category_id": 1, "bbox": [100, 12, 32, 24]}
EDGE = {"category_id": 1, "bbox": [-10, -10, 20, 20]}


@pytest.mark.parametrize(
    ("write", "place", "words"),
    [
        pytest.param(
            lambda d: coco(d, [COCO_BOX, FAR]), "a.png", r"\[100, 12, 132, 36\]", id="far"
        ),
        pytest.param(lambda d: coco(d, [COCO_BOX, COCO_BOX]), "a.png", "there again", id="twice"),
        pytest.param(
            lambda d: coco(d, [COCO_BOX, COCO_BOX | {"iscrowd": 1}]), "a.png", "crowd", id="crowd"
        ),
        pytest.param(
            lambda d: coco(d, [COCO_BOX, {"category_id": 1, "keypoints": [1, 2, 2]}]),
            "a.png",
            "neither bbox nor",
            id="keypoints",
        ),
        pytest.param(
            lambda d: coco(d, [COCO_BOX, COCO_BOX | {"category_id": 7}]),
            "a.png",
            "category_id 7",
            id="no such category",
        ),
        pytest.param(
            lambda d: coco(d, [COCO_BOX, COCO_BOX | {"bbox": ["a", 1, 2, 3]}]),
            "a.png",
            "in numbers",
            id="no numbers",
        ),
        pytest.param(
            lambda d: coco(
                d, [COCO_BOX, COCO_BOX | {"segmentation": {"size": [48, 64], "counts": [3]}}]
            ),
            "a.png",
            "do not fill",
            id="run lengths too short",
        ),
        pytest.param(
            lambda d: coco(d, [COCO_BOX, COCO_BOX | {"image_id": 9}]),
            "image_id 9",
            "not listed",
            id="no such image",
        ),
        pytest.param(
            lambda d: coco(d, [COCO_BOX, COCO_BOX | {"image_id": None}]),
            "annotations[1]",
            "has none",
            id="no image_id",
        ),
        pytest.param(
            lambda d: coco(
                d,
                [COCO_BOX],
                [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "gone.png"}, {"id": 3}],
            ),
            "gone.png",
            "no image",
            id="no file",
        ),
        pytest.param(
            lambda d: coco(
                d,
                [COCO_BOX],
                [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "x" * 5000}],
            ),
            "x" * 5000,
            "cannot be read",
            id="a name too long",
        ),
        pytest.param(
            lambda d: (
                draw(d / "b.png")
                and coco(
                    d,
                    [COCO_BOX],
                    [
                        {"id": 1, "file_name": "a.png"},
                        {"id": 2, "file_name": "b.png", "width": 48, "height": 64},
                    ],
                )
            ),
            "b.png",
            "64x48, and these are for 48x64",
            id="another size",
        ),
        pytest.param(
            lambda d: yolo(d, [YOLO_BOX, "5 0.1 0.1 0.1 0.1"]),
            "images/train/a.png",
            "of class 5, which is none of the 2",
            id="no such class",
        ),
        pytest.param(
            lambda d: yolo(d, [YOLO_BOX, "0 0.1 0.1"]),
            "images/train/a.png",
            "Line 2 is neither",
            id="a short line",
        ),
        pytest.param(
            lambda d: yolo(d, [YOLO_BOX], val="images/val"),
            "val: images/val",
            "there is nothing",
            id="no such folder",
        ),
        pytest.param(
            lambda d: yolo(d, [YOLO_BOX], val=["images/train/../train", "images/train"]),
            "images/train/a.png",
            "again in val",
            id="in two splits",
        ),
        pytest.param(
            lambda d: lines_of(
                d, {"image": "a.png", "prefix": "<OD>", "suffix": f"dog{LOCATIONS}"}, "{broken"
            ),
            "annotations.jsonl:2",
            "'{broken'",
            id="a broken line",
        ),
        pytest.param(
            lambda d: project(
                d, [SLY_BOX, {"geometryType": "line", "points": points((1, 1), (9, 9))}]
            ),
            "ds0/a.png",
            "'dog' is a line",
            id="an unknown geometry",
        ),
    ],
)
def test_what_cannot_be_used_is_named_and_the_rest_is_read(tmp_path, write, place, words):
    data = open_labeled(write(tmp_path))
    assert one_object(data).label == "dog"
    (left_out,) = [one for one in data.left_out if one.name == place]
    assert re.search(words, left_out.reason)
    assert left_out.reason.endswith(".")


def test_an_object_of_a_deleted_class_is_named_and_the_others_are_read(tmp_path):
    data = open_labeled(project(tmp_path, [SLY_BOX, SLY_RING | {"classTitle": "fox"}]))
    assert one_object(data).label == "dog"
    (left_out,) = data.left_out
    assert (left_out.name, "'fox'" in left_out.reason) == ("ds0/a.png", True)


def test_entries_for_one_image_are_one_image_and_for_one_number_one_too(tmp_path):
    draw(tmp_path / "b.png")
    images = [
        {"id": 1, "file_name": "a.png"},
        {"id": 2, "file_name": "/data/of/others/a.png"},
        {"id": 3, "file_name": r"D:\images\a.png"},
        {"id": 1, "file_name": "b.png"},
    ]
    other = COCO_BOX | {"image_id": 3, "category_id": 2}
    data = open_labeled(coco(tmp_path, [COCO_BOX, other], images))
    (image,) = data.images
    assert (image.name, [one.label for one in image.objects]) == ("a.png", ["dog", "cat"])
    (left_out,) = data.left_out
    assert (left_out.name, "1 is that of 'a.png' already" in left_out.reason) == ("b.png", True)


def test_names_of_yaml_are_what_is_written(tmp_path):
    file = yolo(tmp_path, [YOLO_BOX])
    file.write_text("train: images/train\nnames: {0: on, 1: yes, 2: 007, 3: 'a, \"b\"'}\n", "utf-8")
    data = open_labeled(file)
    assert data.classes == ("on", "yes", "007", 'a, "b"')
    assert one_object(data).label == "on"


def test_a_box_over_the_edge_is_cut_off(tmp_path):
    assert one_object(open_labeled(coco(tmp_path, [EDGE]))).box_xyxy == (0, 0, 10, 10)


def test_images_that_cannot_be_read_and_broken_annotations_are_named(tmp_path):
    project(tmp_path, [SLY_BOX])
    for name in ("broken.png", "unlabeled.png", "other.png", "cut.png"):
        project(tmp_path, [], name=name)
    (tmp_path / "ds0/ann/broken.png.json").write_text("{", "utf-8")
    (tmp_path / "ds0/ann/unlabeled.png.json").unlink()
    write_json(
        tmp_path / "ds0/ann/other.png.json",
        {"size": {"height": 9, "width": 9}, "tags": [], "objects": []},
    )
    (tmp_path / "ds0/img/cut.png").write_bytes(b"no image")
    data = open_labeled(tmp_path)
    assert [image.name for image in data.images] == ["ds0/a.png"]
    named = {one.name for one in data.left_out}
    assert named == {f"ds0/{n}.png" for n in ("broken", "unlabeled", "other", "cut")}


def test_classes_without_objects_are_classes(tmp_path):
    assert open_labeled(coco(tmp_path, [COCO_BOX])).classes == ("dog", "cat")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        pytest.param(lambda d: d / "gone", "does not exist", id="nothing there"),
        pytest.param(lambda d: draw(d / "a.png").parent, "is none of them", id="only images"),
        pytest.param(lambda d: coco(d, []), "none of the 1 images", id="no annotations"),
        pytest.param(lambda d: coco(d, [FAR]), "a.png: An object has an area", id="no usable one"),
        pytest.param(lambda d: project(d, []), "none of the 1 images", id="no objects"),
        pytest.param(lambda d: yolo(d, []), "none of the 1 images", id="empty label file"),
        pytest.param(lambda d: yolo(d, [YOLO_BOX], names=None), "names its classes", id="no names"),
        pytest.param(
            lambda d: coco(d, [COCO_BOX], [{"id": 1, "file_name": "gone.png"}]),
            "at least one image that can be read.*There is no image",
            id="no image",
        ),
        pytest.param(
            lambda d: write_json(d / "x.json", {"info": {}, "images": []}),
            "lists of images and annotations",
            id="COCO without annotations",
        ),
        pytest.param(lambda d: lines_of(d, "no", "lines"), "at least one image", id="no line"),
    ],
)
def test_data_that_cannot_be_used_is_one_sentence(tmp_path, write, words):
    with pytest.raises(RequestError, match=words) as caught:
        open_labeled(write(tmp_path))
    assert "\n" not in str(caught.value)


# What a program may write in the place of anything.
ANYTHING = (None, -1, 1e400, "\x00\n", [], {"a": 1}, "\ud800")


def places_in(node, at=()):
    yield at
    children = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, child in children:
        yield from places_in(child, (*at, key))


def changed(node, at, value):
    if not at:
        return value
    copy = dict(node) if isinstance(node, dict) else list(node)
    copy[at[0]] = changed(node[at[0]], at[1:], value)
    return copy


FULL_COCO = [
    COCO_BOX | {"attributes": {"text": "STOP"}},
    {"category_id": 2, "segmentation": [list(RING)]},
    {"category_id": 1, "segmentation": {"size": [48, 64], "counts": [3072]}},
    {"caption": "A dog."},
]
FULL_PROJECT = [SLY_BOX, SLY_RING, SLY_RING | {"instance": "one"}]
FULL_LINE = {"image": "a.png", "prefix": "<OD>", "suffix": f"dog{LOCATIONS}", "text": "A dog."}


@pytest.mark.parametrize(
    ("write", "file"),
    [
        pytest.param(lambda d: coco(d, FULL_COCO), "labels.json", id="COCO"),
        pytest.param(lambda d: yolo(d, [YOLO_BOX], path=".", val=["b"]), "data.yaml", id="YOLO"),
        pytest.param(lambda d: lines_of(d, FULL_LINE), "annotations.jsonl", id="lines"),
        pytest.param(lambda d: project(d, FULL_PROJECT), "meta.json", id="classes"),
        pytest.param(lambda d: project(d, FULL_PROJECT), "ds0/ann/a.png.json", id="annotation"),
    ],
)
def test_whatever_stands_anywhere_is_read_or_told_in_one_line(tmp_path, write, file, monkeypatch):
    # The SDK logs such values as they are, and half a character cannot be sent by a test process.
    monkeypatch.setattr(sly.logger, "disabled", True)
    source, path = write(tmp_path), tmp_path / file
    content = json.loads(path.read_text("utf-8"))
    for place in places_in(content):
        for value in ANYTHING:
            path.write_text(json.dumps(changed(content, place, value)), "utf-8")
            try:
                said = [one.reason for one in open_labeled(source).left_out]
            except FlorenceError as error:
                said = [str(error)]
            assert not any("\n" in sentence for sentence in said), (place, value)

"""Which labeled images are for training and which for validation."""

from dataclasses import replace
from pathlib import Path

import pytest

from florence2.errors import RequestError
from florence2.labeled.records import LabeledData, LabeledImage
from florence2.labeled.split import split_data


def image(name, dataset="", **tags):
    return LabeledImage(Path("/data") / name, name, (64, 48), (), tags, dataset)


def data_of(*images):
    return LabeledData(Path("/data"), "coco", images, ("dog",))


DATA = data_of(
    image("a.png", "train", checked=None),
    image("b.png", "train", state="good"),
    image("c.png", "valid"),
    image("d.png", "more/inner", state="bad"),
)


@pytest.mark.parametrize(
    ("split", "chosen"),
    [
        (None, "c"),
        ("dataset:train", "ab"),
        ("dataset:val", "c"),
        ("dataset:more", "d"),
        ("valid", "c"),
        ("tag:checked", "a"),
        ("tag:state", "bd"),
        ("tag:state=good", "b"),
        ("checked", "a"),
    ],
)
def test_images_are_chosen_by_dataset_and_tag(split, chosen):
    rest, for_val = split_data(DATA, split)
    assert "".join(one.name[0] for one in for_val.images) == chosen
    assert {one.name[0] for one in rest.images} == set("abcd") - set(chosen)


def test_images_are_chosen_by_a_file_of_names(tmp_path):
    (tmp_path / "val.txt").write_text("a.png\n\nd\n", "utf-8")
    _, for_val = split_data(DATA, f"file:{tmp_path / 'val.txt'}")
    assert [one.name for one in for_val.images] == ["a.png", "d.png"]
    (tmp_path / "val.txt").write_text("z.png", "utf-8")
    with pytest.raises(RequestError, match=r"1 images that are not in the data, such as 'z\.png'"):
        split_data(DATA, f"file:{tmp_path / 'val.txt'}")


def test_the_hash_moves_no_image_when_others_come():
    few = data_of(*(image(f"{n}.png") for n in range(200)))
    many = data_of(*(image(f"{n}.png") for n in range(300)))
    chosen = {one.name for one in split_data(few)[1].images}
    assert 25 < len(chosen) < 55
    assert chosen <= {one.name for one in split_data(many)[1].images}


@pytest.mark.parametrize("fraction", ["0.0001", "0.9999"])
def test_of_two_images_each_side_has_one(fraction):
    rest, chosen = split_data(data_of(image("a.png"), image("b.png")), f"hash:{fraction}")
    assert len(rest.images) == len(chosen.images) == 1


@pytest.mark.parametrize(
    ("data", "split", "words"),
    [
        (data_of(image("a.png")), None, "both sides"),
        (DATA, "dataset:vall", "Unknown dataset 'vall'. Did you mean 'valid'"),
        (DATA, "tag:chekced", "Did you mean 'checked'"),
        (DATA, "hash:2", "between 0 and 1"),
        (DATA, "hash:x", "between 0 and 1"),
        (DATA, "color:red", "A split is"),
        (DATA, "dataset:", "A split is"),
        (DATA, "tag:state=none", "chooses none"),
        (DATA, "file:/nowhere/val.txt", "cannot be read"),
        (data_of(image("a.png"), image("b.png")), "dataset:x", "have no datasets"),
        (data_of(image("a.png"), image("b.png")), "tag:x", "No image has a tag"),
        (replace(DATA, images=DATA.images[:2]), "dataset:train", "chooses all 2"),
    ],
)
def test_a_split_that_is_none_is_one_sentence(data, split, words):
    with pytest.raises(RequestError, match=words):
        split_data(data, split)

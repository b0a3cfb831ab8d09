"""A project of the platform as the source of labels that go into a folder or bucket."""

from __future__ import annotations

import pytest
from contract_calls import CITY, STREET
from platform_double import TOKEN
from platform_seed import DATASETS

from florence2.errors import RequestError
from serve.cli.main import main
from serve.scaling.plan import Plan, Source
from serve.scaling.platform_source import project_address
from serve.scaling.storage import Storage, read_address

ALL = [f"{dataset}/{name}" for dataset, names in DATASETS.items() for name in names]


@pytest.fixture(autouse=True)
def environment(platform, monkeypatch):
    """As it is on every machine that opens images."""
    monkeypatch.setenv("SERVER_ADDRESS", platform.address)
    monkeypatch.setenv("API_TOKEN", TOKEN)


@pytest.fixture
def plan(tmp_path):
    target = Storage(str(tmp_path / "out"))

    def of(project_id, *datasets):
        address = project_address(project_id, datasets)
        return Plan(target, Source(address, recursive=False, skip=target.address), 2)

    return of


def images_of(plan):
    return [image for shard in plan.shards() for image in shard.images]


def test_the_images_of_a_project_are_planned_by_their_datasets(plan, seeded):
    images = images_of(plan(seeded.project_id))

    assert [one.key for one in images] == ALL
    assert [one.name for one in images] == [key.replace("/", "__") for key in ALL]


def test_an_image_is_read_by_its_address_as_it_is_on_the_platform(plan, seeded):
    images = images_of(plan(seeded.project_id))

    [city] = [one for one in images if one.key == f"outside/{CITY.name}"]
    assert read_address(city.address) == CITY.read_bytes()


@pytest.mark.parametrize("named", ["inside", "by id"])
def test_only_the_datasets_that_are_named_are_planned(plan, seeded, named):
    name = str(seeded.dataset_ids["inside"]) if named == "by id" else named
    images = images_of(plan(seeded.project_id, name))

    assert [one.key for one in images] == [f"inside/{name}" for name in DATASETS["inside"]]


def test_datasets_that_hold_datasets_and_odd_names_are_told_apart(plan, seeded, platform):
    outside = seeded.dataset_ids["outside"]
    nested = platform.state.add_dataset(seeded.project_id, "night & day?=1,5.csv", outside)
    platform.state.add_image(nested.id, "a__b", CITY.read_bytes())
    path = f"outside/{nested.name}"
    [image] = images_of(plan(seeded.project_id, path))

    # The SDK adds an extension where there is none.
    assert image.key == f"{path}/a__b.jpeg"
    assert read_address(image.address) == CITY.read_bytes()
    assert [one.key for one in images_of(plan(seeded.project_id, path))] == [image.key]


def test_images_that_the_sdk_calls_by_one_name_are_two(plan, seeded, platform):
    dataset = platform.state.add_dataset(seeded.project_id, "night")
    for name, path in (("a.jpeg", CITY), ("a", STREET)):
        platform.state.add_image(dataset.id, name, path.read_bytes())
    images = images_of(plan(seeded.project_id, "night"))

    assert len({one.key for one in images}) == len({one.name for one in images}) == 2
    assert [read_address(one.address) for one in images] == [
        path.read_bytes() for path in (CITY, STREET)
    ]


def test_a_plan_goes_on_behind_the_images_that_it_has(plan, seeded, platform, tmp_path):
    first = plan(seeded.project_id).shards()
    next(first)
    first.close()
    platform.state.add_image(seeded.dataset_ids["inside"], "later.jpg", CITY.read_bytes())

    assert [one.key for one in images_of(plan(seeded.project_id))] == [*ALL, "inside/later.jpg"]


@pytest.mark.parametrize("gone", ["the image", "its id is none"])
def test_an_image_that_is_gone_is_no_file(plan, seeded, platform, gone):
    [image, *_] = images_of(plan(seeded.project_id))
    address = image.address
    if gone == "the image":
        platform.state.images.pop(int(address.rsplit("/", 1)[-1]))
    else:
        address += "x"
    with pytest.raises(FileNotFoundError):
        read_address(address)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("no project", "does not exist or is not visible"),
        ("videos", "Only projects of images can be labeled"),
        ("no images", "A project to label has images and project"),
        ("no dataset", "has no dataset 'nowhere'"),
        ("no id", "is named by its id, as in supervisely://17"),
    ],
)
def test_a_project_that_cannot_be_labeled_is_said_in_a_sentence(seeded, platform, what, sentence):
    project_id = seeded.project_id
    if what == "videos":
        platform.state.project(project_id).type = "videos"
    if what == "no project":
        project_id = 999
    if what == "no images":
        platform.state.images.clear()
    datasets = ("nowhere",) if what == "no dataset" else ()
    address = "supervisely://street" if what == "no id" else project_address(project_id, datasets)
    with pytest.raises(RequestError, match=sentence):
        Source(address, recursive=False, skip="/nowhere").check()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--project", "7", "--out", "o"], "add --ray local for this machine alone"),
        (["photos", "--project", "7"], "IMAGES is not for a project of the platform"),
        (["photos", "--project", "7", "--out", "o"], "with --upload-to"),
        (["--project", "7", "--upload-to", "8"], "--upload-to is not for a project"),
        (["photos", "--out", "o", "--dataset", "a"], "--dataset is for a project"),
        (["photos", "--out", "o", "--upload-mode", "append"], "labeled where it is"),
        (["--project", "7", "--out", "o", "--again", "--ray", "local"], "labeled where it is"),
        (["clip.mp4", "--out", "o", "--upload-to", "8"], "is a video; leave --upload-to out"),
        (["photos", "--out", "o", "--upload-to", "999"], "Project 999 does not exist"),
        (
            ["--project", "7", "--out", "supervisely://8", "--ray", "local"],
            "name the project they are to go to with --upload-to",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_sources_and_targets_that_do_not_fit_are_said_in_a_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["label", *words, "--model", "demo", "--device", "cpu"])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err

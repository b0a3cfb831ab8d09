"""``florence2 upload``: labeled folders and shards in a project, each image once."""

from __future__ import annotations

import json
import shutil
from functools import partial

import fsspec
import pytest
from contract_calls import BIKE, CITY, STREET, annotation_of
from PIL import Image
from platform_double import TOKEN
from platform_state import TEAM_ID

from florence2.engine.encoding import Preparer
from florence2.pixels import ImageProcessor
from serve.cli.loading import one_model
from serve.cli.main import main
from serve.labeling.files import opened_workspace
from serve.labeling.settings import label_settings
from serve.labeling.undo import undo_in
from serve.platform.run_store import runs_of
from serve.predict.predictor import Predictor
from serve.provenance import Manifest
from serve.scaling.plan import PlannedImage, Shard
from serve.scaling.platform_target import Uploaded
from serve.scaling.shards import RUN_NAME, Work, commit_shard, label_shard, open_shard
from serve.scaling.storage import Storage, StorageError
from serve.scaling.upload import UploadJob, UploadReport
from serve.sdk import sly

IMAGES = (BIKE, CITY, STREET)


@pytest.fixture(scope="module")
def labeled_once(tmp_path_factory):
    """What ``florence2 label`` writes for three images that all have objects."""
    photos, out = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("labeled") / "night"
    for path in IMAGES[:-1]:
        shutil.copy(path, photos)
    # A file that is of another kind than its name says.
    Image.open(STREET).save(photos / STREET.name, "PNG")
    words = ["--model", "demo", "--task", "<OD>", "--num-beams", "1", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main(
            ["label", str(photos), "--out", str(out), "--settings", _tagging(photos.parent), *words]
        )
    assert ended.value.code in (0, None)
    return out


def _tagging(folder):
    path = folder / "settings.yaml"
    path.write_text("run_tag: true\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def labeled(labeled_once, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(labeled_once, tmp_path / "night")


@pytest.fixture
def project(platform):
    """An empty project."""
    return platform.state.add_project("street").id


@pytest.fixture
def upload(platform, project, monkeypatch, capsys):
    """``florence2 upload`` in this process: its exit code and what it prints."""
    monkeypatch.setenv("SERVER_ADDRESS", platform.address)
    monkeypatch.setenv("API_TOKEN", TOKEN)
    monkeypatch.setenv("TEAM_ID", str(TEAM_ID))
    monkeypatch.setattr("serve.platform.patience._WAITS_S", (0.0,))

    def run(labeled, *more, command="upload"):
        target = (
            [str(project), *more]
            if command == "undo"
            else [str(labeled), "--project", str(project), *more]
        )
        with pytest.raises(SystemExit) as ended:
            main([command, *target])
        told = capsys.readouterr()
        return ended.value.code or 0, told.out + told.err

    return run


def stored(platform, project):
    """Classes by image and dataset, as the platform has them."""
    state = platform.state
    return {
        (row.name, image.name): sorted(one["classTitle"] for one in image.annotation["objects"])
        for row in state.datasets_of(project)
        for image in state.images_of(row.id)
    }


def classes_in(labeled):
    """The same of a folder on disk."""
    folder = labeled / "project" / "ds0" / "ann"
    return {
        path.name.removesuffix(".json"): sorted(
            one["classTitle"] for one in json.loads(path.read_text())["objects"]
        )
        for path in folder.iterdir()
    }


def in_dataset(labeled, name="night"):
    return {(name, image): classes for image, classes in classes_in(labeled).items()}


def test_a_labeled_folder_is_on_the_platform_as_it_is_on_the_disk(
    upload, labeled, platform, project, api
):
    code, said = upload(labeled)

    assert code == 0, said
    assert stored(platform, project) == in_dataset(labeled)
    assert all(in_dataset(labeled).values())
    [row] = platform.state.datasets_of(project)
    meta = sly.ProjectMeta.from_json(json.loads((labeled / "project" / "meta.json").read_text()))
    for image in platform.state.images_of(row.id):
        assert image.content == (labeled / "project" / "ds0" / "img" / image.name).read_bytes()
        on_disk = sly.Annotation.load_json_file(
            str(labeled / "project" / "ds0" / "ann" / f"{image.name}.json"),
            meta,
        )
        there = annotation_of(api, image.id)
        assert [one.geometry.to_bbox().to_json()["points"] for one in there.labels] == [
            one.geometry.to_bbox().to_json()["points"] for one in on_disk.labels
        ]
        assert [{tag.name: tag.value for tag in one.tags} for one in there.labels] == [
            {tag.name: tag.value for tag in one.tags} for one in on_disk.labels
        ]


def test_the_runs_of_what_was_uploaded_are_known_also_where_another_process_lost_them(
    upload, labeled, platform, project, api
):
    upload(labeled)
    [run] = runs_of(api, project)
    api.project.update_custom_data(project, {}, silent=True)
    assert runs_of(api, project) == [run]


def test_what_was_uploaded_is_not_uploaded_again(upload, labeled, platform, project):
    upload(labeled)
    before = len(platform.calls)
    code, said = upload(labeled)

    assert (code, f"uploaded to project {project} before" in said) == (0, True)
    assert {call.method for call in platform.calls[before:]} <= {"projects.info"}


def test_labels_that_a_person_made_meanwhile_stay_whatever_is_uploaded(
    upload, labeled, platform, project
):
    upload(labeled)
    image = next(one for one in platform.state.images.values() if one.name == CITY.name)
    [kept, *_] = image.annotation["objects"]
    image.annotation["objects"] = [kept]
    code, said = upload(labeled, "--again")

    assert code == 0
    assert "3 had labels there and stay as they are" in said
    assert image.annotation["objects"] == [kept]


@pytest.mark.parametrize(
    ("method", "breaks"),
    [
        ("images.bulk.upload", "lose"),
        ("images.bulk.add", "lose"),
        ("annotations.bulk.add", "lose"),
        ("annotations.bulk.add", "fail"),
        ("datasets.add", "lose"),
        ("projects.meta.update", "lose"),
        ("file-storage.bulk.upload", "fail"),
    ],
)
def test_a_call_whose_answer_is_lost_brings_nothing_twice(
    upload, labeled, platform, project, method, breaks
):
    faults = platform.faults
    (faults.lose if breaks == "lose" else partial(faults.fail, status=502))(method)
    code, said = upload(labeled)

    assert code == 0, said
    assert stored(platform, project) == in_dataset(labeled)


def test_images_that_the_platform_refuses_are_named_and_the_others_are_there(
    upload, labeled, platform, project
):
    dataset = platform.state.add_dataset(project, "night")
    platform.state.add_image(dataset.id, CITY.name, BIKE.read_bytes())
    code, said = upload(labeled)

    assert code == 1
    assert f"{CITY.name!r} is another image there; choose another --dataset" in said
    expected = in_dataset(labeled) | {("night", CITY.name): []}
    assert stored(platform, project) == expected

    code, said = upload(labeled, "--dataset", "second")
    assert code == 0, said
    assert stored(platform, project) == expected | {
        ("second", CITY.name): classes_in(labeled)[CITY.name]
    }


def test_labels_that_were_refused_are_written_by_the_next_upload(
    upload, labeled, platform, project, api
):
    platform.faults.fail("annotations.bulk.add", times=4, status=400)
    code, said = upload(labeled)
    assert code == 2
    assert "3 failed" in said
    assert set(stored(platform, project)) == set(in_dataset(labeled))
    assert not any(stored(platform, project).values())
    sent = platform.count("images.bulk.upload")

    code, said = upload(labeled)
    assert code == 0, said
    assert platform.count("images.bulk.upload") == sent, "the images were there"
    assert stored(platform, project) == in_dataset(labeled)
    num_labels = sum(len(classes) for classes in classes_in(labeled).values())
    [run] = runs_of(api, project)
    assert run.counts == {"images": 3, "labeled": 3, "labels": num_labels, "tags": 0}


def test_undo_takes_back_what_was_uploaded_and_leaves_what_a_person_changed(
    upload, labeled, platform, project
):
    path = labeled / "project" / "ds0" / "ann" / f"{BIKE.name}.json"
    edited = json.loads(path.read_text())
    edited["objects"][0]["points"]["exterior"][0][0] += 3
    path.write_text(json.dumps(edited))
    upload(labeled)
    image = next(one for one in platform.state.images.values() if one.name == CITY.name)
    image.annotation["objects"][0]["points"]["exterior"][1][0] -= 5
    run = json.loads((labeled / "runs.jsonl").read_text())["run"]
    code, said = upload(labeled, "--run", run, command="undo")

    assert code == 0, said
    left = {name: len(classes) for (_, name), classes in stored(platform, project).items()}
    assert left == {BIKE.name: 1, CITY.name: 1, STREET.name: 0}
    assert "2 labels were changed since" in said


def test_a_project_that_means_something_else_by_a_name_keeps_its_meaning(
    upload, labeled, platform, project
):
    name = classes_in(labeled)[CITY.name][0]
    theirs = sly.ProjectMeta(
        [sly.ObjClass(name, sly.Polygon)], [sly.TagMeta("confidence", sly.TagValueType.ANY_STRING)]
    )
    platform.state.set_meta(platform.state.project(project), theirs.to_json())
    code, said = upload(labeled)

    assert code == 0, said
    meta = sly.ProjectMeta.from_json(platform.state.project(project).meta)
    assert meta.get_obj_class(name).geometry_type is sly.Polygon
    assert meta.get_obj_class(f"{name}_nn").geometry_type is sly.Rectangle
    assert meta.get_tag_meta("confidence_nn").value_type == sly.TagValueType.ANY_NUMBER
    assert f"{name}_nn" in stored(platform, project)["night", CITY.name]


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_committed_shards_are_uploaded_from_a_disk_and_from_a_bucket(
    upload, platform, project, tmp_path, place
):
    fsspec.filesystem("memory").store.clear()
    address = str(tmp_path / "night") if place == "disk" else "memory://labels/night"
    target = Storage(address)
    manifest = Manifest("aaaaaaaa", {"name": "demo"}, "<OD>", [], {}, None, "now")
    settings = label_settings(task="<OD>", num_beams=1).model_copy(update={"run_tag": True})
    work = Work(target, settings, {}, manifest)
    target.write(RUN_NAME, b"{}")
    predictor = Predictor(one_model("demo", "cpu", "auto", "auto"), fixed_shapes={})
    preparer = Preparer(ImageProcessor((192, 192)), threads=1)
    counts = []

    def commit(number, path):
        shard = Shard(number, (PlannedImage(path.name, str(path), path.name),))
        images = open_shard(work, shard, preparer)
        label_shard(work, shard, images, predictor)
        counts.append(commit_shard(work, shard, images).objects)

    commit(0, BIKE)
    assert upload(address)[0] == 0
    commit(1, CITY)
    commit(102, STREET)
    code, said = upload(address)

    assert code == 0, said
    assert f"2 images and {sum(counts[1:])} labels uploaded" in said
    found = {place: len(classes) for place, classes in stored(platform, project).items()}
    assert found == {
        ("night", BIKE.name): counts[0],
        ("night", CITY.name): counts[1],
        ("night-2", STREET.name): counts[2],
    }
    code, said = upload(address, "--run", "aaaaaaaa", command="undo")
    assert f"{sum(counts)} labels deleted, on 3 images." in said


def test_an_account_that_may_not_write_team_files_uploads_all_the_same(
    upload, labeled, platform, project
):
    platform.faults.fail("file-storage.bulk.upload", times=100, status=403)
    code, said = upload(labeled)

    assert code == 0, said
    assert stored(platform, project) == in_dataset(labeled)
    assert "cannot be taken back by florence2 undo" in said


def test_what_was_undone_on_the_disk_is_not_uploaded(upload, labeled, platform, project):
    run = json.loads((labeled / "runs.jsonl").read_text())["run"]
    path = labeled / "project" / "ds0" / "ann" / f"{BIKE.name}.json"
    edited = json.loads(path.read_text())
    edited["objects"][0]["classTitle"] = edited["objects"][-1]["classTitle"] = "star"
    path.write_text(json.dumps(edited))
    undo_in(labeled, run)
    code, said = upload(labeled)

    assert code == 0, said
    assert stored(platform, project) == in_dataset(labeled)
    assert [name for _, name in stored(platform, project)] == [BIKE.name]
    assert "go on with" not in said


def test_what_is_said_of_an_image_that_has_no_labels_there_stays(
    upload, labeled, platform, project
):
    dataset = platform.state.add_dataset(project, "night")
    image = platform.state.add_image(dataset.id, CITY.name, CITY.read_bytes())
    image.annotation["description"] = "the north gate"
    code, said = upload(labeled)

    assert code == 0, said
    assert stored(platform, project) == in_dataset(labeled)
    assert image.annotation["description"] == "the north gate"


def run_in(labeled):
    return json.loads((labeled / "runs.jsonl").read_text())["run"]


def test_undo_takes_back_what_one_folder_brought_to_two_datasets(
    upload, labeled, platform, project
):
    upload(labeled)
    upload(labeled, "--dataset", "second", "--again")
    assert stored(platform, project) == in_dataset(labeled) | in_dataset(labeled, "second")
    upload(labeled, "--run", run_in(labeled), command="undo")

    assert len(stored(platform, project)) == 6
    assert not any(stored(platform, project).values())


def test_what_was_undone_and_uploaded_again_is_a_run_that_can_be_undone_again(
    upload, labeled, platform, project, api
):
    upload(labeled)
    upload(labeled, "--run", run_in(labeled), command="undo")
    assert [run.state for run in runs_of(api, project)] == ["undone"]
    upload(labeled, "--again")

    assert stored(platform, project) == in_dataset(labeled)
    assert [run.state for run in runs_of(api, project)] == ["done"]
    upload(labeled, "--run", run_in(labeled), command="undo")
    assert not any(stored(platform, project).values())
    assert [run.state for run in runs_of(api, project)] == ["undone"]


@pytest.mark.parametrize("is_tagged", [True, False])
def test_labels_whose_upload_was_cut_off_can_be_undone_at_once(
    upload, labeled, platform, project, is_tagged, monkeypatch
):
    if not is_tagged:
        _without_run_tag(labeled)

    def full(*_):
        raise StorageError("The disk is full; make room.")

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "write", full)
        code, said = upload(labeled)
    assert (code, "The disk is full" in said) == (2, True)
    assert "3 images are not known to be uploaded; go on with" in said
    assert stored(platform, project) == in_dataset(labeled)
    upload(labeled, "--run", run_in(labeled), command="undo")

    assert not any(stored(platform, project).values())


def _without_run_tag(labeled):
    """As ``florence2 label`` writes a folder by itself."""
    runs = labeled / "runs.jsonl"
    runs.write_text(json.dumps(json.loads(runs.read_text()) | {"run_tag": None}) + "\n")
    for path in (labeled / "project" / "ds0" / "ann").iterdir():
        stored = json.loads(path.read_text())
        for label in stored["objects"]:
            label["tags"] = [tag for tag in label["tags"] if tag["name"] != "florence2_run"]
        path.write_text(json.dumps(stored))


def test_where_nothing_was_written_nothing_is_to_be_undone(upload, labeled, platform, project):
    dog = sly.ObjClass("dog", sly.Rectangle)
    platform.state.set_meta(platform.state.project(project), sly.ProjectMeta([dog]).to_json())
    dataset = platform.state.add_dataset(project, "night")
    for path in (labeled / "project" / "ds0" / "img").iterdir():
        image = platform.state.add_image(dataset.id, path.name, path.read_bytes())
        label = sly.Label(sly.Rectangle(1, 1, 9, 9), dog)
        annotation = sly.Annotation(image.size_wh[::-1], [label])
        platform.state.set_annotation(image, annotation.to_json())
    code, said = upload(labeled)

    assert code == 0
    assert "3 had labels there and stay as they are" in said
    assert "florence2 undo" not in said
    _, said = upload(labeled, "--run", run_in(labeled), command="undo")
    assert said == "0 labels deleted, on 0 images.\n"
    assert set(map(tuple, stored(platform, project).values())) == {("dog",)}


def test_labels_of_a_run_that_nobody_noted_are_uploaded_and_no_undo_is_promised(
    upload, labeled, platform, project
):
    (labeled / "runs.jsonl").unlink()
    code, said = upload(labeled)

    assert (code, "florence2 undo" in said) == (0, False)
    assert stored(platform, project) == in_dataset(labeled)


def test_captions_are_counted_and_undone_as_tags_of_images(upload, platform, project, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "captions"
    photos.mkdir()
    shutil.copy(BIKE, photos)
    words = ["--model", "demo", "--task", "<CAPTION>", "--num-beams", "1", "--device", "cpu"]
    with pytest.raises(SystemExit):
        main(["label", str(photos), "--out", str(out), *words])
    _, said = upload(out)
    assert "0 labels (1 tags of images) uploaded" in said
    [image] = platform.state.images.values()
    assert [tag["name"] for tag in image.annotation["tags"]] == ["caption"]

    upload(out, "--run", run_in(out), command="undo")
    assert image.annotation["tags"] == []


def test_of_two_uploads_from_one_folder_one_is_refused(upload, labeled, platform, project):
    with opened_workspace(labeled / "uploaded" / str(project)):
        code, said = upload(labeled)
    assert code == 2
    assert "another one notes in" in said
    assert upload(labeled)[0] == 0


def test_more_failures_than_are_shown_are_named_in_a_place_that_is_told():
    report = UploadReport(17, total=9)
    failures = [(f"{number}.jpg", "bad_annotation", "It is none.") for number in range(7)]
    report.add(Uploaded(["a.jpg", "b.jpg"], failures=failures))

    said = "\n".join(report.lines(UploadJob("s3://labels/night/", 17)))
    assert "... and 2 more, all of them in s3://labels/night/uploaded/17" in said


@pytest.mark.parametrize(
    "what",
    [
        "no labels",
        "no project",
        "a project of videos",
        "nothing",
        "no classes",
        "broken classes",
        "no image yet",
        "broken note",
        "no place for notes",
    ],
)
def test_what_cannot_be_uploaded_is_said_in_a_sentence(upload, labeled, platform, what, project):
    row = platform.state.project(project)
    place, sentence = {
        "no labels": (labeled / "project", "give what was given to it as --out"),
        "nothing": (labeled / "nowhere", "give what was given to it as --out"),
        "no image yet": (labeled, "has none yet; label some first"),
        "broken note": (labeled, "remove it, or use --again"),
        "no place for notes": (labeled, "make it a folder of yours, or upload a copy"),
        "no classes": (labeled, "go on with florence2 label, or mend the file"),
        "broken classes": (labeled, "go on with florence2 label, or mend the file"),
        "no project": (labeled, "does not exist or is not visible"),
        "a project of videos": (labeled, "Only projects of images can be labeled"),
    }[what]
    notes = labeled / "uploaded" / str(project)
    if what == "broken note":
        notes.mkdir(parents=True)
        (notes / "000000.json").write_text("{")
    if what == "no place for notes":
        notes.parent.write_text("")
    if what == "no image yet":
        journal = labeled / "journal.jsonl"
        journal.write_text(journal.read_text().replace('"labeled"', '"failed"'))
    if what == "no classes":
        (labeled / "project" / "meta.json").unlink()
    if what == "broken classes":
        (labeled / "project" / "meta.json").write_text("{")
    if what == "no project":
        platform.state.projects.pop(project)
    if what == "a project of videos":
        row.type = "videos"
    code, said = upload(place)

    assert code == 2
    assert sentence in said

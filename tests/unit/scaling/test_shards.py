"""A shard is opened, labeled and committed: once, however many attempts there are."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest
from label_fakes import color_in, color_of, one_box
from scaling_tools import picture, read_shard

from florence2.errors import DeviceLostError, RequestError
from florence2.records import Failure
from serve.labeling.undo import undo_in
from serve.scaling import shards
from serve.scaling.plan import PlannedImage, Shard
from serve.scaling.shards import (
    commit_shard,
    committed_in,
    committed_names,
    committed_numbers,
    committed_shard,
    label_shard,
    open_shard,
)
from serve.scaling.storage import Storage, StorageError


class Killed(BaseException):
    """As if the process had ended."""


@pytest.fixture
def shard(bucket):
    """Three images of three colours."""
    bucket(**{name: picture(number) for number, name in enumerate("abc")})
    images = [PlannedImage(f"{one}.png", f"memory://in/{one}.png", f"{one}.png") for one in "abc"]
    return Shard(7, tuple(images))


@pytest.fixture
def labeled(preparer, predictor):
    """The images of a shard with their answers, each stage in another process."""

    def run(work, shard):
        images = pickle.loads(pickle.dumps(open_shard(work, shard, preparer)))
        label_shard(work, shard, images, predictor)
        return pickle.loads(pickle.dumps(images))

    return run


@pytest.mark.parametrize("options", [{}, {"tiling": "40"}], ids=["whole", "tiles"])
def test_a_shard_becomes_a_project_the_sdk_reads(shard, labeled, work, target, tmp_path, options):
    work = work(**options)
    committed = commit_shard(work, shard, labeled(work, shard))
    assert (committed.shard, committed.images, committed.labeled) == (7, 3, 3)
    annotations, copied = read_shard(target, committed.folder, tmp_path / "copy")
    assert sorted(annotations) == ["a.png", "b.png", "c.png"]
    assert all(one.labels[0].obj_class.name == "cat" for one in annotations.values())
    assert (copied / "project/ds0/img/b.png").read_bytes() == picture(1)
    assert list(committed_in(target)) == [committed]


def test_coco_and_previews_are_made_of_each_shard(shard, labeled, work, target, tmp_path):
    work = replace(work(), coco=True, draw=True)
    committed = commit_shard(work, shard, labeled(work, shard))
    _, copied = read_shard(target, committed.folder, tmp_path / "copy")
    coco = json.loads((copied / "coco/ds0/annotations/coco_instances.json").read_text())
    assert [one["file_name"] for one in coco["images"]] == ["a.png", "b.png", "c.png"]
    assert (copied / "previews/a.png.jpg").exists()


def test_of_two_attempts_alive_at_once_one_is_committed(shard, labeled, work, target):
    first, second = work("aaaaaaaa"), work("bbbbbbbb")
    images = labeled(first, shard), labeled(second, shard)
    create = type(target).create
    outcomes = []

    def late(self, name, content):
        # The other attempt comes through between this one's folder and its note.
        if name.startswith("committed") and not outcomes:
            outcomes.append(commit_shard_of(second, images[1]))
        return create(self, name, content)

    def commit_shard_of(work, images):
        outcomes.append(None)
        return commit_shard(work, shard, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(target), "create", late)
        held = commit_shard(first, shard, images[0])
    assert held == outcomes[-1] == committed_shard(target, 7)
    assert held.run == "bbbbbbbb"
    assert target.names("shards") == [held.folder.removeprefix("shards/")]
    assert commit_shard(first, shard, images[0]) == held


def test_an_attempt_that_ends_before_its_note_has_done_nothing(
    shard, labeled, work, target, monkeypatch
):
    work = work()
    images = labeled(work, shard)

    def killed(self, name, content):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(type(target), "create", killed)
        with pytest.raises(Killed):
            commit_shard(work, shard, images)
    assert committed_shard(target, 7) is None
    assert len(target.names("shards")) == 1
    held = commit_shard(work, shard, images)
    assert committed_shard(target, 7) == held


def test_each_failure_is_one_image_with_its_reason(shard, bucket, labeled, work, model):
    bucket(b=b"no image")
    gone = PlannedImage("d.png", "memory://in/d.png", "d.png")
    shard = replace(shard, images=(*shard.images, gone))
    model.answer = lambda ask: (
        Failure("too_long", "Too long.") if color_in(ask) == color_of(2) else one_box(ask)
    )
    work = work()
    committed = commit_shard(work, shard, labeled(work, shard))
    failed = {key: (address, code) for key, address, _, code, _ in committed.failures}
    assert failed == {
        "b.png": ("memory://in/b.png", "bad_image"),
        "c.png": ("memory://in/c.png", "too_long"),
        "d.png": ("memory://in/d.png", "bad_image"),
    }
    assert (committed.images, committed.labeled) == (4, 1)
    assert "'memory://in/b.png' is in none" in committed.failures[0][4]


def test_an_address_that_is_none_fails_one_image(shard, labeled, work):
    odd = PlannedImage("e.png", "nothing://in/e.png", "e.png")
    shard = replace(shard, images=(*shard.images, odd))
    work = work()
    committed = commit_shard(work, shard, labeled(work, shard))
    assert committed.labeled == 3
    ((key, _, _, code, message),) = committed.failures
    assert (key, code) == ("e.png", "bad_image")
    assert "begins with none that is known" in message


def test_an_image_whose_name_begins_with_a_dot_is_kept(shard, labeled, work, target, tmp_path):
    first, *others = shard.images
    shard = replace(shard, images=(replace(first, name=".x__a.png"), *others))
    work = work()
    committed = commit_shard(work, shard, labeled(work, shard))
    annotations, copied = read_shard(target, committed.folder, tmp_path / "copy")
    assert sorted(annotations) == [".x__a.png", "b.png", "c.png"]
    assert not (copied / ".lock").exists()


def test_notes_are_read_in_a_folder_whose_name_is_a_pattern(tmp_path):
    target = Storage(str(tmp_path / "out [1]*"))
    for number in range(3):
        target.create(f"committed/{number:06}.json", b"%d" % number)
    target.write("committed/.nfs0001", b"of the file system")
    assert committed_numbers(target) == {0, 1, 2}
    names = [f"committed/{name}" for name in committed_names(target)]
    assert list(target.read_many(names)) == [b"0", b"1", b"2"]


def test_a_name_like_that_of_a_file_half_written_is_downloaded_too(target, tmp_path):
    names = ["scan.part-1.jpg", "a.jpg.part-b.png"]
    for name in names:
        target.write(f"shard/{name}", b"x")
    target.download("shard", tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == sorted(names)
    assert target.names("shard") == sorted(names)


def test_settings_that_fit_no_image_end_the_run_at_its_first_shard(shard, labeled, work, model):
    model.answer = lambda ask: Failure("bad_request", "The prompt is too long.")
    with pytest.raises(RequestError, match="too long"):
        labeled(work(), replace(shard, number=0))
    later = labeled(work(), shard)
    assert [one.problem.code for one in later] == ["bad_request"] * 3


def test_a_device_that_is_lost_fails_no_image(shard, labeled, work, model):
    model.answer = lambda ask: Failure("device_lost", "The device is gone.")
    with pytest.raises(DeviceLostError):
        labeled(work(), shard)


@pytest.fixture
def in_processes(monkeypatch):
    """Does something so many times, each in a process that ends by it."""

    def times(count, work):
        for number in range(count):
            monkeypatch.setattr(shards, "THIS_PROCESS", f"p{number}")
            with pytest.raises(Killed):
                work()
        monkeypatch.setattr(shards, "THIS_PROCESS", "last")

    return times


def test_an_image_that_ends_processes_is_found_and_named(shard, labeled, work, model, in_processes):
    def answer(ask):
        if color_in(ask) == color_of(1):
            raise Killed
        return one_box(ask)

    model.answer = answer
    work = work()
    in_processes(3, lambda: labeled(work, shard))
    committed = commit_shard(work, shard, labeled(work, shard))
    assert [(one[0], one[3]) for one in committed.failures] == [("b.png", "process_ended")]
    assert committed.labeled == 2


def test_a_file_that_ends_the_opening_process_is_found_and_named(
    shard, work, preparer, in_processes, monkeypatch
):
    work = work()

    def killed(settings, *_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("serve.scaling.shards.read_ahead", killed)
        in_processes(3, lambda: open_shard(work, shard, preparer))
    opened = open_shard(work, shard, preparer)
    assert [one.problem and one.problem.code for one in opened] == ["process_ended", None, None]


@pytest.mark.parametrize("note", ["start-", "taken-", "passed-"])
@pytest.mark.parametrize("is_written", [True, False], ids=["its answer is lost", "it is gone"])
def test_a_store_that_fails_for_a_while_is_no_end_of_a_process(
    shard, labeled, work, model, target, in_processes, monkeypatch, note, is_written
):
    """After two processes ended each image is noted before it is asked about."""

    def killed(ask):
        raise Killed

    work, write, failures = work(), Storage.write, []

    def failing(self, name, content):
        if f"-label/{note}" in name and len(failures) < 3:
            if is_written:
                write(self, name, content)
            failures.append(name)
            raise StorageError("gone")
        write(self, name, content)

    model.answer = killed
    in_processes(2, lambda: labeled(work, shard))
    model.answer = one_box
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", failing)
        for _ in range(3):
            with pytest.raises(StorageError):
                labeled(work, shard)
        committed = commit_shard(work, shard, labeled(work, shard))
    assert (committed.labeled, committed.failures) == (3, [])
    starts = [one for one in target.names("attempts/aaaaaaaa/000007-label") if "start" in one]
    assert len(starts) == 3


def test_a_shard_of_what_failed_says_what_has_labels_now(shard, labeled, work, model):
    work = work()
    again = replace(shard, is_again=True)
    committed = commit_shard(work, again, labeled(work, again))
    assert committed.settled == ["a.png", "b.png", "c.png"]


def test_a_run_is_undone_in_the_folder_of_a_shard(shard, labeled, work, target, tmp_path):
    work = work(run_tag=True)
    committed = commit_shard(work, shard, labeled(work, shard))
    _, copied = read_shard(target, committed.folder, tmp_path / "copy")
    assert undo_in(copied, "aaaaaaaa").num_deleted == 3

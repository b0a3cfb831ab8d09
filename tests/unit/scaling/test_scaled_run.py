"""``florence2 label --ray`` from its command line to its report: in place of a cluster the stages
come one after the other in this process."""

from __future__ import annotations

import csv
import io
import json
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
from label_fakes import color_in, color_of, one_box, read_project, result
from scaling_tools import picture, read_shard

from florence2.errors import RequestError
from florence2.records import Failure
from serve.scaling import run as scaled_run
from serve.scaling.cluster import connected
from serve.scaling.plan import Plan
from serve.scaling.shards import commit_shard, label_shard, open_shard
from serve.scaling.storage import Storage, StorageError


@pytest.fixture
def target(bucket):
    return Storage("memory://labels/out")


@pytest.fixture
def serial(monkeypatch, preparer):
    """In place of the cluster; at the shard ``stop_at`` Ctrl-C is pressed, and while the first one
    is on its way ``meanwhile`` happens."""
    edge = SimpleNamespace(stop_at=None, labeled=[], meanwhile=lambda: None)

    def committed_shards(pipeline):
        work = pipeline.work
        predictor = pipeline.workers.model.load()
        for shard in list(Plan(work.target, pipeline.source, pipeline.shard_size).shards()):
            if shard.number in pipeline.done:
                continue
            if shard.number == edge.stop_at:
                raise KeyboardInterrupt
            edge.labeled.append(shard.number)
            meanwhile, edge.meanwhile = edge.meanwhile, lambda: None
            meanwhile()
            images = open_shard(work, shard, preparer)
            label_shard(work, shard, images, predictor)
            yield commit_shard(work, shard, images)

    monkeypatch.setattr(scaled_run, "connected", lambda address: nullcontext())
    monkeypatch.setattr(scaled_run, "committed_shards", committed_shards)
    return edge


@pytest.fixture
def label(monkeypatch, model, serial, target, capsys):
    """Runs the command over the bucket ``in``; its exit code, stderr, and report."""
    model.put_in(monkeypatch)

    def run(*options, source="memory://in"):
        from serve.cli.main import main

        capsys.readouterr()
        words = ["--prompt", "cat", "--ray", "local", "--shard-size", "2"]
        with pytest.raises(SystemExit) as ended:
            main(["label", source, "--out", target.address, *words, *options])
        stored = target.read("report.json")
        report = None if stored is None else json.loads(stored)
        return SimpleNamespace(code=ended.value.code, told=capsys.readouterr().err, report=report)

    return run


@pytest.fixture
def images(bucket):
    """Five images of five colours."""
    bucket(**{name: picture(number) for number, name in enumerate("abcde")})


def annotations_in(target: Storage, tmp_path) -> dict:
    found = {}
    for name in target.names("shards"):
        found |= read_shard(target, f"shards/{name}", tmp_path / "copy" / name)[0]
    return found


def test_the_labels_are_those_that_a_run_over_a_folder_makes(
    images, label, target, tmp_path, monkeypatch
):
    done = label("--threshold", "0.3")
    assert done.code == 0, done.told
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate("abcde"):
        (folder / f"{name}.png").write_bytes(picture(number))
    from serve.cli.main import main

    out = tmp_path / "one"
    with pytest.raises(SystemExit):
        main(["label", str(folder), "--out", str(out), "--prompt", "cat", "--threshold", "0.3"])
    expected, project = read_project(out)
    found = annotations_in(target, tmp_path)

    def shown(annotations):
        return {
            name: [(one.obj_class.name, one.geometry.to_json()["points"]) for one in found.labels]
            for name, found in annotations.items()
        }

    assert shown(found) == shown(expected)
    report = json.loads((out / "report.json").read_text())
    told = ("images", "labeled", "empty", "failed", "objects", "pending")
    assert [done.report[key] for key in told] == [report[key] for key in told]
    del project


def test_a_run_that_is_stopped_says_what_is_committed_and_goes_on(images, label, serial, target):
    serial.stop_at = 2
    stopped = label()
    assert stopped.code == 130
    assert (stopped.report["labeled"], stopped.report["pending"]) == (4, 1)
    assert "4 labeled (4 objects)" in stopped.told
    assert "in 2 committed shards" in stopped.told
    assert "1 images are still to do; go on with:\nflorence2 label memory://in" in stopped.told
    serial.stop_at = None
    done = label()
    assert done.code == 0
    assert serial.labeled == [0, 1, 2]
    assert (done.report["labeled"], done.report["pending"]) == (5, 0)
    states = [json.loads(target.read(f"runs/{one}"))["state"] for one in target.names("runs")]
    assert sorted(states) == ["done", "stopped"]
    assert not target.names("attempts")


def test_a_folder_that_nothing_is_noted_of_is_taken_back(images, label, target):
    label()
    (held,) = [one for one in target.names("shards") if one.startswith("shard-000001")]
    target.write("shards/shard-000001-late00/journal.jsonl", b"x")
    target.write("shards/shard-000009-other0/journal.jsonl", b"of a shard that is not committed")
    label()
    left = target.names("shards")
    assert held in left
    assert "shard-000001-late00" not in left
    assert "shard-000009-other0" in left


def test_failures_are_named_and_can_be_tried_again(images, label, model, bucket, target):
    bucket(b=b"no image")
    model.answer = lambda ask: (
        Failure("too_long", "Too long.") if color_in(ask) == color_of(2) else one_box(ask)
    )
    done = label()
    assert done.code == 1
    assert (done.report["failed"], done.report["labeled"]) == (2, 3)
    table = csv.DictReader(io.StringIO(target.read("failed.csv").decode()))
    assert {row["image"]: row["code"] for row in table} == {
        "b.png": "bad_image",
        "c.png": "too_long",
    }
    assert "Retry only these with:\nflorence2 label memory://in" in done.told
    bucket(b=picture(1))
    again = label("--retry-failed")
    assert (again.report["failed"], again.report["labeled"]) == (1, 4)
    model.answer = one_box
    last = label("--retry-failed")
    assert last.code == 0
    assert (last.report["failed"], last.report["labeled"], last.report["images"]) == (0, 5, 5)
    assert target.read("failed.csv") is None
    index = target.read("shards.csv").decode().splitlines()
    assert [line.split(",")[0] for line in index] == ["shard", "0", "1", "2", "3", "4"]


def test_a_retry_that_is_stopped_labels_each_image_once(images, label, model, serial, target):
    model.answer = lambda ask: Failure("too_long", "Too long.")
    label()
    model.answer = one_box
    serial.stop_at = 4
    assert label("--retry-failed").code == 130
    serial.stop_at = None
    done = label("--retry-failed")
    assert done.code == 0, done.told
    assert (done.report["labeled"], done.report["pending"]) == (5, 0)
    assert serial.labeled == [0, 1, 2, 3, 4, 5]


def test_notes_of_runs_that_were_killed_go_once_all_is_committed(images, label, serial, target):
    serial.stop_at = 1
    label()
    target.write("attempts/bbbbbbbb/000000-open/start-0", b"")
    serial.stop_at = None
    label()
    assert not target.names("attempts")


def test_a_store_that_is_gone_for_a_moment_does_not_end_a_run_by_its_progress_bar(
    images, label, monkeypatch
):
    shown, is_gone = [], [True]
    num_planned = Plan.num_planned

    def planned(self):
        if is_gone:
            raise StorageError("gone")
        return num_planned(self)

    @contextmanager
    def bar(total):
        yield lambda images: shown.append(total())
        is_gone.clear()

    monkeypatch.setattr(Plan, "num_planned", planned)
    monkeypatch.setattr(scaled_run, "progress_bar", bar)
    done = label()
    assert (done.code, done.report["labeled"]) == (0, 5)
    assert shown == [0, 0, 0]


def test_labels_do_not_go_where_deleting_would_delete_more(images, label):
    refused = label("--out", "memory://labels/out*")
    assert refused.code == 2
    assert "has none of * ? [ ] and got 'memory://labels/out*'" in refused.told


def test_a_run_that_goes_wrong_is_stopped(images, label, model):
    model.answer = lambda ask: Failure("too_long", "Too long.")
    done = label("--max-failures", "1")
    assert done.code == 2
    assert "Stopped early: 2 of 2 images failed, and 1 may" in done.told
    assert "3 images are still to do" in done.told


def test_images_where_nothing_is_found_are_done(images, label, model):
    model.answer = lambda ask: result(ask.task, size=ask.image.size_wh)
    assert label().report["empty"] == 5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--threshold", "0.7"), "was begun with threshold 0.0, not 0.7"),
        (("--shard-size", "3"), "was begun with shard_size 2, not 3"),
    ],
)
def test_one_target_holds_one_kind_of_labels(images, label, options, told):
    label()
    refused = label(*options)
    assert refused.code == 2
    assert told in refused.told


def test_a_target_where_nothing_was_committed_takes_other_settings(images, label, serial):
    serial.stop_at = 0
    label()
    serial.stop_at = None
    done = label("--threshold", "0.7", "--shard-size", "3")
    assert (done.code, done.report["labeled"]) == (0, 5)
    assert serial.labeled == [0, 1]


def test_a_run_that_ends_before_its_first_shard_is_noted_as_failed(images, label, model, target):
    model.answer = lambda ask: Failure("bad_request", "The prompt is too long.")
    refused = label()
    assert (refused.code, "The prompt is too long." in refused.told) == (2, True)
    [name] = target.names("runs")
    stored = json.loads(target.read(f"runs/{name}"))
    assert (stored["state"], "too long" in stored["error"]) == ("failed", True)


AT_WORK = "was begun with threshold 0.0, not 0.7, by run"


def settings_of(target):
    return json.loads(target.read("run.json"))["settings"]


def test_a_run_that_has_committed_nothing_yet_keeps_its_target(images, label, serial, target):
    refused = []
    serial.meanwhile = lambda: refused.append(label("--threshold", "0.7"))
    done = label()
    assert (done.code, done.report["labeled"]) == (0, 5), done.told
    assert refused[0].code == 2
    assert AT_WORK in refused[0].told
    assert settings_of(target)["threshold"] == 0.0
    assert len(target.names("runs")) == 1


@pytest.mark.parametrize(
    ("name", "is_taken_over"),
    [("run.json", False), ("run.json", True), ("runs/", True)],
    ids=["new", "its settings are written", "it is noted"],
)
def test_of_two_runs_that_begin_in_one_moment_at_most_one_gets_the_target(
    images, label, serial, target, monkeypatch, name, is_taken_over
):
    if is_taken_over:
        serial.stop_at = 0
        label("--threshold", "0.9")
        serial.stop_at = None
    others = []

    def patched(method):
        inner = getattr(Storage, method)

        def write(self, written, content):
            result = inner(self, written, content)
            if written.startswith(name) and not others:
                others.append(None)
                others.append(label("--threshold", "0.7"))
            return result

        monkeypatch.setattr(Storage, method, write)

    patched("write")
    patched("create")
    runs = [label(), others[-1]]
    done = [one for one in runs if one.code == 0]
    assert len(done) <= 1
    assert all("choose another --out" in one.told for one in runs if one not in done)
    if done:
        assert settings_of(target)["threshold"] == (0.0 if done == runs[:1] else 0.7)
        assert done[0].report["labeled"] == 5
    else:
        assert not target.names("committed")
    assert label("--threshold", str(settings_of(target)["threshold"])).code == 0


def test_labels_go_where_nothing_else_is(images, label, target):
    target.write("photo.png", b"")
    refused = label()
    assert refused.code == 2
    assert "holds something else; choose another --out" in refused.told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--overwrite",), "--overwrite is for a run on one machine and not for --ray"),
        (("--link",), "--link is for a run on one machine"),
        (("--yolo",), "use --coco"),
        (("--relabel-changed",), "--relabel-changed is for a run on one machine"),
        (("--device", "cuda:1"), "Ray gives each worker a device, and --device 'cuda:1' names one"),
        (("--devices", "cpu,cpu"), "--devices is for a run on one machine"),
        (("--every", "2"), "--every is for a run on one machine"),
        (("--retry-failed",), "is not done; go on without --retry-failed"),
    ],
)
def test_options_that_make_no_sense_are_refused(images, label, serial, options, told):
    refused = label(*options)
    assert refused.code == 2
    assert told in refused.told
    assert not serial.labeled


@pytest.mark.parametrize("option", ["--shard-size", "--workers", "--worker-cores"])
def test_options_of_a_cluster_need_one(option, tmp_path, capsys):
    from serve.cli.main import main

    with pytest.raises(SystemExit):
        main(["label", str(tmp_path), "--out", str(tmp_path / "out"), option, "2"])
    assert f"{option} is for a run on a Ray cluster; add --ray ADDRESS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("ray://head:10001", "named by local, auto or HOST:PORT of its head, and 'ray://head"),
        ("somewhere", "named by local, auto or HOST:PORT"),
        ("127.0.0.1:1", "No Ray cluster answers at '127.0.0.1:1'"),
    ],
)
def test_an_address_where_no_cluster_is_is_refused(address, told):
    with pytest.raises(RequestError, match=told), connected(address):
        pass


def test_without_the_extra_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=r"pip install 'serve-florence-2\[ray\]'"):
        connected("local").__enter__()

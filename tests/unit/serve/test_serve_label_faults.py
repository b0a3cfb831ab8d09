"""Faults and refusals of a labeling run: one sentence, and what was done stays."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from label_fakes import color_in, color_of, dataset_of, one_box, paint, read_project, result
from PIL import Image

from florence2.engine.ask import Ask
from florence2.errors import CheckpointError, DeviceError, DeviceLostError, RequestError
from florence2.records import Failure
from serve.labeling.files import opened_workspace
from serve.labeling.journal import JOURNAL_NAME, Entry, open_journal
from serve.labeling.progress import stop_on_signals
from serve.limits import FailureLimit, TooManyFailuresError


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(
            lambda out: (out / "project/ds0/ann/2.png.json").write_text(""), id="cut to nothing"
        ),
        pytest.param(
            lambda out: (out / "project/ds0/ann/2.png.json").unlink(), id="annotation gone"
        ),
        pytest.param(lambda out: (out / "project/ds0/img/2.png").unlink(), id="image gone"),
        pytest.param(
            lambda out: (dataset_of(out) / "img/2.png").write_bytes(b""), id="image empty"
        ),
        pytest.param(lambda out: cut(dataset_of(out) / "img/2.png"), id="image cut"),
        pytest.param(lambda out: zero(dataset_of(out) / "img/2.png"), id="image of zeros"),
        pytest.param(lambda out: cut(dataset_of(out) / "ann/2.png.json"), id="annotation cut"),
        pytest.param(
            lambda out: zero(dataset_of(out) / "ann/2.png.json"), id="annotation of zeros"
        ),
    ],
)
def test_what_a_crash_of_the_machine_took_is_labeled_again_and_said(
    label, images, model, harm, report_of, capsys
):
    out = label(images).out
    harm(out)
    model.asked.clear()
    label(images, "--retry-failed")
    assert "gone or damaged; they count as not labeled: 2.png" in capsys.readouterr().err
    for _ in range(2):
        assert label(images).code == 0
        assert report_of(out)["labeled"] == 5
    assert model.asked == [color_of(2)]
    assert len(read_project(out)[0]) == 5


def cut(path):
    path.write_bytes(path.read_bytes()[:20])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def test_an_image_that_a_person_turned_in_the_project_is_theirs(label, images, model):
    out = label(images).out
    turned = Image.open(dataset_of(out) / "img/2.png").rotate(90, expand=True)
    turned.save(dataset_of(out) / "img/2.png")
    model.asked.clear()
    assert label(images).code == 0
    assert model.asked == []
    assert Image.open(dataset_of(out) / "img/2.png").size == turned.size


@pytest.mark.parametrize("link", [[], ["--link"]])
def test_an_earlier_versions_journal_still_counts(label, images, model, link, report_of):
    out = label(images, *link).out
    journal = out / "journal.jsonl"
    header, *lines = journal.read_text().splitlines()
    old = [{key: json.loads(line)[key] for key in ("image", "name", "state", "objects")}
           for line in lines]  # fmt: skip
    journal.write_text("\n".join([header, *map(json.dumps, old)]) + "\n")
    model.asked.clear()
    assert label(images, *link).code == 0
    assert model.asked == []
    assert report_of(out)["changed"] == []


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks Linux what a file is")
@pytest.mark.parametrize("link", [[], ["--link"]])
def test_files_are_on_the_disk_before_the_journal_counts_them(label, images, monkeypatch, link):
    synced: set[str] = set()
    fsync = os.fsync

    def watched(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith("journal.jsonl"):
            for line in Path(path).read_text().splitlines()[1:]:
                name = json.loads(line)["name"]
                dataset = dataset_of(Path(path).parent)
                needed = [dataset / "ann" / f"{name}.json", dataset / "ann", dataset / "img",
                          dataset, dataset.parent, dataset.parent / "meta.json"]  # fmt: skip
                # Of a linked image only the name is new.
                needed += [] if link else [dataset / "img" / name]
                assert {str(one) for one in needed} <= synced
        synced.add(path)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    assert label(images, "--batch", "2", *link).code == 0
    assert any(path.endswith("journal.jsonl") for path in synced)


def test_a_disk_that_does_not_take_the_files_keeps_them_out_of_the_journal(
    label, images, monkeypatch, journal_of, capsys
):
    fsync, calls = os.fsync, []

    def failing(descriptor):
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        done = label(images, "--batch", "1")
    assert "Input/output error" in capsys.readouterr().err
    counted = len(journal_of(done.out))
    assert counted < 5
    assert label(images, "--batch", "1").code == 0
    assert len(journal_of(done.out)) == 5


def test_a_report_that_cannot_be_written_is_one_sentence(label, images, monkeypatch, capsys):
    import serve.labeling.run as session

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(session, "write_report", full)
        assert label(images).code == 2
    err = capsys.readouterr().err
    assert "The labels are safe, and the report could not be written" in err
    assert "No space left on device" in err
    assert "Traceback" not in err


class Closed:
    """A pipe that nobody reads any more, or a terminal that is gone."""

    encoding = "utf-8"

    def __init__(self, error: OSError) -> None:
        self._error = error

    def write(self, _: str) -> int:
        raise self._error

    def flush(self) -> None:
        raise self._error

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise OSError(9, "Bad file descriptor")


@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error"),
     OSError(28, "No space left on device")],
    ids=["pipe", "terminal", "full disk"],
)  # fmt: skip
def test_a_run_that_nobody_listens_to_is_finished(label, images, monkeypatch, report_of, error):
    monkeypatch.setattr(sys, "stderr", Closed(error))
    monkeypatch.setattr(sys, "stdout", Closed(error))
    done = label(images, "--coco", "--batch", "1")
    assert done.code == 0
    assert report_of(done.out)["labeled"] == 5
    assert (done.out / "coco").is_dir()


def test_a_run_without_any_stderr_is_finished(label, images, monkeypatch, report_of):
    monkeypatch.setattr(sys, "stderr", None)
    assert report_of(label(images).out)["labeled"] == 5


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_run_after_its_batch_with_a_report(label, images, model, report_of, name):
    def answer(ask: Ask):
        if color_in(ask) == color_of(2):
            signal.raise_signal(getattr(signal, name))
        return one_box(ask)

    model.answer = answer
    # Under nohup a hangup is ignored, and stays so.
    before = signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        done = label(images, "--batch", "1")
    finally:
        signal.signal(getattr(signal, name), before)
    assert done.code == 130
    report = report_of(done.out)
    assert (report["labeled"], report["pending"]) == (3, 2)


def test_a_closed_terminal_does_not_stop_what_was_started_to_outlive_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop, stop.after_batch():
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("tail", [b'{"image": "4.p', b"\xff\xfe", b'{"image": 1}\n', b"[]\n"])
def test_a_torn_journal_line_costs_one_image_at_most(label, images, model, tail, journal_of):
    out = label(images).out
    journal = out / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + tail)
    model.asked.clear()
    assert label(images).code == 0
    assert model.asked == [color_of(4)]
    model.asked.clear()
    assert label(images).code == 0
    assert model.asked == []


def test_a_second_run_into_the_folder_in_use_is_refused(label, images, tmp_path, model, capsys):
    with opened_workspace(tmp_path / "out"):
        assert label(images).code == 2
    assert "in use by another" in capsys.readouterr().err
    assert model.asked == []
    assert label(images).code == 0


def test_an_engine_that_gives_up_keeps_what_was_labeled(label, images, model, report_of, capsys):
    def answer(ask: Ask):
        if color_in(ask) == color_of(3):
            raise DeviceError("The device went away; choose another with --device.")
        return one_box(ask)

    model.answer = answer
    done = label(images, "--batch", "1")
    assert done.code == 1
    report = report_of(done.out)
    assert (report["labeled"], report["pending"]) == (3, 2)
    assert "The device went away" in report["this_run"]["error"]
    assert "The device went away" in capsys.readouterr().err
    model.answer = one_box
    assert label(images, "--batch", "1").code == 0


def test_a_request_no_image_can_answer_ends_the_run_before_it_begins(label, images, model, capsys):
    model.answer = lambda ask: Failure("bad_request", "The prompt has 700 tokens of at most 400.")
    done = label(images, "--prompt", "dog")
    assert done.code == 2
    assert "700 tokens" in capsys.readouterr().err
    model.answer = one_box
    assert label(images, "--prompt", "cat").code == 0, "nothing was labeled, so nothing is refused"


def test_a_prompt_that_no_image_can_answer_beside_one_that_each_can_fails_them_all(
    label, images, model, report_of
):
    def answer(ask: Ask):
        return Failure("bad_request", "Too long.") if ask.text == "dog" else one_box(ask)

    model.answer = answer
    done = label(images, "--prompt", "cat. dog")
    assert done.code == 2
    assert report_of(done.out)["failed_by_code"] == {"bad_request": 5}


def test_a_model_that_does_not_load_leaves_the_folder_free(label, images, model, monkeypatch):
    def refuse(*_):
        raise CheckpointError("Unknown checkpoint 'demmo'.")

    with monkeypatch.context() as patched:
        patched.setattr("serve.cli.loading.load_model", refuse)
        assert label(images, "--model", "demmo").code == 2
    assert label(images, "--model", "demo").code == 0


def test_a_full_disk_is_one_sentence_and_the_run_can_go_on(
    label, images, monkeypatch, report_of, capsys
):
    from serve.labeling.project import GrowingProject

    add = GrowingProject.add

    def full(self, file, *labels):
        if file.name == "2.png":
            raise OSError(28, "No space left on device")
        return add(self, file, *labels)

    with monkeypatch.context() as patched:
        patched.setattr(GrowingProject, "add", full)
        done = label(images, "--batch", "1")
    assert done.code == 1
    assert "No space left on device" in capsys.readouterr().err
    assert label(images, "--batch", "1").code == 0
    assert report_of(done.out)["labeled"] == 5


def test_a_device_that_fails_ends_the_run_and_the_next_one_goes_on(
    label, images, model, report_of, capsys
):
    answer = model.run_many

    def run_many(requests):
        if len(model.asked) == 2:
            raise DeviceLostError("The device cuda failed (CUDA error).")
        return answer(requests)

    model.run_many = run_many
    done = label(images, "--batch", "2")
    assert done.code == 1
    assert "The device cuda failed" in capsys.readouterr().err
    report = report_of(done.out)
    assert (report["labeled"], report["failed"], report["pending"]) == (2, 0, 3)
    model.run_many = answer
    assert label(images, "--batch", "2").code == 0
    assert report_of(done.out)["labeled"] == 5


def test_a_run_of_which_more_fails_than_may_ends_and_goes_on_where_more_may(
    label, images, report_of, capsys
):
    for name in ("1.png", "2.png"):
        (images / name).write_bytes(b"no image")
    done = label(images, "--batch", "1", "--max-failures", "1")
    assert done.code == 1
    assert "2 of 3 images failed, and 1 may" in " ".join(capsys.readouterr().err.split())
    report = report_of(done.out)
    assert (report["labeled"], report["failed"], report["pending"]) == (1, 2, 2)
    label(images, "--batch", "1", "--max-failures", "50%")
    report = report_of(done.out)
    assert (report["labeled"], report["failed"], report["pending"]) == (3, 2, 0)


@pytest.mark.parametrize(
    ("given", "failed", "tried", "may_go_on"),
    [
        (None, 100, 100, True),
        ("3", 3, 3, True),
        (3, 4, 1000, False),
        ("0", 1, 1, False),
        ("5%", 10, 19, True),
        ("5%", 2, 20, False),
        (" 5 % ", 1, 20, True),
        ("0.5%", 5, 1000, True),
        ("0%", 1, 20, False),
    ],
)
def test_so_many_may_fail(given, failed, tried, may_go_on):
    limit = FailureLimit.parse(given)
    if may_go_on:
        limit.check(failed, tried)
    else:
        with pytest.raises(TooManyFailuresError, match=f"{failed} of {tried}"):
            limit.check(failed, tried)


@pytest.mark.parametrize("given", ["", "many", "-1", "5.5", "101%", "nan%", "%", True, 2.5, [3]])
def test_what_says_not_how_many_may_fail_is_refused(given):
    with pytest.raises(RequestError, match="such as 5%"):
        FailureLimit.parse(given)


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("missing", "does not exist"),
        ("empty", "holds none."),
        ("only below", "holds none; add --recursive"),
        ("both ways", "give one of them"),
        ("text file", "ends in one of"),
        ("same folder", "two folders"),
        ("out is a file", "must be writable"),
        ("out holds other work", "begins in an empty folder"),
        ("out holds another journal", "begins with its settings"),
    ],
)
def test_bad_folders_get_one_sentence(case, sentence, label, images, tmp_path, capsys, model):
    source, out = images, tmp_path / "out"
    if case == "missing":
        source = tmp_path / "nowhere"
    elif case == "empty":
        source = tmp_path / "empty"
        source.mkdir()
    elif case == "text file":
        source = tmp_path / "notes.txt"
        source.write_text("hello")
    elif case == "same folder":
        out = images
    elif case in ("both ways", "only below"):
        pass
    elif case == "out is a file":
        out.write_text("hello")
        out = out / "below"
    else:
        out.mkdir()
        name = "journal.jsonl" if "journal" in case else "thesis.doc"
        (out / name).write_text("hello\n")
    if case == "only below":
        source = paint(tmp_path / "above" / "below" / "1.png", 1).parents[1]
    options = ["--overwrite", "--retry-failed"] if case == "both ways" else []
    done = label(source, *options, out=out)
    assert done.code == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert model.asked == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_gets_one_sentence(label, images, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert label(images, out=tmp_path / "locked" / "out").code == 2
    assert "must be writable" in capsys.readouterr().err


@pytest.mark.parametrize("batch", ["1", "8"])
def test_a_region_beyond_one_image_fails_that_image_only(label, tmp_path, model, report_of, batch):
    folder = tmp_path / "mixed"
    paint(folder / "a.png", 1, size=(100, 80))
    paint(folder / "b.png", 2, size=(640, 480))
    model.answer = lambda ask: result(ask.task, text="cat", size=ask.image.size_wh)
    done = label(
        folder, "--task", "region_category", "--region", "200,200,400,400", "--batch", batch
    )
    assert done.code == 1
    report = report_of(done.out)
    assert (report["labeled"], report["failed_by_code"]) == (1, {"bad_request": 1})
    assert model.asked == [color_of(2)]


def test_notes_on_answers_are_counted_by_image(label, images, model, report_of, capsys):
    def answer(ask: Ask):
        notes = ("boxes without area: 3", "cut: 1") if color_in(ask) == color_of(3) else ("cut: 2",)
        return result(ask.task, size=ask.image.size_wh, notes=notes)

    model.answer = answer
    done = label(images)
    assert report_of(done.out)["notes"] == {"cut": 5, "boxes without area": 1}
    assert "Dropped or repaired parts of answers: 5 images" in capsys.readouterr().err
    assert report_of(label(images).out)["notes"] == {"cut": 5, "boxes without area": 1}


def test_a_model_that_breaks_midway_leaves_a_report(label, images, model, report_of, capsys):
    def answer(ask: Ask):
        if color_in(ask) == color_of(3):
            raise RuntimeError("out of memory")
        return one_box(ask)

    model.answer = answer
    done = label(images, "--batch", "1")
    assert done.code == 1
    assert report_of(done.out)["labeled"] == 3
    assert "RuntimeError: out of memory" in capsys.readouterr().err


def test_a_signal_while_nothing_is_labeled_stops_at_once():
    from serve.labeling.progress import StopSwitch

    switch = StopSwitch()
    with pytest.raises(KeyboardInterrupt):
        switch.pull(2, None)
    with switch.after_batch():
        switch.pull(2, None)
        assert switch()


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of files")
def test_a_disk_that_is_full_at_the_journal_counts_nothing_and_hides_no_report(tmp_path):
    import resource

    with opened_workspace(tmp_path) as workspace:
        journal = open_journal(workspace, {}, lambda *_: True)
        path = tmp_path / JOURNAL_NAME
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                journal.append([Entry("a.png", "a.png", "labeled", 1)])
            journal.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert journal.totals.images == 0
        again = open_journal(workspace, {}, lambda *_: True)
        again.append([Entry("a.png", "a.png", "labeled", 1)])
        again.close()
    assert [json.loads(line).get("image") for line in path.read_text().splitlines()] == [
        None, "a.png",
    ]  # fmt: skip

"""Faults and refusals of a labeling run: one sentence, and what was done stays."""

from __future__ import annotations

import os

import pytest
from label_fakes import color_in, color_of, one_box, paint, read_project, result

from florence2.ask import Ask
from florence2.errors import CheckpointError, DeviceError
from florence2.records import Failure
from serve.labeling.files import opened_workspace


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda out: (out / "ds0/ann/2.png.json").write_text(""), id="cut to nothing"),
        pytest.param(lambda out: (out / "ds0/ann/2.png.json").unlink(), id="annotation gone"),
        pytest.param(lambda out: (out / "ds0/img/2.png").unlink(), id="image gone"),
    ],
)
def test_what_a_crash_of_the_machine_took_is_labeled_again(label, images, model, harm, report_of):
    out = label(images).out
    harm(out)
    model.asked.clear()
    for _ in range(2):
        assert label(images).code == 0
        assert report_of(out)["labeled"] == 5
    assert model.asked == [color_of(2)]
    assert len(read_project(out)[0]) == 5


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


def test_a_model_that_does_not_load_leaves_the_folder_free(label, images, model, monkeypatch):
    import serve.commands.label as command

    def refuse(*_):
        raise CheckpointError("Unknown checkpoint 'demmo'.")

    with monkeypatch.context() as patched:
        patched.setattr(command, "load_model", refuse)
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

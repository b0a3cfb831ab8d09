"""Settings that differ, overwriting, corrections by people: nothing of theirs is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from adapter_tools import DEMO, pair, write_adapter
from label_fakes import files_below, paint, read_project

from florence2.checkpoint.files import CheckpointFiles
from florence2.errors import DeviceError
from florence2.records import Failure


@pytest.mark.parametrize(
    "options",
    [["--threshold", "0.5"], ["--prompt", "dog"], ["--task", "ocr"], ["--model", "demo"],
     ["--recursive"], ["--num-beams", "1"]],
)  # fmt: skip
def test_other_settings_into_the_same_folder_are_refused(label, images, model, options, capsys):
    out = label(images).out
    before, asked = files_below(out), len(model.asked)
    done = label(images, *options)
    assert done.code == 2
    assert "One folder holds one kind of labels" in capsys.readouterr().err
    assert files_below(out) == before
    assert len(model.asked) == asked


def test_another_images_folder_into_the_same_out_is_refused(label, images, tmp_path, capsys):
    label(images)
    paint(tmp_path / "others" / "0.png", 9)
    assert label(tmp_path / "others").code == 2
    assert "images" in capsys.readouterr().err


def test_overwrite_sets_the_old_labels_aside(label, images, model):
    out = label(images).out
    old = (out / "journal.jsonl").read_bytes()
    done = label(images, "--threshold", "0.5", "--overwrite")
    assert done.code == 0
    assert len(read_project(out)[0]) == 5
    assert (out.with_name("out.old-1") / "journal.jsonl").read_bytes() == old
    assert len(read_project(out.with_name("out.old-1"))[0]) == 5
    assert label(images, "--overwrite").code == 0
    assert out.with_name("out.old-2").exists()


def test_what_a_person_corrected_is_never_written_over(label, images):
    out = label(images).out
    annotation = out / "project/ds0/ann/2.png.json"
    corrected = json.loads(annotation.read_text())
    corrected["objects"] = []
    annotation.write_text(json.dumps(corrected))
    paint(images / "new.png", 77)
    label(images)
    assert json.loads(annotation.read_text())["objects"] == []


def test_debug_adds_the_traceback(label, tmp_path, capsys):
    assert label(tmp_path / "nowhere", "--debug").code == 2
    assert "Traceback" in capsys.readouterr().err


def test_overwrite_moves_nothing_when_the_model_does_not_load(label, images, monkeypatch, capsys):
    def refuse(*_):
        raise DeviceError("There is no device cuda:9.")

    out = label(images).out
    before = files_below(out)
    monkeypatch.setattr("serve.cli.loading.load_model", refuse)
    assert label(images, "--overwrite").code == 2
    assert files_below(out) == before
    assert not out.with_name("out.old-1").exists()


def test_overwrite_puts_the_labels_back_when_no_image_can_be_asked(label, images, model):
    out = label(images).out
    before = files_below(out)
    model.answer = lambda ask: Failure("bad_request", "The prompt has 700 tokens of at most 400.")
    assert label(images, "--overwrite").code == 2
    after = files_below(out)
    assert {path: after[path] for path in before} == before
    assert not out.with_name("out.old-1").exists()


def test_overwrite_of_the_folder_one_stands_in(label, images, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert label(images, out=Path(".")).code == 0
    assert label(images, "--overwrite", out=Path(".")).code == 0
    assert (tmp_path / "here.old-1" / "journal.jsonl").exists()
    assert len(read_project(tmp_path / "here")[0]) == 5


def test_a_stopped_retry_goes_on_with_all_images(label, images, model, report_of):
    model.answer = lambda ask: Failure("too_slow", "The answer took too long.")
    label(images)
    paint(images / "new.png", 77)
    done = label(images, "--retry-failed")
    report = report_of(done.out)
    assert report["pending"] == 1
    assert "--retry-failed" not in report["resume_command"]
    assert report["retry_command"].count("--retry-failed") == 1


def test_a_correction_that_the_journal_does_not_know_is_kept_aside(label, images, model):
    """After a kill between writing the files and the journal's line."""
    out = label(images).out
    journal = out / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-2]))
    annotation = out / "project/ds0/ann/4.png.json"
    corrected = json.loads(annotation.read_text()) | {"description": "mine"}
    annotation.write_text(json.dumps(corrected))
    assert label(images).code == 0
    assert json.loads(annotation.read_text())["description"] == ""
    (kept,) = (out / "edited").iterdir()
    assert json.loads(kept.read_text()) == corrected


def test_a_replaced_checkpoint_is_refused_and_an_older_journal_is_not(
    label, images, monkeypatch, capsys
):
    import serve.cli.label as command

    monkeypatch.setattr(command, "fingerprint", lambda _: None)
    label(images)
    monkeypatch.setattr(command, "fingerprint", lambda _: "first")
    out = label(images).out
    assert label(images, "--overwrite").code == 0
    assert label(images).code == 0
    monkeypatch.setattr(command, "fingerprint", lambda _: "second")
    capsys.readouterr()
    assert label(images).code == 2
    assert 'checkpoint "first", not "second"' in capsys.readouterr().err
    assert out.exists()


def test_a_fingerprint_changes_with_the_weights(tmp_path, monkeypatch):
    import serve.cli.loading as loading

    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(5000))
    first = loading.weights_hash(file)
    file.write_bytes(bytes(4999) + b"x")
    assert loading.weights_hash(file) != first
    monkeypatch.setattr(loading, "WHOLE_BYTES", 100)
    monkeypatch.setattr(loading, "BLOCK_BYTES", 10)
    large = loading.weights_hash(file)
    file.write_bytes(bytes(5000))
    assert loading.weights_hash(file) != large


@pytest.mark.parametrize(
    "names",
    [
        ["model.fp16.safetensors"],
        ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin",
         "pytorch_model-00002-of-00002.bin"],
    ],
)  # fmt: skip
def test_a_fingerprint_is_of_whichever_files_hold_the_weights(tmp_path, monkeypatch, names):
    import serve.cli.loading as loading

    for name in names:
        (tmp_path / name).write_bytes(bytes(50))
    found = CheckpointFiles("mine", tmp_path, None, ("config.json", *names), "folder")
    monkeypatch.setattr("florence2.checkpoint.catalog.resolve", lambda *_, **__: found)
    first = loading.fingerprint("mine")
    assert first is not None
    (tmp_path / names[-1]).write_bytes(bytes(49) + b"x")
    assert loading.fingerprint("mine") not in (first, None)


def test_a_fingerprint_of_an_adapter_is_its_own_its_configs_and_its_bases(tmp_path):
    import serve.cli.loading as loading

    other = shutil.copytree(DEMO, tmp_path / "other")
    weights = other / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    kinds = {
        "one": write_adapter(tmp_path / "one"),
        "the same elsewhere": write_adapter(tmp_path / "copy"),
        "other weights": write_adapter(tmp_path / "weights", pair(seed=1)),
        "another alpha": write_adapter(tmp_path / "alpha", lora_alpha=9),
        "another base": write_adapter(tmp_path / "based", base=str(other)),
    }
    prints = {name: loading.fingerprint(str(folder)) for name, folder in kinds.items()}
    assert prints.pop("the same elsewhere") == prints["one"]
    assert len(set(prints.values()) - {None}) == len(prints)


def test_precision_reaches_the_model(label, images, monkeypatch):
    import serve.cli.loading as loading

    seen = []
    load = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *given: seen.append(given) or load(*given))
    label(images, "--precision", "fp32")
    assert seen == [("Florence-2-large", "auto", "auto", "fp32")]

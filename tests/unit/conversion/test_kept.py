"""Conversions that are made at first use, kept, and made anew; the choice of the faster runtime."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys

import pytest
import torch
from openvino_tools import write_small_checkpoint

import florence2.conversion.kept
from florence2 import Florence2
from florence2.checkpoint.checkpoint import open_checkpoint
from florence2.checkpoint.converted import read_converted
from florence2.checkpoint.files import CONVERTED_NAME
from florence2.conversion.kept import FOLDER, Conversions, check_choice
from florence2.engine import loading
from florence2.engine.checks import probe_picture
from florence2.engine.loading import MEASURED_FROM_D_MODEL, chosen_runtime
from florence2.errors import CheckpointError, DeviceError

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def told():
    return list[str]()


@pytest.fixture
def kept(tmp_path, told):
    return Conversions(tmp_path / "cache", progress=told.append)


@pytest.fixture
def own(small_folder, tmp_path):
    """A copy of the small checkpoint whose weights may be changed."""
    return shutil.copytree(small_folder, tmp_path / "own")


@pytest.fixture
def fill(whole):
    """Puts the conversion that is there already in a place, as if it had been made there."""

    def fill(folder):
        shutil.copytree(whole, folder)
        return folder

    return fill


@pytest.fixture
def conversions(monkeypatch, fill):
    """Counts conversions, which are copies of the one that is there already."""
    made: list[str] = []

    def convert(checkpoint, precision, folder, **_):
        made.append(precision)
        shutil.rmtree(folder, ignore_errors=True)
        fill(folder)

    monkeypatch.setattr(florence2.conversion.kept, "convert", convert)
    return made


def test_a_checkpoint_is_converted_once_and_used_from_then_on(small, kept, told, tmp_path):
    folder = kept.folder_for(small, "fp32")
    assert read_converted(folder).precision == "fp32"
    assert (tmp_path / "cache" / FOLDER) in folder.parents
    assert sum("once" in line for line in told) == 1
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    told.clear()
    assert kept.folder_for(small, "fp32") == folder
    assert told == []
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_loading_converts_and_answers_as_torch_does(small_folder, tmp_path):
    found = {
        runtime: Florence2.load(
            small_folder, "cpu", runtime, precision="fp32", cache_dir=tmp_path / "cache"
        )
        for runtime in ("openvino", "torch")
    }
    assert [model.runtime for model in found.values()] == list(found)
    answers = [
        model.run("<OD>", probe_picture(), max_new_tokens=20).token_ids for model in found.values()
    ]
    assert answers[0] == answers[1] != ()


def made_by_another_version(folder):
    manifest = folder / CONVERTED_NAME
    content = json.loads(manifest.read_text())
    content["versions"]["openvino"] = "2024.1.0"
    manifest.write_text(json.dumps(content))


DAMAGES = {
    "another version of the library made it": made_by_another_version,
    "a file is cut": lambda folder: (folder / "vision.bin").write_bytes(b"cut"),
    "a file is gone": lambda folder: (folder / "decoder.xml").unlink(),
    "the manifest is damaged": lambda folder: (folder / CONVERTED_NAME).write_text("{"),
    "the manifest is gone": lambda folder: (folder / CONVERTED_NAME).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_was_damaged_since_is_made_anew(small, kept, told, damage, conversions):
    folder = kept.folder_for(small, "fp32")
    damage(folder)
    assert kept.folder_for(small, "fp32") == folder
    read_converted(folder)
    assert conversions == ["fp32"] * 2


def test_a_folder_without_its_manifest_does_not_stay_in_the_way(small, kept, fill, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            florence2.conversion.kept, "convert", lambda _, __, folder, **___: fill(folder)
        )
        folder = kept.folder_for(small, "fp32")
    (folder / CONVERTED_NAME).unlink()
    assert kept.folder_for(small, "fp32") == folder
    read_converted(folder)


def test_other_weights_under_the_same_name_are_converted_too(own, kept, conversions):
    first = kept.folder_for(open_checkpoint(own), "fp32")
    other = write_small_checkpoint(own.parent / "other", seed=2)
    shutil.copy(other / "model.safetensors", own)
    second = kept.folder_for(open_checkpoint(own), "fp32")
    assert first != second
    assert conversions == ["fp32"] * 2
    # A copy elsewhere is the same checkpoint.
    copied = shutil.copytree(own, own.parent / "more" / "own")
    assert kept.folder_for(open_checkpoint(copied), "fp32") == second
    assert len(conversions) == 2


def test_each_precision_is_kept_for_itself(small, kept, conversions):
    folders = {kept.folder_for(small, precision) for precision in ("fp32", "bf16", "fp32")}
    assert len(folders) == 2
    assert conversions == ["fp32", "bf16"]


def test_what_a_killed_process_left_is_cleared_away(small, kept, conversions):
    folder = kept.folder_for(small, "fp32")
    shutil.rmtree(folder)
    left = folder.parent / ".fp32.abc.part"
    left.mkdir()
    (left / "vision.bin").write_bytes(b"half of it")
    kept.folder_for(small, "fp32")
    assert not left.exists()


def test_two_processes_at_once_convert_once(small_folder, tmp_path):
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from florence2.checkpoint.checkpoint import open_checkpoint\n"
        "from florence2.checkpoint.converted import read_converted\n"
        "from florence2.conversion.kept import Conversions\n"
        "child = os.fork()\n"
        "kept = Conversions(Path(sys.argv[2]), progress=lambda said: print(said, flush=True))\n"
        "read_converted(kept.folder_for(open_checkpoint(sys.argv[1]), 'fp32'))\n"
        "print('done', flush=True)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0)\n"
    )
    command = [sys.executable, "-c", script, str(small_folder), str(tmp_path / "cache")]
    both = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert both.stdout.count("done") == 2
    assert both.stdout.count("for OpenVINO, once") == 1


def test_a_cache_that_cannot_be_written_to_is_told_in_a_sentence(small, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CheckpointError, match=r"cannot be kept in .*FLORENCE2_CACHE\)\.$"):
        Conversions(tmp_path / "cache").folder_for(small, "fp32")


def test_images_to_calibrate_on_are_asked_for_when_they_are_needed(small, tmp_path, monkeypatch):
    asked: list[object] = []
    given: list[tuple[object, object]] = []

    def convert(*_, calibration, calibration_source, **__):
        given.append((calibration, calibration_source))

    def calibration():
        asked.append(None)
        return ["images"], "a folder"

    monkeypatch.setattr(florence2.conversion.kept, "convert", convert)
    kept = Conversions(tmp_path / "cache", calibration)
    for precision in ("fp32", "bf16", "int8"):
        kept.folder_for(small, precision)
    assert given == [((), ""), ((), ""), (["images"], "a folder")]
    assert len(asked) == 1


# Which of the runtimes is the faster one.


class Stopwatch:
    """Says how long an answer takes, and counts how often it was asked."""

    def __init__(self, torch_s, openvino_s):
        self.torch_s, self.openvino_s = torch_s, openvino_s
        self.measured: list[tuple[str, str]] = []

    def __call__(self, precision, folder):
        self.measured.append((precision, "torch" if folder is None else folder.name))
        return self.torch_s if folder is None else self.openvino_s


FASTER = {
    "openvino": (2.0, 1.0, "openvino"),
    "torch": (1.0, 2.0, "torch"),
    "neither": (1.0, 1.0, "torch"),
}


@pytest.mark.parametrize(("torch_s", "openvino_s", "expected"), FASTER.values(), ids=FASTER)
def test_the_faster_runtime_is_measured_once_and_kept(
    small, kept, conversions, caplog, torch_s, openvino_s, expected
):
    watch = Stopwatch(torch_s, openvino_s)
    with caplog.at_level(logging.INFO):
        assert kept.faster_runtime(small, "fp32", watch) == expected
    assert f"{torch_s:.2f} s with torch and {openvino_s:.2f} s with openvino" in caplog.text
    assert watch.measured == [("fp32", "torch"), ("fp32", "fp32")]
    # By another program too.
    again = Conversions(kept.cache_dir)
    assert again.faster_runtime(small, "fp32", watch) == expected
    assert len(watch.measured) == 2


def test_precisions_are_measured_apart(small, kept, conversions):
    assert kept.faster_runtime(small, "fp32", Stopwatch(2.0, 1.0)) == "openvino"
    assert kept.faster_runtime(small, "bf16", Stopwatch(1.0, 2.0)) == "torch"
    watch = Stopwatch(0.0, 0.0)
    assert kept.faster_runtime(small, "fp32", watch) == "openvino"
    assert watch.measured == []


def other_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)


def other_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "99.0")


MACHINES = {"threads": other_threads, "torch": other_torch}


@pytest.mark.parametrize("move", MACHINES.values(), ids=MACHINES)
def test_it_is_measured_anew_elsewhere(small, kept, conversions, monkeypatch, move):
    assert kept.faster_runtime(small, "fp32", Stopwatch(2.0, 1.0)) == "openvino"
    move(monkeypatch)
    watch = Stopwatch(1.0, 2.0)
    assert kept.faster_runtime(small, "fp32", watch) == "torch"
    assert len(watch.measured) == 2


def test_a_measure_is_kept_where_it_can_be_read(small, kept, conversions):
    kept.faster_runtime(small, "fp32", Stopwatch(2.0, 1.0))
    [path] = kept.cache_dir.rglob("runtime.json")
    content = json.loads(path.read_text())
    assert content["fp32"] == {"torch": 2.0, "openvino": 1.0}
    assert set(content["machine"]) == {"cpu", "threads", "torch", "openvino"}


def test_a_measure_that_cannot_be_read_is_made_anew(small, kept, conversions):
    kept.faster_runtime(small, "fp32", Stopwatch(2.0, 1.0))
    [path] = kept.cache_dir.rglob("runtime.json")
    for content in ("{", "[]", json.dumps({"machine": json.loads(path.read_text())["machine"]})):
        path.write_text(content)
        assert kept.faster_runtime(small, "fp32", Stopwatch(1.0, 2.0)) == "torch"


def test_a_measure_that_cannot_be_kept_is_used_all_the_same(small, kept, conversions, caplog):
    (kept.folder_for(small, "fp32").parent / "runtime.json").mkdir()
    with caplog.at_level(logging.WARNING):
        assert kept.faster_runtime(small, "fp32", Stopwatch(2.0, 1.0)) == "openvino"
    assert "cannot be written" in caplog.text


class NeverAsked:
    """Conversions that must not be made, and a measure that must not be taken."""

    def faster_runtime(self, *_):
        raise AssertionError("nothing is to be measured")


class Measured:
    def __init__(self, found):
        self._found = found

    def faster_runtime(self, checkpoint, precision, answer_s):
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


CHOICES = {
    # name: (device, precision, runtime asked for, conversions, the runtime that is taken)
    "a small network is not worth measuring": (CPU, "auto", "auto", NeverAsked(), "torch"),
    "a GPU": (CUDA, "fp32", "auto", NeverAsked(), "torch"),
    "torch by name": (CPU, "auto", "torch", NeverAsked(), "torch"),
    "openvino by name": (CPU, "auto", "openvino", NeverAsked(), "openvino"),
    "int8 is openvino's": (CPU, "int8", "auto", NeverAsked(), "openvino"),
}


@pytest.mark.parametrize(
    ("device", "precision", "runtime", "conversions", "taken"), CHOICES.values(), ids=CHOICES
)
def test_what_is_settled_without_a_measure(small, device, precision, runtime, conversions, taken):
    assert small.config.text.d_model < MEASURED_FROM_D_MODEL
    assert chosen_runtime(small, device, precision, runtime, conversions) == taken


@pytest.mark.parametrize("found", ["torch", "openvino"])
def test_a_large_network_takes_the_faster_one(small, monkeypatch, found):
    monkeypatch.setattr(loading, "MEASURED_FROM_D_MODEL", 16)
    assert chosen_runtime(small, CPU, "fp32", "auto", Measured(found)) == found


def test_where_it_cannot_be_measured_torch_is_used_with_a_warning(small, monkeypatch, caplog):
    monkeypatch.setattr(loading, "MEASURED_FROM_D_MODEL", 16)
    failing = Measured(CheckpointError("There is no room."))
    with caplog.at_level(logging.WARNING):
        assert chosen_runtime(small, CPU, "fp32", "auto", failing) == "torch"
    assert caplog.messages == ["There is no room. The torch runtime is used."]


def test_a_large_network_is_measured_at_its_first_load(small_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "MEASURED_FROM_D_MODEL", 16)
    model = Florence2.load(small_folder, "cpu", precision="fp32", cache_dir=tmp_path)
    [path] = tmp_path.rglob("runtime.json")
    seconds = json.loads(path.read_text())["fp32"]
    assert min(seconds.values()) > 0
    assert model.runtime == min(seconds, key=seconds.get)


def test_without_openvino_auto_is_torch(small, monkeypatch):
    monkeypatch.setattr(loading, "MEASURED_FROM_D_MODEL", 16)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert chosen_runtime(small, CPU, "fp32", "auto", NeverAsked()) == "torch"


REFUSED = {
    # name: (runtime, device, precision, a part of the sentence)
    "a GPU": ("openvino", CUDA, "fp32", "runs on a CPU, and device 'cuda:0' was chosen"),
    "4 bits": ("openvino", CPU, "nf4", "'nf4' is of the torch runtime.*use precision 'int8'"),
}


@pytest.mark.parametrize(("runtime", "device", "precision", "said"), REFUSED.values(), ids=REFUSED)
def test_what_the_runtime_does_not_run_on_is_refused(runtime, device, precision, said):
    with pytest.raises(DeviceError, match=said) as caught:
        check_choice(runtime, device, precision)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", [{"runtime": "openvino"}, {"precision": "int8"}])
def test_without_openvino_a_load_says_what_to_install(small_folder, monkeypatch, asked):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DeviceError, match=r"needs the openvino package.*pip install openvino"):
        Florence2.load(small_folder, "cpu", **asked)


def test_a_runtime_that_does_not_exist_is_named_with_those_that_do(small_folder):
    with pytest.raises(DeviceError, match=r"onnx.*auto.*torch.*openvino"):
        Florence2.load(small_folder, "cpu", "onnx")

"""A conversion is whole or not there, says what it is, and is refused where it is not."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from xml.etree import ElementTree

import numpy as np
import openvino
import pytest
from openvino_tools import write_small_checkpoint
from safetensors import SafetensorError

import florence2.conversion.convert
import florence2.conversion.eight_bits
from florence2 import Florence2
from florence2.checkpoint.checkpoint import open_checkpoint
from florence2.checkpoint.converted import FORMAT, is_converted, read_converted
from florence2.checkpoint.files import CONVERTED_NAME
from florence2.conversion.convert import CALIBRATION_IMAGES, CONVERTED_PRECISIONS, convert
from florence2.engine.checks import probe_picture
from florence2.errors import CheckpointError, DeviceError, FlorenceError
from florence2.runtimes import openvino as runtime_module
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene

MODELS = {
    f"{name}.{ending}" for name in ("vision", "encoder", "decoder") for ending in ("xml", "bin")
}
PICTURES = [np.roll(probe_picture(), 7 * number, axis=1) for number in range(3)]


def is_one_sentence(error):
    text = str(error)
    return text.endswith((".", ".)")) and "\n" not in text and "Traceback" not in text


def left_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_manifest_says_what_was_made_from_what(small, whole):
    manifest = json.loads((whole / CONVERTED_NAME).read_text())
    assert manifest["format"] == FORMAT
    assert manifest["source"] == small.folder.name
    assert manifest["revision"] is None
    assert manifest["precision"] == "fp32"
    assert manifest["size_wh"] == [64, 64]
    assert manifest["versions"] == {"openvino": openvino.__version__}
    assert manifest["calibration"] is None
    assert set(manifest["error"]) == {"features", "logits"}
    assert 0 < max(manifest["error"].values()) < 1e-5
    assert len(manifest["source_sha256"]) == 64
    recorded = {entry["name"]: entry for entry in manifest["files"]}
    assert set(recorded) == set(left_in(whole)) - {CONVERTED_NAME}
    assert set(recorded) >= MODELS | {"embeddings.safetensors", "config.json", "tokenizer.json"}
    assert "model.safetensors" not in recorded
    for name, entry in recorded.items():
        assert (whole / name).stat().st_size == entry["size"]
        assert sha256(whole / name) == entry["sha256"]
    assert read_converted(whole).size_wh == small.image_processor.size_wh


@pytest.fixture(scope="module")
def again(small, tmp_path_factory):
    """Converted once more, into an empty folder."""
    out = tmp_path_factory.mktemp("made") / "before"
    out.mkdir()
    convert(small, "fp32", out)
    return out


def test_an_empty_folder_is_as_good_as_a_new_one(again):
    assert is_converted(again)
    assert left_in(again.parent) == ["before"]


def test_the_same_checkpoint_gives_the_same_networks(whole, again):
    weights = [name for name in left_in(whole) if not name.endswith((".xml", CONVERTED_NAME))]
    assert len(weights) > len(MODELS) / 2
    for name in weights:
        assert sha256(whole / name) == sha256(again / name), name
    first, second = read_converted(whole), read_converted(again)
    assert (first.source_sha256, first.error) == (second.source_sha256, second.error)


def test_other_weights_are_another_source(small, whole, tmp_path):
    other = open_checkpoint(write_small_checkpoint(tmp_path / "tiny", seed=2))
    found = convert(other, "fp32", tmp_path / "out")
    assert found.source == other.folder.name
    assert found.source_sha256 != read_converted(whole).source_sha256


# What weights take of float32's bytes, and the errors of a picture's features and logits.
PRECISIONS = {
    "fp16": (0.65, 3e-3),
    "bf16": (0.65, 2e-2),
}


def size_of_weights(folder):
    return sum(path.stat().st_size for path in folder.glob("*.bin"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_reduced_precision_is_smaller_and_measured(reduced, whole, precision):
    share, most = PRECISIONS[precision]
    out, found, told = reduced(precision)
    assert (found.precision, found.calibration) == (precision, None)
    assert 0 < found.error["features"] < most
    assert 0 < found.error["logits"] < most
    assert size_of_weights(out) < share * size_of_weights(whole)
    assert [line.split()[0] for line in told] == ["Reading", *["Converting"] * 3, "Measuring"]
    model = Florence2.load(out, "cpu")
    assert (model.runtime, model.precision, model.notes) == ("openvino", precision, ())
    assert model.run("<OD>", probe_picture(), max_new_tokens=8).token_ids


def test_weights_of_bf16_are_kept_as_they_are_stored(reduced):
    """Without the mark, the library makes float32 of them in memory."""
    out, *_ = reduced("bf16")
    paths = list(out.glob("*.xml"))
    assert len(paths) == len(MODELS) / 2
    for path in paths:
        tree = ElementTree.parse(path)
        layers = {layer.get("id"): layer for layer in tree.iterfind("layers/layer")}
        stored = {key for key, layer in layers.items() if is_bf16_weight(layer)}
        widened = [
            layers[edge.get("to-layer")]
            for edge in tree.iterfind("edges/edge")
            if edge.get("from-layer") in stored
        ]
        assert len(widened) >= len(stored) > 0
        marks = [layer.find("rt_info/attribute[@name='decompression']") for layer in widened]
        assert None not in marks


def is_bf16_weight(layer):
    data = layer.find("data")
    return layer.get("type") == "Const" and data.get("element_type") == "bf16"


def test_the_demo_in_int8_is_near_float32_and_says_what_is_known(demo_int8):
    found = read_converted(demo_int8)
    assert 1e-3 < found.error["features"] < 0.05
    assert 1e-4 < found.error["logits"] < 0.25
    assert set(found.versions) == {"openvino", "nncf"}
    assert found.calibration == "3 images (drawn scenes)"
    # Stored in half precision, 15 MB with the tables.
    assert size_of_weights(demo_int8) < 7_000_000
    model = Florence2.load(demo_int8, "cpu", "auto", precision="int8")
    assert (model.runtime, model.precision) == ("openvino", "int8")
    [note] = model.notes
    assert "calibrated on 3 images (drawn scenes)" in note
    assert f"{found.error['features']:.1%}" in note
    exact = Florence2.load("demo", "cpu", "torch", precision="fp32")
    names = [
        {box.label for box in one.run("<OD>", np.asarray(draw_scene(make_scene(0)))).objects}
        for one in (model, exact)
    ]
    assert names[0] == names[1] != set()


def test_no_more_images_are_looked_at_than_help(small, tmp_path, monkeypatch):
    looked_at: list[object] = []

    opened = florence2.conversion.convert.open_image

    def counting(picture):
        looked_at.append(picture)
        return opened(picture)

    def stop(*_):
        raise CheckpointError("Enough was seen.")

    monkeypatch.setattr(florence2.conversion.convert, "open_image", counting)
    monkeypatch.setattr(florence2.conversion.convert, "save_file", stop)
    pictures = [np.full((8, 8, 3), number, np.uint8) for number in range(3 * CALIBRATION_IMAGES)]
    with pytest.raises(CheckpointError, match="Enough was seen"):
        convert(small, "fp32", tmp_path / "out", calibration=pictures)
    # Evenly from all.
    assert [int(one[0, 0, 0]) for one in looked_at] == list(range(0, 3 * CALIBRATION_IMAGES, 3))


def test_a_conversion_loads_by_itself_wherever_it_is_copied(small_folder, converted):
    exact = Florence2.load(small_folder, "cpu", "torch", precision="fp32")
    moved = Florence2.load(converted, "cpu")
    assert (moved.runtime, moved.precision) == ("openvino", "fp32")
    for task in ("<OD>", "<CAPTION>"):
        expected = exact.run(task, probe_picture(), max_new_tokens=20)
        found = moved.run(task, probe_picture(), max_new_tokens=20)
        assert found.token_ids == expected.token_ids


# What is in the way, or goes wrong: nothing is left behind.


def fail_at(name, error):
    """Lets a step of the conversion fail."""

    def arrange(monkeypatch):
        def failing(*_, **__):
            raise error

        monkeypatch.setattr(florence2.conversion.convert, name, failing)

    return arrange


def without_room(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))


FAULTS = {
    # name: (what goes wrong, the error, a part of its sentence)
    "no room": (without_room, CheckpointError, r"takes .* are free in .*; make room"),
    "no room after all": (
        fail_at("save_file", OSError(28, "No space left on device")),
        CheckpointError,
        r"cannot be written to .*\(No space left on device\); make room",
    ),
    "no room for the tables": (
        fail_at("save_file", SafetensorError("I/O error: No space left on device")),
        CheckpointError,
        r"cannot be written to .*No space left on device.*; make room",
    ),
    "a failure of the library": (
        fail_at("record_of", RuntimeError("whatever")),
        RuntimeError,
        "whatever",
    ),
    "an end by the user": (fail_at("save_file", KeyboardInterrupt()), KeyboardInterrupt, ""),
}


@pytest.mark.parametrize(("arrange", "kind", "said"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("has_earlier", [False, True])
def test_what_goes_wrong_leaves_nothing_behind_and_an_earlier_conversion_whole(
    small, converted, tmp_path, monkeypatch, arrange, kind, said, has_earlier
):
    out = converted if has_earlier else tmp_path / "new"
    before = left_in(tmp_path)
    arrange(monkeypatch)
    with pytest.raises(kind, match=said) as caught:
        convert(small, "fp32", out)
    assert not issubclass(kind, FlorenceError) or is_one_sentence(caught.value)
    assert left_in(tmp_path) == before
    read_converted(converted)


UNLUCKY = """
import os, resource, signal, sys
from pathlib import Path
from florence2.checkpoint.checkpoint import open_checkpoint
from florence2.conversion import convert
from florence2.errors import CheckpointError

checkpoint, full, killed = open_checkpoint(sys.argv[1]), *map(Path, sys.argv[2:])
# A process that may write no larger files: the library's own error names no reason.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
try:
    convert.convert(checkpoint, "fp32", full)
except CheckpointError as error:
    print(error, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
convert.record_of = lambda path: os.kill(os.getpid(), signal.SIGKILL)
convert.convert(checkpoint, "fp32", killed)
"""


@pytest.fixture(scope="module")
def unlucky(small_folder, tmp_path_factory):
    """A process whose first conversion has a full disk, and which is killed in its second one."""
    full, killed = (tmp_path_factory.mktemp(name) / "out" for name in ("full", "killed"))
    command = [sys.executable, "-c", UNLUCKY, *map(str, (small_folder, full, killed))]
    return full, killed, subprocess.run(command, check=False, capture_output=True, text=True)


def test_a_disk_that_is_full_is_told_in_a_sentence(unlucky):
    out, _, process = unlucky
    found = process.stdout.splitlines()
    assert [line.partition(" (")[0] for line in found] == [
        f"The converted checkpoint cannot be written to {out}"
    ]
    assert found[0].endswith("make room there or name another folder.")
    assert left_in(out.parent) == []


def test_an_earlier_conversion_is_replaced_when_the_new_one_is_whole(small, converted, monkeypatch):
    (converted / "vision.bin").write_bytes(b"damaged")
    seen: list[bool] = []
    measured = florence2.conversion.convert.record_of

    def noted(path):
        seen.append((converted / "vision.bin").read_bytes() == b"damaged")
        return measured(path)

    monkeypatch.setattr(florence2.conversion.convert, "record_of", noted)
    convert(small, "fp32", converted)
    assert all(seen)
    read_converted(converted)
    assert left_in(converted.parent) == [converted.name]


def test_a_process_that_is_killed_leaves_no_conversion_under_the_name(unlucky):
    _, out, process = unlucky
    assert process.returncode == -9
    assert left_in(out.parent) != []
    assert not out.exists()


def with_other_files(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


def with_a_file(path):
    path.write_text("mine")


PLACES = {
    # name: (what is there already, a part of the sentence)
    "a folder with other files": (with_other_files, "holds other files; name another one"),
    "a file": (with_a_file, "is a file; name another place"),
}


@pytest.mark.parametrize(("arrange", "said"), PLACES.values(), ids=PLACES)
def test_what_is_not_a_conversion_is_never_replaced(small, tmp_path, arrange, said):
    out = tmp_path / "out"
    arrange(out)
    with pytest.raises(CheckpointError, match=said) as caught:
        convert(small, "fp32", out)
    assert is_one_sentence(caught.value)
    assert str(out) in str(caught.value)
    assert "mine" in [path.read_text() for path in (out, out / "notes.txt") if path.is_file()]
    assert left_in(tmp_path) == ["out"]


def test_a_place_that_cannot_be_written_to_is_told_in_a_sentence(small, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match=r"cannot be written to .*out") as caught:
        convert(small, "fp32", tmp_path / "file" / "out")
    assert is_one_sentence(caught.value)
    assert left_in(tmp_path) == ["file"]


def test_what_is_converted_already_is_not_converted_again(converted, tmp_path):
    with pytest.raises(CheckpointError, match="converted already, to fp32; convert the checkpoint"):
        convert(open_checkpoint(converted), "bf16", tmp_path / "out")


def without_openvino(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)


def without_nncf(monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)


def on_an_old_cpu(monkeypatch):
    monkeypatch.setattr(florence2.conversion.eight_bits, "cpu_computes_int8", lambda: False)


REQUESTS = {
    # name: (what is missing, precision, images, the error, a part of its sentence)
    "an unknown precision": (None, "int4", PICTURES, DeviceError, "int4.*fp32.*int8"),
    "no OpenVINO": (
        without_openvino,
        "fp32",
        (),
        DeviceError,
        r"needs the openvino package.*pip install openvino, or use runtime 'torch'",
    ),
    "no nncf": (
        without_nncf,
        "int8",
        PICTURES,
        DeviceError,
        r"needs the nncf package.*pip install .*\[int8\]",
    ),
    "nothing to calibrate on": (
        None,
        "int8",
        (),
        CheckpointError,
        "none were given; name a folder",
    ),
    "no instructions for it": (
        on_an_old_cpu,
        "int8",
        PICTURES,
        DeviceError,
        "needs a CPU with dot products of 8-bit integers.*use 'fp32'",
    ),
}


@pytest.mark.parametrize(
    ("arrange", "precision", "pictures", "kind", "said"), REQUESTS.values(), ids=REQUESTS
)
def test_what_cannot_be_done_here_is_said_before_anything_is_written(
    small, tmp_path, monkeypatch, arrange, precision, pictures, kind, said
):
    if arrange is not None:
        arrange(monkeypatch)
    with pytest.raises(kind, match=said) as caught:
        convert(small, precision, tmp_path / "deep" / "out", calibration=pictures)
    assert is_one_sentence(caught.value)
    assert left_in(tmp_path) == []


# Folders that are not whole, or not the right ones.


def in_manifest(**changes):
    def change(folder):
        path = folder / CONVERTED_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without_in_manifest(key):
    def change(folder):
        path = folder / CONVERTED_NAME
        content = json.loads(path.read_text())
        del content[key]
        path.write_text(json.dumps(content))

    return change


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7])


def damage(name):
    def change(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 0xFF
        (folder / name).write_bytes(content)

    return change


DAMAGED = {
    # name: (what happened to the folder, the parts of the sentence)
    "a model is cut": (cut("vision.bin"), ["vision.bin", "bytes instead of", "convert"]),
    "a model is missing": (
        lambda folder: (folder / "decoder.xml").unlink(),
        ["decoder.xml", "is missing", "copy the whole folder again"],
    ),
    "weights are damaged": (
        damage("encoder.bin"),
        ["encoder.bin", "the hash in the manifest", "convert"],
    ),
    "the tables are damaged": (damage("embeddings.safetensors"), ["embeddings.safetensors"]),
    "words of another checkpoint": (
        lambda folder: (folder / "vocab.json").write_text("{}"),
        ["vocab.json", "bytes instead of"],
    ),
    "another format": (
        in_manifest(format=FORMAT + 1),
        [f"format {FORMAT + 1}", f"reads format {FORMAT}", "convert the checkpoint again"],
    ),
    "another size of images": (
        in_manifest(size_wh=[96, 64]),
        ["images of 96 x 64 pixels", "works with 64 x 64", "convert it again"],
    ),
    "a manifest of something else": (
        lambda folder: (folder / CONVERTED_NAME).write_text('{"some": "thing"}'),
        [CONVERTED_NAME, "convert the checkpoint again"],
    ),
    "a manifest that is no object": (
        lambda folder: (folder / CONVERTED_NAME).write_text("[1, 2]"),
        [CONVERTED_NAME, "convert the checkpoint again"],
    ),
    "a cut manifest": (cut(CONVERTED_NAME), [CONVERTED_NAME, "convert the checkpoint again"]),
    "a manifest without a field": (
        without_in_manifest("precision"),
        [CONVERTED_NAME, "convert the checkpoint again"],
    ),
    "no manifest": (
        lambda folder: (folder / CONVERTED_NAME).unlink(),
        ["holds no weights"],
    ),
}


@pytest.mark.parametrize(("change", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_folder_that_is_not_whole_is_refused_with_its_file(converted, change, said):
    change(converted)
    with pytest.raises(CheckpointError) as caught:
        Florence2.load(converted, "cpu")
    assert is_one_sentence(caught.value)
    assert str(converted) in str(caught.value)
    assert [part for part in said if part not in str(caught.value)] == []


def test_a_model_that_openvino_cannot_run_is_told_with_its_version(converted):
    (converted / "vision.xml").write_text("<net name='vision' version='99'></net>")
    entries = json.loads((converted / CONVERTED_NAME).read_text())["files"]
    path = converted / "vision.xml"
    for entry in entries:
        if entry["name"] == path.name:
            entry.update(size=path.stat().st_size, sha256=sha256(path))
    in_manifest(files=entries)(converted)
    with pytest.raises(
        CheckpointError, match=r"cannot run .*vision\.xml.*convert .* again"
    ) as caught:
        Florence2.load(converted, "cpu")
    assert "\n" not in str(caught.value)
    assert str(openvino.__version__) in str(caught.value)


ASKED = {
    # name: (what is asked of a folder converted to fp32, a part of the sentence)
    "torch": ({"runtime": "torch"}, "runtime 'torch' does not run; use runtime 'openvino'"),
    "another precision": ({"precision": "bf16"}, "converted to fp32, and 'bf16' was asked for"),
    "int8": ({"precision": "int8"}, "converted to fp32, and 'int8' was asked for"),
}


@pytest.mark.parametrize(("asked", "said"), ASKED.values(), ids=ASKED)
def test_a_converted_folder_is_what_it_is(converted, asked, said):
    with pytest.raises(DeviceError, match=said) as caught:
        Florence2.load(converted, "cpu", **asked)
    assert is_one_sentence(caught.value)


def test_without_openvino_a_converted_folder_says_what_to_install(converted, monkeypatch):
    without_openvino(monkeypatch)
    with pytest.raises(DeviceError, match=r"needs the openvino package.*pip install"):
        Florence2.load(converted, "cpu")
    assert not runtime_module.has_openvino()


def test_every_precision_of_the_command_is_tested_here():
    assert {"fp32", *PRECISIONS, "int8"} == set(CONVERTED_PRECISIONS)

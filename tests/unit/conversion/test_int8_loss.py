"""What int8 costs on labeled images: measured by a command, kept, and what auto makes of it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from adapter_tools import RANK, pair, write_adapter
from openvino_tools import DEMO, write_small_checkpoint

from florence2 import Florence2
from florence2.checkpoint.checkpoint import open_checkpoint
from florence2.checkpoint.files import CONVERTED_NAME
from florence2.conversion.kept import Conversions
from florence2.conversion.measured_loss import FEWEST_IMAGES, TaskLoss, why_not_enough
from florence2.engine import loading
from florence2.evaluation.loss import PrecisionLoss
from florence2.labeled.coco import read_coco
from florence2_demo.labeled_scenes import write_labeled_scenes
from florence2_demo.scene import make_scene
from serve import precision_loss
from serve.cli.main import main

LITTLE = TaskLoss("<OD>", "AP", FEWEST_IMAGES, 0.8, 0.796, 0.4, -0.2, 0.9)
KNOWN = "<OD> lost 0.40 points of AP (95 %: -0.20 to 0.90) on 50 images, from 80.0 to 79.6"

ENOUGH = {
    "little is lost": ((LITTLE,), None),
    "something is gained": ((replace(LITTLE, points=-3.0),), None),
    "a point is lost": ((replace(LITTLE, points=1.0),), "lost 1.00 points of AP"),
    "one of two tasks loses": ((LITTLE, replace(LITTLE, points=2.0)), "lost 2.00 points"),
    "few images": ((replace(LITTLE, images=49),), "on 49 images, fewer than 50"),
    "nothing to lose": ((replace(LITTLE, before=0.09),), "reaches 9.0 points.*it takes 10"),
    "no number": ((replace(LITTLE, points=float("nan")),), "lost nan"),
    "nothing measured": ((), "nothing could be compared"),
}


@pytest.mark.parametrize(("tasks", "why_not"), ENOUGH.values(), ids=ENOUGH)
def test_what_is_enough_for_auto_to_take_int8(tasks, why_not):
    found = why_not_enough(tasks)
    assert (found is None) == (why_not is None)
    assert why_not is None or re.search(why_not, found)


@pytest.fixture
def told():
    return list[str]()


@pytest.fixture
def kept(tmp_path, told):
    return Conversions(tmp_path / "cache", progress=told.append)


@pytest.fixture
def home(small, kept, whole, reduced, monkeypatch):
    """Where the small checkpoint's conversions are; int8 there is bf16 that is called so.

    Int8 is written in it too, and nobody waits for ranges of 8-bit values.
    """
    in_bf16, *_ = reduced("bf16")
    monkeypatch.setattr(loading, "cpu_computes_int8", lambda: True)
    monkeypatch.setattr("florence2.conversion.kept.check_int8", lambda: None)

    def convert(checkpoint, precision, folder, **_):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole if precision == "fp32" else in_bf16, folder)
        manifest = folder / CONVERTED_NAME
        content = json.loads(manifest.read_text()) | {"precision": precision, "calibration": "some"}
        manifest.write_text(json.dumps(content))

    monkeypatch.setattr("florence2.conversion.kept.convert", convert)
    return kept.folder_for(small, "int8").parent


def keep(kept, checkpoint, *tasks):
    said = {"data": "/photos/labeled", "data_sha256": "d", "command": "c", "date": "2026-01-31"}
    return kept.keep_int8_loss(checkpoint, tasks or (LITTLE,), **said)


@pytest.fixture
def load(small_folder, kept, home, told):
    def load(precision="auto", runtime="openvino", **how):
        told.clear()
        return Florence2.load(
            small_folder,
            "cpu",
            runtime,
            precision=precision,
            cache_dir=kept.cache_dir,
            notify=told.append,
            **how,
        )

    return load


def test_auto_takes_int8_once_it_is_known_to_cost_little_and_says_so(small, kept, load, told):
    assert load().precision == "fp32"
    [note] = load("int8").notes
    assert "What that costs on your images is not known: florence2 evaluate DATA --model" in note
    assert "--precision int8 --against fp32" in note
    path = keep(kept, small)
    model = load()
    assert (model.precision, model.runtime) == ("int8", "openvino")
    [sentence] = told
    assert "auto takes" in sentence
    [note] = model.notes
    assert f"What that costs was measured: {KNOWN} (labeled, against fp32, 2026-01-31)." in note
    assert KNOWN in sentence
    # By name it is told too.
    assert KNOWN in load("int8").notes[0]
    content = json.loads(path.read_text())
    assert content["data"] == "/photos/labeled"
    assert set(content["versions"]) == {"openvino", "torch"}
    assert kept.forget_int8_loss(small)
    assert not kept.forget_int8_loss(small)
    assert load().precision == "fp32"


def test_auto_takes_int8_where_openvino_was_measured_to_be_faster(small, kept, load, monkeypatch):
    keep(kept, small)
    monkeypatch.setattr(loading, "MEASURED_FROM_D_MODEL", 16)
    for found, precision in (("torch", "fp32"), ("openvino", "int8")):
        monkeypatch.setattr(Conversions, "faster_runtime", lambda *_, found=found: found)
        assert load(runtime="auto").precision == precision


def test_beside_adapters_that_nobody_measured_auto_stays_what_it_is(small, kept, load, tmp_path):
    keep(kept, small)
    width = small.config.text.d_model
    state = pair(shapes=((RANK, width), (width, RANK)))
    folder = write_adapter(tmp_path / "adapter", state, base=str(small.folder))
    assert load(adapters={"own": folder}).precision == "fp32"


def convert_again(home):
    manifest = home / "int8" / CONVERTED_NAME
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"calibration": "others"}))


def change_record(**changes):
    def change(home):
        path = home / "int8-loss.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


IGNORED = {
    "it was converted again": convert_again,
    "the conversion is gone": lambda home: shutil.rmtree(home / "int8"),
    "the conversion is damaged": lambda home: (home / "int8/vision.bin").write_bytes(b"cut"),
    "it is of another checkpoint": change_record(source_sha256="0"),
    "it is no record": lambda home: (home / "int8-loss.json").write_text("[]"),
    "it is cut": lambda home: (home / "int8-loss.json").write_text('{"tasks"'),
    "it is of another version": change_record(more=1),
}


@pytest.mark.parametrize("change", IGNORED.values(), ids=IGNORED)
def test_a_record_of_something_else_is_ignored(small, kept, home, change):
    keep(kept, small)
    assert kept.int8_loss(small) is not None
    change(home)
    assert kept.int8_loss(small) is None


def test_a_record_of_a_point_or_more_is_ignored(small, kept, home):
    keep(kept, small, replace(LITTLE, points=1.0))
    assert kept.int8_loss(small) is None


def test_another_checkpoint_has_a_record_of_its_own(small, kept, home, tmp_path):
    keep(kept, small)
    other = open_checkpoint(write_small_checkpoint(tmp_path / "tiny", seed=2))
    kept.folder_for(other, "int8")
    assert kept.int8_loss(other) is None


def test_a_cpu_without_the_instructions_stays_in_float(small, kept, load, monkeypatch):
    keep(kept, small)
    monkeypatch.setattr(loading, "cpu_computes_int8", lambda: False)
    assert load().precision == "fp32"


# The command, with the demo checkpoint.

SCENES = 6


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "scenes"
    write_labeled_scenes(folder, map(make_scene, range(SCENES)))
    return folder


@pytest.fixture
def kept_demo(tmp_path, demo_int8, monkeypatch):
    """The demo, and the cache of commands, in which its int8 is."""
    monkeypatch.setenv("FLORENCE2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "florence2.conversion.kept.convert",
        lambda _, precision, folder, **__: shutil.copytree(demo_int8, folder),
    )
    demo, kept = open_checkpoint(DEMO), Conversions(tmp_path / "cache")
    kept.folder_for(demo, "int8")
    return demo, kept


@pytest.fixture
def evaluate(scenes, tmp_path, kept_demo, capsys):
    """Runs the command; what it writes and says."""

    def evaluate(*options):
        out = tmp_path / "figures"
        model = ["--model", str(DEMO), "--device", "cpu", "--beams", "1", "--out", str(out)]
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", str(scenes), *model, *options])
        said = capsys.readouterr()
        content = None if ended.value.code else json.loads((out / "evaluation.json").read_text())
        return content, said.err + said.out

    return evaluate


def test_the_command_says_what_is_lost_and_auto_forgets_what_is_too_much(evaluate, kept_demo):
    demo, kept = kept_demo
    keep(kept, demo)
    content, said = evaluate("--precision", "int8", "--against", "fp32")
    # Calibrated on three images, it loses more than a point.
    assert kept.int8_loss(demo) is None
    assert "auto stays what it is, and takes it no more" in said
    [task] = content["against"]["tasks"]
    assert (content["precision"], content["against"]["precision"]) == ("int8", "fp32")
    assert (task["figure"], task["images"]) == ("AP", SCENES)
    assert task["low"] <= task["points"] <= task["high"]
    total = content["tasks"][0]["objects"]["total"]
    assert task["after"] == pytest.approx(total["ap"]["value"])
    assert 100 * (task["before"] - task["after"]) == pytest.approx(task["points"])
    assert "int8 against fp32" in said
    assert f"<OD> lost {task['points']:.2f} points of AP" in said


FEW = replace(LITTLE, images=6)
KEPT = {
    # name: (precision, against, runtime, the task, the sentence, whether it is kept)
    "it costs little": ("int8", "fp32", "openvino", LITTLE, "takes int8 for .* from now on", True),
    "it says too little": ("int8", "fp32", "openvino", FEW, "not enough .* on 6 images", False),
    "it was in torch": ("int8", "fp32", "torch", LITTLE, None, False),
    "it was no float32": ("int8", "bf16", "openvino", LITTLE, None, False),
    "it was no int8": ("bf16", "fp32", "openvino", LITTLE, None, False),
}


@pytest.mark.parametrize(
    ("precision", "against", "runtime", "task", "said", "is_kept"), KEPT.values(), ids=KEPT
)
def test_what_is_kept_of_a_measure(
    kept_demo, scenes, precision, against, runtime, task, said, is_kept
):
    demo, kept = kept_demo
    loss = PrecisionLoss(precision, against, (task,), why_not_enough((task,)))
    model = SimpleNamespace(runtime=runtime, engine=SimpleNamespace(checkpoint=demo))
    found = precision_loss.keep(loss, model, read_coco(scenes), "florence2 evaluate scenes")
    assert (found is None) == (said is None)
    assert said is None or re.search(said, found)
    known = kept.int8_loss(demo)
    assert (known is not None) == is_kept
    if known is not None:
        assert (known.data, known.command) == (str(scenes), "florence2 evaluate scenes")
        assert known.tasks == (LITTLE,)


REFUSED = {
    "no other precision": (("--precision", "fp32", "--against", "fp32"), "another one than"),
    "none by name": (("--precision", "int8", "--against", "auto"), "a precision by name"),
    "no precision": (("--precision", "int8", "--against", "int4"), "'int4'"),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_compared_is_a_sentence(evaluate, options, said):
    assert said in evaluate(*options)[1]

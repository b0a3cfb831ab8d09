from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys

import pytest
from adapter_tools import write_adapter

from florence2.tasks import TASKS
from serve.cli.main import main


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code or 0


def test_tasks_lists_the_table(capsys):
    assert run("tasks", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["task"] for row in rows] == [task.token for task in TASKS]
    assert run("tasks") == 0
    assert "<OCR_WITH_REGION>" in capsys.readouterr().out


def test_models_says_what_is_complete_on_this_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FLORENCE2_CACHE", str(tmp_path))
    assert run("models", "--json") == 0
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["Florence-2-large"]["complete_here"] == "no"
    assert rows["Florence-2-large"]["size_mb"] == 1554
    assert "demo" in rows


def test_models_says_what_an_adapter_is_merged_into(capsys, tmp_path):
    folder = write_adapter(tmp_path / "cats")
    assert run("models", str(folder), "demo", "--json") == 0
    adapter, demo = json.loads(capsys.readouterr().out)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert adapter["adapter_sha256"] == hashlib.sha256(weights).hexdigest()
    assert (adapter["model"], adapter["base"]) == (str(folder), "demo")
    assert (demo["model"], demo["base"]) == ("demo", "")
    assert run("models", str(tmp_path / "nothing")) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_quick_commands_wait_for_nothing_slow():
    code = (
        "import sys, serve.cli.main; "
        "slow = {'torch', 'supervisely', 'transformers', 'numpy', 'pydantic'} & set(sys.modules); "
        "sys.exit(str(slow) if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


OPTIONS = {
    "--class-threshold": "dog=0.6",
    "--nms": "off: both stay. [default: 0.7]",
    "--geometry": "[default: polygon]",
    "--tiling": "such as 1024, or '{width: 1024, height: 768, overlap: 128}'",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_help_of_an_option_speaks_of_its_own_form(capsys, option):
    assert run("label", "--help") == 0
    _, _, after = capsys.readouterr().out.partition(f"  {option} ")
    said = " ".join(re.split(r"\n  --", after)[0].split())
    assert OPTIONS[option] in said
    assert "class_thresholds" not in said
    assert "{dog" not in said


def pipe(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_parse_writes_the_dictionary_of_an_answer(tmp_path, monkeypatch):
    pipe(monkeypatch, b"car<loc_0><loc_0><loc_500><loc_999>\n")
    file = tmp_path / "answer.json"
    assert run("parse", "--task", "<OD>", "--size", "640x480", "--json", str(file)) == 0
    answer = json.loads(file.read_text())["<OD>"]
    assert answer["labels"] == ["car"]
    assert answer["bboxes"][0] == pytest.approx([0.32, 0.24, 320.32, 479.76])


@pytest.mark.parametrize(
    ("arguments", "data", "sentence"),
    [
        pytest.param(["--task", "<ODD>", "--size", "9x9"], b"", "Did you mean '<OD>'", id="task"),
        pytest.param(["--task", "<OD>", "--size", "9by9"], b"", "'9by9'", id="size"),
        pytest.param(["--task", "<OD>", "--size", "0x9"], b"", "'0x9'", id="no width"),
        pytest.param(["--task", "<OD>", "--size", "9x9"], b"\xff\xfe", "UTF-8", id="bytes"),
        pytest.param(
            ["--task", "<OD>", "--size", "9x9", "--json", "/nowhere/x"], b"", "writable", id="file"
        ),
    ],
)
def test_parse_refuses_with_one_sentence(arguments, data, sentence, monkeypatch, capsys):
    pipe(monkeypatch, data)
    assert run("parse", *arguments) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1


def test_an_unknown_option_is_a_usage_error(capsys):
    assert run("label", "x", "--out", "y", "--treshold", "1") == 2
    assert "--threshold" in capsys.readouterr().err


def test_a_command_that_is_interrupted_says_so(monkeypatch, capsys, tmp_path):
    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("serve.labeling.undo.runs_in", interrupted)
    assert run("runs", str(tmp_path)) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_an_error_nobody_foresaw_is_a_sentence_too(monkeypatch, capsys):
    import serve.cli.info as info

    monkeypatch.setattr(info, "_show", lambda *_: 1 / 0)
    assert run("tasks") == 2
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "Traceback" not in err
    assert run("tasks", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err

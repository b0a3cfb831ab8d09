"""Several devices the way users start them: two processes on the CPU, one core each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from app_server import AppServer, serve_command

from serve.cli.main import main

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "demo" / "images"
OPTIONS = ["--model", "demo", "--task", "<OD>", "--runtime", "torch", "--precision", "fp32"]


def florence2(*words):
    """The exit code of a command line."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    return ended.value.code or 0


def annotations_in(folder):
    """Every image's labels; scores to what a batch of another size may change."""
    found = {}
    for path in sorted(folder.rglob("ann/*.json")):
        objects = json.loads(path.read_text())["objects"]
        found[path.name] = [
            (one["classTitle"], one["points"], [round(tag["value"], 3) for tag in one["tags"]])
            for one in objects
        ]
    return found


def test_two_processes_label_a_folder_as_one_does(tmp_path):
    words = ["label", IMAGES, *OPTIONS, "--batch", "2", "--devices"]
    assert florence2(*words, "cpu", "--out", tmp_path / "one") == 0
    # With a second process, which must be gone when the first one ends.
    command = [sys.executable, "-m", "serve.cli.main", *words, "cpu,cpu", "--out", tmp_path / "two"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = annotations_in(tmp_path / "one"), annotations_in(tmp_path / "two")
    assert len(one) > 3
    assert one == two


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--devices", "cpu,gpu"], "'gpu'"),
        (["--devices", "cpu", "--device", "cpu"], "leave one out"),
        (["--devices", "cuda:0"], "needs a CUDA GPU"),
    ],
)
def test_devices_that_cannot_be_are_said_in_a_sentence(tmp_path, capsys, words, says):
    assert florence2("label", IMAGES, *OPTIONS, *words, "--out", tmp_path / "out") == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_server_has_both_and_ends_both(tmp_path):
    def command(port):
        words = serve_command(port)
        place = words.index("--device")
        words[place : place + 2] = ["--devices", "cpu,cpu"]
        return words

    app = AppServer(tmp_path, {}, command)
    app.start()
    try:
        info = requests.post(f"{app.url}/get_session_info", json={}, timeout=60).json()
        assert info["devices"] == ["cpu", "cpu"]
    finally:
        app.stop()
    assert "Traceback" not in app.log

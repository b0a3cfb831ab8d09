"""The README's ``curl``, as it stands there, against the running app."""

from __future__ import annotations

import json
import re
import subprocess

from app_server import ROOT
from contract_calls import classes_in


def test_the_readmes_curl_returns_the_annotation_of_what_it_asks_for(app):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [command] = re.findall(r"^curl .*?/inference_image$", readme, re.MULTILINE | re.DOTALL)
    command = command.replace("http://127.0.0.1:8000", app.url)
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True, cwd=ROOT
    )
    entry = json.loads(done.stdout)
    assert sorted(set(classes_in(entry["annotation"]))) == ["green box", "orange star"]


def test_the_serving_guides_program_prints_labels(app, monkeypatch, capsys):
    guide = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    [program] = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    monkeypatch.chdir(ROOT)
    program = program.replace("http://127.0.0.1:8000", app.url)
    exec(compile(program, "serving.md", "exec"), {})
    assert "plant" in capsys.readouterr().out

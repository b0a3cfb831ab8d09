from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from label_fakes import FakeModel, paint


@pytest.fixture
def images(tmp_path) -> Path:
    """Five images of five colours."""
    folder = tmp_path / "images"
    for number in range(5):
        paint(folder / f"{number}.png", number)
    return folder


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def label(monkeypatch, model, tmp_path):
    """Runs ``florence2 label`` with the fake model; returns exit code, folder and stderr reader."""
    loads = model.put_in(monkeypatch)

    def run(images: Path, *options: str, out: Path | None = None):
        from serve.cli.main import main

        target = out or tmp_path / "out"
        with pytest.raises(SystemExit) as ended:
            main(["label", str(images), "--out", str(target), *options])
        return SimpleNamespace(code=ended.value.code, out=target, loads=loads)

    return run


@pytest.fixture
def journal_of():
    def read(out: Path) -> dict[str, dict]:
        lines = (out / "journal.jsonl").read_text().splitlines()[1:]
        return {entry["image"]: entry for entry in map(json.loads, lines)}

    return read


@pytest.fixture
def report_of():
    return lambda out: json.loads((out / "report.json").read_text())

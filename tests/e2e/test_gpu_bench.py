"""The GPU's bench script runs on a CPU, where nothing is recorded, and writes its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "gpu.py"
WORDS = "--device cpu --size tiny --precision fp32 --batch 1 --tokens 3,6 --prompts 2 --repeats 1"


@pytest.mark.slow
def test_every_table_is_measured_and_written(tmp_path):
    path = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCH), *WORDS.split(), "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    tables = found["tables"]["tiny fp32"]
    assert found["machine"]["device"] == "CPU"
    assert tables["error_against_fp32"] == 0.0
    assert tables["graphs"] == 0
    assert [row["difference"] for row in tables["vision"]] == [0.0]
    assert [(row["batch"], row["prompts"], row["tokens"]) for row in tables["asks"]] == [
        (1, 1, 3),
        (1, 1, 6),
        (1, 2, 3),
    ]
    assert all(row["same_tokens"] for row in [*tables["step"], *tables["asks"]])
    assert "whole asks" in done.stdout

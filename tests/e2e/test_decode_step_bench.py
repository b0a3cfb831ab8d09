"""The bench script of decoder steps runs, and its figures are those of what it ran."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "decode_step.py"


@pytest.mark.slow
def test_every_number_of_beams_is_measured_against_the_floor():
    command = [sys.executable, str(BENCH), "--size", "tiny", "--beams", "1", "2", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"weights of a step: \d+ MB, read in [0-9.]+ ms", done.stdout)
    # What a figure is says nothing on a busy machine: a step is the difference of two times.
    lines = re.findall(r"(\d) beams: (-?[0-9.]+) ms a step, (-?[0-9.]+) x the floor", done.stdout)
    assert [beams for beams, *_ in lines] == ["1", "2"]

"""The bench script of decoder steps runs, and its figures are those of what it ran."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "decode_step.py"


def test_every_number_of_beams_is_measured_against_the_floor():
    command = [sys.executable, str(BENCH), "--size", "tiny", "--beams", "1", "2", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    floor = float(re.search(r"read in ([0-9.]+) ms", done.stdout).group(1))
    lines = re.findall(r"(\d) beams: ([0-9.]+) ms a step, ([0-9.]+) x the floor", done.stdout)
    assert [beams for beams, *_ in lines] == ["1", "2"]
    assert floor > 0
    assert all(float(step) > 0 and float(ratio) > 1 for _, step, ratio in lines)

"""In bf16 the demo checkpoint's best logits are equal without rescoring, and never with it."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "reduced_precision.py"


def test_rescoring_leaves_no_equal_best_logits(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(BENCH), "--scenes", "2"])
    runpy.run_path(str(BENCH), run_name="__main__")
    shown = capsys.readouterr().out
    lines = re.findall(r"(.+): the two best logits are equal in (\d+) of (\d+)", shown)
    ties = {name: int(tied) for name, tied, _ in lines}
    assert ties["plain"] > 0
    assert ties["best rescored"] == ties["float32 head"] == 0
    assert all(int(rows) > 4 for _, _, rows in lines)

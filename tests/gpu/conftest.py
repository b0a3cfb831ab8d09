"""Helpers shared with the tests that need no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("generate", "runtimes"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / folder))

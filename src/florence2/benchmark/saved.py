"""The JSON file of a run: the machine, the rows, and how the cost grows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from florence2.benchmark.growth import growth_of
from florence2.benchmark.rows import Row, row_from_dict
from florence2.errors import RequestError


def save_rows(path: Path, machine: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Writes all rows so far, so that a kill leaves the file as it was or as it should be."""
    growth = [asdict(one) for one in growth_of(rows)]
    content = {"machine": dict(machine), "rows": [asdict(row) for row in rows], "growth": growth}
    write_text(path, json.dumps(content, indent=2) + "\n")


def load_rows(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The machine and the rows of a file; RequestError for one that has none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content["machine"]), [row_from_dict(values) for values in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"A saved run is a file that florence2 benchmark --json wrote, and {path} is none; "
            "name such a file."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` whole or not at all, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)

"""How large the house is, and how many files a request passes: the figures that CI holds.

python bench/house.py [--check] [--names] [--json FILE]

Every figure is measured on the tree this file lies in. ``held`` is what CI holds today: with
``--check`` a figure above it ends the program with 1. Whoever makes a figure better lowers
``held`` with it, until it meets ``goal``. Lines are shown and not held: they follow what the
program does, and a limit on them is met by crowding lines.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
TRACE: Final = ROOT / "bench" / "request_trace.py"
# The packages, and the folder that holds each.
ROOMS: Final = {"florence2": ROOT / "src", "florence2_demo": ROOT / "src", "serve": ROOT}
# What of the engine's package is no part of answering a request.
AROUND: Final = ("benchmark", "evaluation", "finetune", "training")

RUN_FILES: Final = "engine files that a run passes"
RUN_CHANGES: Final = "changes of file in a run"
POST_FILES: Final = "app files that POST /inference_image passes"
CIRCLES: Final = "import circles"
SINGLE: Final = "core modules with a single importer"
# Figure: (held, goal).
LIMITS: Final = {
    RUN_FILES: (20, 20),
    RUN_CHANGES: (400, 400),
    POST_FILES: (12, 12),
    CIRCLES: (0, 0),
    SINGLE: (8, 8),
}


@dataclass(frozen=True)
class Figure:
    """One measured figure beside its limits."""

    name: str
    value: int
    held: int
    goal: int

    @property
    def complaint(self) -> str | None:
        if self.value <= self.held:
            return None
        return (
            f"This tree has {self.value:,} {self.name}, and at most {self.held:,} are held; bring "
            "them down, or raise the limit in bench/house.py and say why."
        )


# Modules and their imports


def modules(rooms: Mapping[str, Path]) -> dict[str, Path]:
    """The file of every module of the packages (name: the folder that holds it)."""
    found = {}
    for package, folder in rooms.items():
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """What each module imports of the others, in functions and under TYPE_CHECKING as well.

    ``from package import name`` imports the module ``package.name`` where there is one, else the
    package. That Python also runs the packages above an imported module does not count, and
    ``import_module`` of a name made at run time is not seen.
    """
    return {name: _imported(name, path, files) for name, path in files.items()}


def _imported(name: str, path: Path, files: Mapping[str, Path]) -> set[str]:
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                found.add(full if full in files else source)
    return (found & files.keys()) - {name}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which imports, directly or not, every other one of its group."""
    below = {name: _reachable(graph, name) for name in graph}
    groups = {
        frozenset(other for other in below[name] if name in below[other])
        for name in graph
        if name in below[name]
    }
    return sorted(sorted(group) for group in groups)


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(graph[name])
    return found


def single_importer(graph: Mapping[str, set[str]], among: set[str]) -> list[str]:
    """Modules of ``among`` that exactly one other of ``among`` imports; packages count too."""
    return sorted(name for name in among if sum(name in graph[other] for other in among) == 1)


def is_core(module: str) -> bool:
    """Of the engine, and needed to answer a request."""
    package, *rest = module.split(".")
    return package == "florence2" and (not rest or rest[0] not in AROUND)


# Measuring


def lines(paths: Iterable[Path]) -> tuple[int, int]:
    """All lines, and those with more on them than a comment; docstrings are in both."""
    everything = spoken = 0
    for path in paths:
        text = path.read_text(encoding="utf-8")
        everything += len(text.splitlines())
        numbers: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.string.strip() and token.type != tokenize.COMMENT:
                numbers.update(range(token.start[0], token.end[0] + 1))
        spoken += len(numbers)
    return everything, spoken


def trace(request: str) -> tuple[list[str], int]:
    """The files and the changes of file of one request, in a process of its own."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    command = [sys.executable, "-P", str(TRACE), request]
    with tempfile.TemporaryDirectory() as data:
        own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "SLY_APP_DATA_DIR": data}
        done = subprocess.run(
            command, env={**os.environ, **own}, cwd=data, capture_output=True, text=True
        )
    if done.returncode:
        raise SystemExit(f"The request ({request}) failed:\n{done.stdout}{done.stderr}")
    files, changes = json.loads(done.stdout.splitlines()[-1])
    return files, changes


def measure() -> tuple[list[Figure], dict[str, int], dict[str, list[str]]]:
    """The figures, those without limits, and the names behind those that count something."""
    files = modules(ROOMS)
    graph = imports(files)
    core = {name for name in files if is_core(name)}
    run_files, changes = trace("run")
    post_files, _ = trace("post")
    names = {
        RUN_FILES: run_files,
        POST_FILES: post_files,
        CIRCLES: [" - ".join(circle) for circle in circles(graph)],
        SINGLE: single_importer(graph, core),
    }
    app = {name for name in files if name.partition(".")[0] == "serve"}
    rooms = {
        "app": [files[name] for name in app],
        "engine core": [files[name] for name in core],
        "rooms around the engine": [files[name] for name in files.keys() - core - app],
        "tests": list((ROOT / "tests").rglob("*.py")),
    }
    counted = {f"lines of the {room}": lines(paths) for room, paths in rooms.items()}
    values = {name: len(found) for name, found in names.items()} | {RUN_CHANGES: changes}
    values |= {name: everything for name, (everything, _) in counted.items()}
    figures = [Figure(name, values.pop(name), *limits) for name, limits in LIMITS.items()]
    values |= {f"{name} but blanks and comments": spoken for name, (_, spoken) in counted.items()}
    return figures, values, names


def show(figures: list[Figure], others: Mapping[str, int]) -> None:
    width = max(map(len, [*others, *LIMITS]))
    print(f"{'':{width}}   today    held    goal")
    for one in figures:
        reached = "reached" if one.value <= one.goal else f"{one.value - one.goal:,} to go"
        print(f"{one.name:{width}} {one.value:7,} {one.held:7,} {one.goal:7,}  {reached}")
    for name, value in others.items():
        print(f"{name:{width}} {value:7,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="end with 1 above what is held")
    parser.add_argument("--names", action="store_true", help="also what was counted")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    figures, others, names = measure()
    show(figures, others)
    if given.names:
        for name, found in names.items():
            print("", f"{name}:", *(f"  {one}" for one in found), sep="\n")
    if given.json:
        report = {"figures": [asdict(one) for one in figures], "others": others, "names": names}
        given.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    complaints = [one.complaint for one in figures if one.complaint]
    if given.check and complaints:
        raise SystemExit("\n".join(complaints))


if __name__ == "__main__":
    main()

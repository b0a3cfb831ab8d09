"""The figures of the house: what counts as an import, a circle, a line and a change of file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging_files import ROOT


def bench(name: str) -> ModuleType:
    # By path, as the folder in sys.path would hide the app behind its serve.py.
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


house = bench("house")
request_trace = bench("request_trace")


def package(folder: Path, texts: dict[str, str]) -> dict[str, Path]:
    """The modules of a package named ``rooms`` with these files."""
    for name, text in {"__init__": "", **texts}.items():
        path = folder / "rooms" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return house.modules({"rooms": folder, "not_there": folder})


CIRCLES = {
    "in the open": (
        {"a": "import rooms.b", "b": "import rooms.a"},
        [["rooms.a", "rooms.b"]],
    ),
    "in a function": (
        {"a": "from rooms.b import x", "b": "def x():\n    from rooms.a import y"},
        [["rooms.a", "rooms.b"]],
    ),
    "under TYPE_CHECKING": (
        {
            "a": "from rooms.b import x",
            "b": "if TYPE_CHECKING:\n    from rooms.c import y",
            "c": "import rooms.a as z",
        },
        [["rooms.a", "rooms.b", "rooms.c"]],
    ),
    "through names that are modules": (
        {"a": "from rooms import b", "b": "from rooms import a"},
        [["rooms.a", "rooms.b"]],
    ),
    "relative": (
        {"sub/__init__": "", "sub/a": "from ..b import x", "b": "from .sub import a"},
        [["rooms.b", "rooms.sub.a"]],
    ),
    "through what a package gives on": (
        {"__init__": "from rooms.a import x", "a": "from rooms import y"},
        [["rooms", "rooms.a"]],
    ),
    "two apart": (
        {
            "a": "import rooms.b",
            "b": "import rooms.a, rooms.c",
            "c": "from . import d",
            "d": "from . import c",
        },
        [["rooms.a", "rooms.b"], ["rooms.c", "rooms.d"]],
    ),
    "none: the package gives on what its modules import of each other": (
        {"__init__": "from rooms.a import x", "a": "from rooms.b import y", "b": "import json"},
        [],
    ),
    "none: a module that names itself": ({"a": "import rooms.a"}, []),
    "none: other packages": ({"a": "import json", "json": "from rooms.a import x"}, []),
}


@pytest.mark.parametrize(("texts", "expected"), CIRCLES.values(), ids=CIRCLES)
def test_circles_are_found_wherever_the_imports_stand(tmp_path, texts, expected):
    assert house.circles(house.imports(package(tmp_path, texts))) == expected


def test_a_single_importer_is_one_of_the_modules_that_are_looked_at(tmp_path):
    texts = {"a": "import rooms.c", "b": "from rooms import c, d", "c": "", "d": "", "e": ""}
    graph = house.imports(package(tmp_path, texts))
    assert house.single_importer(graph, set(graph)) == ["rooms.d"]
    assert house.single_importer(graph, graph.keys() - {"rooms.b"}) == ["rooms.c"]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("florence2", True),
        ("florence2.api", True),
        ("florence2.engine.benchmark", True),
        ("florence2.benchmark", False),
        ("florence2.evaluation.detection", False),
        ("florence2_demo.api", False),
        ("serve.app", False),
    ],
)
def test_the_core_is_the_engine_without_the_rooms_around_it(module, expected):
    assert house.is_core(module) is expected


def test_lines_are_counted_with_and_without_blanks_and_comments(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""Two\n\nlines."""\n\n# Why.\nx = (\n    1,  # one\n\n)\n', encoding="utf-8")
    assert house.lines([path, path]) == (18, 12)


def test_a_trace_counts_the_files_below_its_folder_and_the_changes_between_them(tmp_path):
    files = package(
        tmp_path, {"a": "def go(step):\n    step()\n    sorted([1], key=step)", "b": ""}
    )
    files["rooms.b"].write_text("def step(*given):\n    return len(given)", encoding="utf-8")
    spaces: dict[str, dict[str, object]] = {"a": {}, "b": {}}
    for name in ("a", "b"):
        path = files[f"rooms.{name}"]
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), spaces[name])
    trace = request_trace.FileTrace(tmp_path / "rooms")
    before = sys.getprofile()
    sys.setprofile(trace)
    try:
        spaces["a"]["go"](spaces["b"]["step"])
        trace.start()
        # From a into b and back, twice.
        spaces["a"]["go"](spaces["b"]["step"])
        trace.stop()
        spaces["b"]["step"]()
    finally:
        sys.setprofile(before)
    assert trace.files == {"a.py", "b.py"}
    assert trace.changes == 4


@pytest.mark.parametrize(
    ("value", "words", "complaint"),
    [
        (12, ["--check"], None),
        (13, [], None),
        (
            1300,
            ["--check"],
            "This tree has 1,300 app files, and at most 12 are held; bring them down, or raise "
            "the limit in bench/house.py and say why.",
        ),
    ],
    ids=["as held", "worse but not checked", "worse"],
)
def test_a_worse_figure_ends_the_check_with_a_sentence(
    value, words, complaint, tmp_path, monkeypatch, capsys
):
    figure = house.Figure("app files", value, held=12, goal=10)
    monkeypatch.setattr(house, "measure", lambda: ([figure], {"others": 3}, {"names": ["one"]}))
    monkeypatch.setattr(sys, "argv", ["house.py", *words, "--json", str(tmp_path / "house.json")])
    if complaint is None:
        house.main()
    else:
        with pytest.raises(SystemExit) as raised:
            house.main()
        assert str(raised.value) == complaint
    assert f"{value - 10:,} to go" in capsys.readouterr().out
    assert json.loads((tmp_path / "house.json").read_text(encoding="utf-8")) == {
        "figures": [{"name": "app files", "value": value, "held": 12, "goal": 10}],
        "others": {"others": 3},
        "names": {"names": ["one"]},
    }

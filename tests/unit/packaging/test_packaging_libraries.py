"""System libraries that OpenCV and the SDK open: named by package, installed where the app is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging_files import DOCKERFILE, ROOT, text_of

from florence2.errors import FlorenceError, LibraryError, naming_libraries

NOT_THERE = "cannot open shared object file: No such file or directory"
LIBRARIES = {
    f"libGL.so.1: {NOT_THERE}": "libGL.so.1, which this machine lacks; install the package libgl1 ",
    f"libgthread-2.0.so.0: {NOT_THERE}": "install the package libglib2.0-0 ",
    f"libglib-2.0.so.0: {NOT_THERE}": "install the package libglib2.0-0 ",
    f"libxcb.so.1: {NOT_THERE}": "install the package libxcb1 ",
    "failed to find libmagic.  Check your installation": "install the package libmagic1 ",
    f"libodd-x.so.9: {NOT_THERE}": "libodd-x.so.9, which this machine lacks; install its package ",
}
COMMANDS = {
    "label": ["-m", "serve.cli.main", "label", str(ROOT / "demo/images"), "--model", "demo"],
    "evaluate": ["-m", "serve.cli.main", "evaluate", "--scenes", "1"],
    "the platform": ["-c", "import serve.main"],
    "a program": ["-c", "from florence2 import Florence2"],
}


@pytest.mark.parametrize(("text", "advice"), LIBRARIES.items())
def test_a_missing_library_is_named_with_its_package(text: str, advice: str):
    with pytest.raises(LibraryError) as raised, naming_libraries():
        raise ImportError(text)
    assert advice in str(raised.value)
    assert isinstance(raised.value, FlorenceError)
    assert isinstance(raised.value, ImportError)


def test_any_other_failure_of_an_import_stays_what_it_is():
    with pytest.raises(ModuleNotFoundError, match="No module named 'libmagic'"), naming_libraries():
        raise ModuleNotFoundError("No module named 'libmagic'")


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_without_libgl_every_way_in_ends_with_that_sentence(command: list[str], tmp_path: Path):
    failing = f"raise ImportError('libGL.so.1: {NOT_THERE}')\n"
    (tmp_path / "cv2.py").write_text(failing, encoding="utf-8")
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "src")))
    out = ["--out", str(tmp_path / "out")] if "label" in command else []
    ran = subprocess.run(
        [sys.executable, *command, *out],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    last = ran.stderr.splitlines()[-1]
    assert ran.returncode != 0
    assert "libGL.so.1, which this machine lacks; install the package libgl1 " in last
    if "-m" in command:
        assert ran.stderr.count("\n") == 1, ran.stderr


@pytest.mark.parametrize("path", [DOCKERFILE, ROOT / ".github/workflows/tests.yml"], ids=str)
def test_the_packages_are_installed_where_the_app_is(path: Path):
    for package in ("libgl1", "libglib2.0-0", "libmagic1"):
        assert f" {package} " in text_of(path).replace("\n", " ")

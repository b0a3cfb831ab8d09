"""Threads that wait for each other leave the cores to other programs, unless told otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from serve.openmp import bound_spinning

NAMES = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
CASES = {
    "nothing said": ({}, ("1000", "0", None)),
    "a count of the user's": ({"GOMP_SPINCOUNT": "7"}, ("7", "0", None)),
    "a policy of the user's": ({"OMP_WAIT_POLICY": "active"}, (None, None, "active")),
}


@pytest.mark.parametrize(("given", "expected"), CASES.values(), ids=CASES)
def test_what_the_environment_says_stays(monkeypatch, given, expected):
    for name in NAMES:
        # Set first, so that the test's end takes away what the function sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    bound_spinning()
    assert tuple(os.environ.get(name) for name in NAMES) == expected


ENTRIES = {
    "the command": (
        "import sys; import serve.cli; assert 'torch' not in sys.modules\n"
        "try: serve.cli.main(['tasks'])\nexcept SystemExit: pass\n"
    ),
    "the platform's": (
        "import importlib.abc, sys, os\n"
        "class Early(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch': print('set:', os.environ.get('GOMP_SPINCOUNT')); os._exit(0)\n"
        "sys.meta_path.insert(0, Early())\n"
        "import serve.main\n"
    ),
}


@pytest.mark.parametrize("code", ENTRIES.values(), ids=ENTRIES)
def test_every_way_in_says_it_before_torch_is_there(code):
    env = {name: value for name, value in os.environ.items() if name not in NAMES}
    code += "\nimport os; print('set:', os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-u", "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert "set: 1000" in done.stdout, done.stderr

"""Threads that wait for each other leave the cores to other programs that want them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from serve import process as openmp
from serve.process import bound_spinning, is_machine_busy, leave_cores_to_others

NAMES = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
CASES = {
    "alone": (False, {}, ("10000", "1", None)),
    "beside others": (True, {}, ("0", "0", None)),
    "a count of the user's": (True, {"GOMP_SPINCOUNT": "7"}, ("7", "0", None)),
    "a policy of the user's": (True, {"OMP_WAIT_POLICY": "active"}, (None, None, "active")),
}


@pytest.mark.parametrize(("is_busy", "given", "expected"), CASES.values(), ids=CASES)
def test_threads_wait_as_the_machine_and_the_environment_say(monkeypatch, is_busy, given, expected):
    monkeypatch.setattr(openmp, "is_machine_busy", lambda: is_busy)
    for name in NAMES:
        # Set first, so that the test's end takes away what the function sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    bound_spinning()
    assert tuple(os.environ.get(name) for name in NAMES) == expected


LOOKS = {
    # name: (cores, running threads at each look, ours included; whether the machine is busy)
    "nobody else": (2, [1, 1, 1, 1, 1], False),
    "a program per core": (2, [3, 3, 3, 4, 3], True),
    "one program on two cores": (2, [2, 2, 2, 2, 2], True),
    "only for a moment": (2, [3, 3, 1, 3, 3], False),
    "a few programs on many cores": (64, [9, 9, 9, 9, 9], False),
    "many programs on many cores": (64, [40, 50, 33, 60, 40], True),
}


@pytest.mark.parametrize(("cores", "running", "is_busy"), LOOKS.values(), ids=LOOKS)
def test_a_machine_is_busy_while_others_keep_half_of_it_running(
    monkeypatch, tmp_path, cores, running, is_busy
):
    file = tmp_path / "loadavg"
    left = list(running)

    def next_look(_=0.0):
        file.write_text(f"0.00 0.01 0.05 {left.pop(0)}/512 4711\n")

    monkeypatch.setattr(openmp, "LOADAVG", str(file))
    monkeypatch.setattr(openmp.time, "sleep", next_look)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    next_look()
    assert is_machine_busy() == is_busy


@pytest.mark.parametrize("text", ["", "0.1 0.2 0.3", "a b c d/e f", None], ids=str)
def test_a_system_that_does_not_tell_counts_as_quiet(monkeypatch, tmp_path, text):
    file = tmp_path / "loadavg"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(openmp, "LOADAVG", str(file))
    assert not is_machine_busy()


THREADS = {
    # name: (d_model, busy, OMP_NUM_THREADS; computing threads afterwards)
    "a small network beside others": (192, True, None, 1),
    "alone": (192, False, None, 3),
    "a large network": (768, True, None, 3),
    "as many as the user says": (192, True, "3", 3),
}


@pytest.mark.parametrize(("d_model", "is_busy", "chosen", "left"), THREADS.values(), ids=THREADS)
def test_a_small_network_takes_one_thread_beside_others(
    monkeypatch, d_model, is_busy, chosen, left
):
    monkeypatch.setattr(openmp, "is_machine_busy", lambda: is_busy)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        leave_cores_to_others(d_model)
        assert torch.get_num_threads() == left
    finally:
        torch.set_num_threads(before)


ENTRIES = {
    "the command": (
        "import sys; import serve.cli.main; assert 'torch' not in sys.modules\n"
        "try: serve.cli.main.main(['tasks'])\nexcept SystemExit: pass\n"
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
    assert "set: 0\n" in done.stdout or "set: 10000\n" in done.stdout, done.stderr

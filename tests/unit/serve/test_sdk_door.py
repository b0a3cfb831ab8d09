"""Importing the SDK through ``serve.sdk``, in programs of their own."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import requests

import serve.sdk
from serve.sdk import sly

NAMES = ("__channelexec__", "worker.of.a.pool", "named in words")
PROGRAM = f"""
import sys
import serve.sdk
from PIL import ImageFile
kept = [name for name in {NAMES} if name in sys.modules]
found = (ImageFile.LOAD_TRUNCATED_IMAGES, kept, serve.sdk.sly.__name__)
sys.stdout.write(repr(found))
"""


def test_programs_under_names_that_are_no_modules_may_import_the_sdk():
    run = PROGRAM
    for name in NAMES:
        run = f"exec({run!r}, {{'__name__': {name!r}}})"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(False, [], 'supervisely')"


def test_a_platform_that_says_nothing_any_more_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(serve.sdk, "ANSWER_TIMEOUT_S", 0.1)
    monkeypatch.setenv("SUPERVISELY_SKIP_HTTPS_USER_HELPER_CHECK", "true")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        api = sly.Api(f"http://127.0.0.1:{silent.getsockname()[1]}", "token")
        with pytest.raises(requests.Timeout):
            api.post("projects.info", {"id": 1}, raise_error=True)

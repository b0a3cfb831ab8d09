"""Importing the SDK through ``serve.sdk``, in programs of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import serve.sdk
from PIL import ImageFile
found = (ImageFile.LOAD_TRUNCATED_IMAGES, __name__ in sys.modules, serve.sdk.sly.__name__)
sys.stdout.write(repr(found))
"""


@pytest.mark.parametrize("name", ["__channelexec__", "worker.of.a.pool", "named in words"])
def test_a_program_under_a_name_that_is_no_modules_may_import_the_sdk(name):
    run = f"exec({PROGRAM!r}, {{'__name__': {name!r}}})"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(False, False, 'supervisely')"

"""The engine needs neither the platform's SDK nor, at run time, the reference."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
for name in ("supervisely", "transformers"):
    sys.modules[name] = None
import importlib, pkgutil
import florence2, florence2.network
for module in pkgutil.iter_modules(florence2.network.__path__, "florence2.network."):
    importlib.import_module(module.name)
"""


def test_network_imports_without_sdk_and_reference():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)

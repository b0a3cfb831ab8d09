"""Where the platform starts the app: ``uvicorn serve.main:model.app``.

``python -m serve.main deploy`` and ``predict`` are the command line of the SDK.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

# The platform starts the app from a clone of the repository, where only dependencies are installed.
if importlib.util.find_spec("florence2") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from dotenv import load_dotenv

from florence2.errors import FlorenceError
from serve.app import Florence2App
from serve.console import complain
from serve.sdk import sly

if sly.is_development():
    load_dotenv("local.env")
    load_dotenv(os.path.expanduser("~/supervisely.env"))

try:
    model = Florence2App(use_gui=True, use_serving_gui_template=True)
    model.serve()
except FlorenceError as error:
    complain(str(error))
    sys.exit(2)

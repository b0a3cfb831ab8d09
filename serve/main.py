"""Where the platform starts the app: ``uvicorn serve.main:model.app``.

``python -m serve.main deploy`` and ``predict`` are the command line of the SDK.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# The platform starts the app from a clone of the repository, where only dependencies are installed.
if importlib.util.find_spec("florence2") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from serve.process import bound_spinning

# Later it would change nothing.
if "torch" not in sys.modules:
    bound_spinning()

from serve.process import log_like_the_sdk, start_or_end

if TYPE_CHECKING:
    from serve.app import Florence2App


def _made() -> Florence2App:
    # Imported here, as an import that fails is a start that fails.
    from dotenv import load_dotenv

    from serve.app import Florence2App
    from serve.sdk import sly

    log_like_the_sdk()
    if sly.is_development():
        load_dotenv("local.env")
        # Unlike Path.expanduser, it takes a user without a home.
        load_dotenv(os.path.expanduser("~/supervisely.env"))
    made = Florence2App(use_gui=True, use_serving_gui_template=True)
    made.serve()
    return made


model = start_or_end(_made)

"""The commands of ``florence2``, a module each.

A module has ``register(app)``, which adds its command to the typer app, and imports what it works
with inside the command: ``florence2 tasks`` must not wait for torch or the SDK.
"""

from __future__ import annotations

from importlib import import_module
from typing import Final

import typer

# In the order in which ``florence2 --help`` lists them.
MODULES: Final = ("label", "serve", "info", "parse", "benchmark", "evaluate", "train")


def register_all(app: typer.Typer) -> None:
    for name in MODULES:
        import_module(f"serve.cli.{name}").register(app)

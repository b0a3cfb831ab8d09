"""``python -m serve.settings`` writes the settings file and its documentation anew."""

from __future__ import annotations

from serve.cli.console import say
from serve.settings.generated import write_files

if __name__ == "__main__":
    for path in write_files():
        say(f"wrote {path}")

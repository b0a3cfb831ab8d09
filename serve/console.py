"""Where the command writes: results to stdout, everything about their making to stderr."""

from __future__ import annotations

import os
from typing import Final

from rich.console import Console

OUT: Final = Console(highlight=False, soft_wrap=True)
ERR: Final = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line for the person at the terminal, printed as it is."""
    ERR.print(text, markup=False)


def complain(text: str) -> None:
    """One sentence about what went wrong."""
    ERR.print(text, style=None if os.environ.get("NO_COLOR") else "bold red", markup=False)

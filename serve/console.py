"""Where the command writes: results to stdout, everything about their making to stderr."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import IO, Any, Final, cast

from rich.console import Console

# Control characters may stand in the names of files, and would command the terminal.
_SHOWN_CONTROLS: Final = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"
}


class _Unheard:
    """stderr, as long as somebody reads it: a run must not end because nobody does any more.

    The reader of a pipe may leave, a terminal be closed, the disk of a log be full.
    """

    def write(self, text: str) -> int:
        stream = _stderr()
        if stream is not None:
            try:
                return stream.write(text)
            except OSError:
                _redirect(stream)
        return len(text)

    def flush(self) -> None:
        stream = _stderr()
        if stream is not None:
            try:
                stream.flush()
            except OSError:
                _redirect(stream)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever a stream has
        if name == "rich_proxied_file":
            raise AttributeError(name)
        return getattr(sys.stderr, name)


def _stderr() -> IO[str] | None:
    """Past what rich puts in its place while it draws a bar, which writes through us."""
    return getattr(sys.stderr, "rich_proxied_file", sys.stderr)


def _redirect(stream: IO[str]) -> None:
    """Whatever is written from now on goes nowhere, also what the stream still holds."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


OUT: Final = Console(highlight=False, soft_wrap=True)
ERR: Final = Console(file=cast(IO[str], _Unheard()), highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Text of others that commands no terminal: its control characters are written out."""
    return text.translate(_SHOWN_CONTROLS)


def say(text: str) -> None:
    """One line for the person at the terminal, printed as it is."""
    ERR.print(printable(text), markup=False)


def complain(text: str) -> None:
    """One sentence about what went wrong."""
    style = None if os.environ.get("NO_COLOR") else "bold red"
    ERR.print(printable(text), style=style, markup=False)

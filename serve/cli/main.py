"""The ``florence2`` command. An error is one sentence; ``--debug`` adds where it came from.

Exit codes: 0 done, 1 done in part, 2 a request that cannot be done, 130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from florence2.errors import FlorenceError
from serve.console import complain
from serve.process import bound_spinning
from serve.version import VERSION

_DEBUG: Final = "--debug"
COMMANDS: Final = (
    "label",
    "serve",
    "info",
    "convert",
    "benchmark",
    "evaluate",
    "tune",
    "train",
    "upload",
    "upload_model",
    "runs",
    "undo",
)
"""In the order in which ``florence2 --help`` lists them."""


class _Commands(TyperGroup):
    """Typer itself says nothing where a command is interrupted."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - typer's own click's
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            complain("Interrupted.")
            raise typer.Exit(130) from error


app = typer.Typer(
    name="florence2",
    cls=_Commands,
    help="Label images with Florence-2: folders, videos, projects of the platform, clusters.",
    epilog="Add --debug to any command to see where an error came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _command in COMMANDS:
    # A command imports what it works with inside: ``florence2 tasks`` waits for no torch.
    import_module(f"serve.cli.{_command}").register(app)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"florence2 {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Which it is.")
    ] = False,
) -> None: ...


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command line and exits the process."""
    # Later it would change nothing.
    if "torch" not in sys.modules:
        bound_spinning()
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != _DEBUG]
    try:
        app(args=words, obj=tuple(words), prog_name="florence2")
    except FlorenceError as error:
        _end(error, str(error), 2, debug=_DEBUG in given)
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
        _end(error, f"A file or folder could not be used ({reason}).", 2, debug=_DEBUG in given)
    # The edge of the program: whatever it is, a labeler gets a sentence and not a traceback.
    except Exception as error:  # noqa: BLE001
        text = f"Something unexpected happened ({type(error).__name__}: {error})."
        _end(error, f"{text} Run again with {_DEBUG} to see where.", 2, debug=_DEBUG in given)


def _end(error: BaseException, text: str, code: int, *, debug: bool) -> None:
    if debug:
        typer.echo("".join(traceback.format_exception(error)), err=True)
    complain(text)
    sys.exit(code)


if __name__ == "__main__":
    main()

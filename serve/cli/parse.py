"""``florence2 parse``: a raw answer of a model, as a dictionary of objects."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from florence2.errors import RequestError
from florence2.records import SizeWh
from serve.cli.console import say

TaskName = Annotated[str, typer.Option(help="The task that was asked, for example <OD>.")]
Size = Annotated[str, typer.Option(metavar="WxH", help="The image's size in pixels.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write here instead of stdout.")]


def register(app: typer.Typer) -> None:
    app.command("parse")(parse)


def parse(task: TaskName, size: Size, file: JsonFile = None) -> None:
    """Read an answer from stdin and write its objects with coordinates in pixels."""
    from florence2.postprocess import parse_answer_text
    from florence2.tasks import find_task

    token, size_wh = find_task(task).token, _size_wh(size)
    result = parse_answer_text(token, _answer(), size_wh)
    for note in result.notes:
        say(f"Note: {note}.")
    text = json.dumps(result.to_dict(), ensure_ascii=False, indent=2)
    if file is None:
        typer.echo(text)
        return
    try:
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RequestError(
            f"The result goes into a writable file and {str(file)!r} is not ({error.strerror})."
        ) from error


def _answer() -> str:
    """All of stdin, without the newline that an editor or ``echo`` ends it with."""
    if sys.stdin.isatty():
        raise RequestError(
            "The answer to parse is read from stdin and nothing is piped in; "
            "write for example florence2 parse --task '<OD>' --size 640x480 < answer.txt."
        )
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise RequestError(f"An answer is UTF-8 text and stdin is not ({error.reason}).") from error


def _size_wh(size: str) -> SizeWh:
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*", size)
    if match is None or "0" in (match[1].lstrip("0") or "0", match[2].lstrip("0") or "0"):
        raise RequestError(
            f"A size is WIDTHxHEIGHT in pixels and got {size!r}; write for example 640x480."
        )
    return int(match[1]), int(match[2])

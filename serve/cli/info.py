"""``florence2 tasks``, ``models`` and ``parse``: the tables, and a raw answer as objects."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from florence2.errors import RequestError
from serve.console import OUT, say

TaskName = Annotated[str, typer.Option(help="The task that was asked, for example <OD>.")]
Size = Annotated[str, typer.Option(metavar="WxH", help="The image's size in pixels.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write here instead of stdout.")]
ModelNames = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME...",
        help="Instead of all names: these on this machine; also hub ids, folders and adapters.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def register(app: typer.Typer) -> None:
    app.command("models")(models)
    app.command("tasks")(tasks)
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


def _size_wh(size: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*", size)
    if match is None or "0" in (match[1].lstrip("0") or "0", match[2].lstrip("0") or "0"):
        raise RequestError(
            f"A size is WIDTHxHEIGHT in pixels and got {size!r}; write for example 640x480."
        )
    return int(match[1]), int(match[2])


def tasks(
    as_json: AsJson = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As in the README.")] = False,
) -> None:
    """List the task prompts: what each takes, what it gives, how long an answer may be."""
    rows = task_rows()
    if as_markdown:
        OUT.print(tasks_markdown(rows), markup=False)
    else:
        _show(rows, as_json)


def task_rows() -> list[dict[str, Any]]:
    from florence2.tasks import TASKS

    return [
        {
            "task": task.token,
            "name": task.name,
            "takes": task.takes.value,
            "gives": task.summary,
            "max_new_tokens": task.max_new_tokens,
        }
        for task in TASKS
    ]


def tasks_markdown(rows: list[dict[str, Any]]) -> str:
    names = ("task", "name", "takes", "gives")
    lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    for row in rows:
        cells = [f"`{row['task']}`", f"`{row['name']}`", row["takes"], row["gives"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def models(names: ModelNames = None, as_json: AsJson = False) -> None:
    """List the checkpoints by name: hub repository, size, and whether they are here, complete."""
    _show([_row_of(name) for name in names] if names else _model_rows(), as_json)


def _model_rows() -> list[dict[str, Any]]:
    from florence2.checkpoint.catalog import CHECKPOINT_NAMES, KNOWN_BY_NAME, resolve
    from florence2.errors import CheckpointError

    rows: list[dict[str, Any]] = []
    for name in CHECKPOINT_NAMES:
        known = KNOWN_BY_NAME.get(name)
        size = known.weights_bytes if known else 0
        try:
            folder = resolve(name, offline=True).folder
            here = "yes"
            size = size or sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        except CheckpointError:
            here = "no"
        rows.append(
            {
                "model": name,
                "hub": known.repository if known else "comes with the project",
                "revision": known.revision[:12] if known else "",
                "size_mb": round(size / 1e6),
                "complete_here": here,
            }
        )
    return rows


def _row_of(name: str) -> dict[str, Any]:
    """A checkpoint on this machine, or CheckpointError; of an adapter also its file and base."""
    from florence2.checkpoint.adapters import read_adapter
    from florence2.checkpoint.catalog import resolve

    found = resolve(name, offline=True)
    row: dict[str, Any] = {
        "model": name,
        "folder": str(found.folder),
        "revision": found.revision or "",
        "size_mb": round(sum((found.folder / file).stat().st_size for file in found.files) / 1e6),
        "adapter_sha256": "",
        "base": "",
        "base_revision": "",
    }
    if found.base is not None:
        adapter = read_adapter(found, found.base.name, found.base.revision)
        row["adapter_sha256"] = adapter.sha256
        row |= {"base": adapter.base, "base_revision": adapter.base_revision or ""}
    return row


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    # Whoever reads a pipe wants one row a line, however narrow a terminal is taken to be.
    (OUT if OUT.is_terminal else Console(width=1000, highlight=False)).print(table)

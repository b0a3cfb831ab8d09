"""``--overwrite``: an earlier run's files make room for a new one, and come back if it fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve.cli.console import say
from serve.labeling.files import Workspace
from serve.labeling.journal import JOURNAL_NAME, OUTPUT_MARKER, is_begun


@contextmanager
def set_aside(workspace: Workspace) -> Iterator[None]:
    """Moves an earlier run's files to a folder beside this one; the journal goes last.

    They come back when the new run labels nothing and ends with an error.
    """
    root = workspace.root.resolve()
    if not (root / JOURNAL_NAME).exists():
        yield
        return
    number = 1
    while (target := root.with_name(f"{root.name}.old-{number}")).exists():
        number += 1
    target.mkdir()
    # Before the first file comes: a kill midway must not make previews look like images.
    (target / OUTPUT_MARKER).touch()
    _move_all(root, target)
    say(f"The earlier labels are now in {target}")
    try:
        yield
    except BaseException:
        if not is_begun(root):
            for name in _names(root):
                shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()
            _move_all(target, root)
            (target / OUTPUT_MARKER).unlink()
            target.rmdir()
            say(f"The earlier labels are back in {root}")
        raise


def _names(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if not path.name.startswith(".")]


def _move_all(source: Path, target: Path) -> None:
    for name in sorted(_names(source), key=lambda name: name == JOURNAL_NAME):
        (source / name).rename(target / name)

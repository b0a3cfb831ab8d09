"""The settings file and the tables of its page of documentation, made from the schema."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Final, cast

from florence2.tasks import TASKS
from serve.settings.schema import KEYS, LET_THROUGH, SPELLINGS, ClientKeys, default_in_file

_PACKAGE: Final = Path(__file__).resolve().parents[1]
YAML_FILE: Final = _PACKAGE / "inference_settings.yaml"
DOCS_FILE: Final = _PACKAGE.parent / "docs" / "settings.md"

LEFT_OUT: Final = frozenset({"rectangle", "rectangles"})
"""Not in the settings file: the SDK takes a null under these names for a box, and fails."""

# Read by the SDK when it merges labels, so that people set it here too.
_SDK_KEY: Final = "existing_objects_iou_thresh"
_FIRST: Final = (
    '# Fill in what you need and leave the rest: what is null, "" or left out has its default.\n'
)
_EMPTY_TASK: Final = (
    "Empty: <CAPTION_TO_PHRASE_GROUNDING> when there is text or a mapping, <REGION_TO_CATEGORY> "
    "when there are regions, otherwise <OD>."
)
_OTHERS: Final = (
    "# Understood for other clients: the same under other names, and keys that they set "
    "themselves.\n"
)


def yaml_text() -> str:
    """The settings file: the keys that people edit with comments, then all other spellings."""
    edited = [name for name in KEYS if name not in ClientKeys.model_fields]
    others = [*ClientKeys.model_fields]
    others += [key for name in KEYS for key in SPELLINGS[name][1:]]
    nulls = "".join(f"{key}: null\n" for key in [*others, _SDK_KEY] if key not in LEFT_OUT)
    return "\n".join(
        [_FIRST, *(_block(name) for name in edited if name not in LEFT_OUT), _OTHERS + nulls]
    )


def text_with(text: str, values: Mapping[str, object]) -> str:
    """The settings file with other values, its comments and everything else as they are."""
    for name, value in values.items():
        # JSON is YAML on one line; a backslash in it is none of the pattern's.
        line = f"{name}: {json.dumps(value, ensure_ascii=False)}".replace("\\", r"\\")
        text, count = re.subn(rf"^{name}: .*$", line, text, count=1, flags=re.MULTILINE)
        text += "" if count else f"{name}: {json.dumps(value, ensure_ascii=False)}\n"
    return text


def docs_text() -> str:
    """The page with its tables made anew; the words around them are written by hand."""
    tables: dict[str, list[tuple[str, ...]]] = {
        "key | other spellings": [_cells(name) for name in KEYS],
        "token": [(_code(t.token), _code(t.name), t.takes.value, t.summary) for t in TASKS],
        "key | why": [(_code(key), why) for key, why in LET_THROUGH.items()],
    }
    page = DOCS_FILE.read_text(encoding="utf-8")
    for head, rows in tables.items():
        before, start, rest = re.split(rf"(\| {re.escape(head)} .*\n\|[- |]+\n)", page)
        after = re.sub(r"\A(\|.*\n)*", "", rest)
        page = before + start + "".join(f"| {' | '.join(cells)} |\n" for cells in rows) + after
    return page


def _block(name: str) -> str:
    lines = textwrap.wrap(_says(name), 96)
    if name == "task_prompt":
        widest = max(len(task.token) for task in TASKS)
        lines += textwrap.wrap(_EMPTY_TASK, 96)
        lines += [f"  {task.token:{widest}}  {task.summary}" for task in TASKS]
    return "".join(f"# {line}\n" for line in lines) + f"{name}: {json.dumps(_default(name))}\n"


def _says(name: str) -> str:
    return " ".join((KEYS[name].description or "").split())


def _default(name: str) -> object:
    """A key's value in the file: null where nothing plain says the default."""
    default = "" if name == "text" else default_in_file(name)
    is_plain = isinstance(default, str | float | bool) and name not in ClientKeys.model_fields
    return default if is_plain else None


def _cells(name: str) -> tuple[str, ...]:
    default = KEYS[name].default if name == "unknown_tags" else _default(name)
    return (
        _code(name),
        ", ".join(map(_code, SPELLINGS[name][1:])),
        str(cast("dict[str, object]", KEYS[name].json_schema_extra)["takes"]),
        _code(json.dumps(default)) if default not in (None, "") else "",
        # A token in angle brackets would vanish from a table of Markdown.
        re.sub(r"<[^<>]+>", lambda token: _code(token.group()), _says(name)),
    )


def _code(name: str) -> str:
    return f"`{name}`"

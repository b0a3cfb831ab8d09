"""The settings file and its documentation, both made from the tables of keys and of tasks."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from florence2.tasks import TASKS
from serve.settings.keys import KEYS, LEFT_OUT, LET_THROUGH, Key

_PACKAGE: Final = Path(__file__).resolve().parents[1]
YAML_FILE: Final = _PACKAGE / "inference_settings.yaml"
DOCS_FILE: Final = _PACKAGE.parent / "docs" / "settings.md"

# Read by the SDK when it merges labels, so that people set it here too.
_SDK_KEY: Final = "existing_objects_iou_thresh"
_WIDTH: Final = 96

_INTRO: Final = """\
# Fill in what you need and leave the rest: what is null, "" or left out has its default.
"""
_BELOW: Final = """\
# Understood for other clients: the same under other names, and keys that they set themselves.
"""

_PAGE: Final = """\
# Settings

What a request may say, by the settings file in the annotation tool or as the `settings` of a
request. Made by `python -m serve.settings`.

A key that is left out, `null` or empty has its default. The words `none` and `null` count as empty
too, except where a text is meant. Numbers may be written in digits inside quotes. A key may be
given under one spelling only, unless all say the same; one that has its default gives way.
A wrong value, or a key that is not listed on this page, is an error that names it.

| key | other spellings | takes | default | meaning |
| --- | --- | --- | --- | --- |
{keys}

## Tasks

`task_prompt` takes a token in any case, with or without its brackets, or the friendly name. Tasks
joined by `+` are asked one after the other: `<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>`. Left empty,
it is `<CAPTION_TO_PHRASE_GROUNDING>` when there is text, a mapping or a reference,
`<REGION_TO_CATEGORY>` when there are regions, and `<OD>` otherwise.

| token | name | takes | gives |
| --- | --- | --- | --- |
{tasks}

## Details

- **text**: every phrase is asked about on its own. A list is the same as its entries on lines of
  their own. At most 100 phrases of at most 1000 characters; tokens such as `<loc_7>` are refused.
- **mapping**: at most 100 classes of at most 20 prompts. A text is parted into prompts like `text`,
  entries of a list are prompts as they are, and a class without prompts is asked for by its name.
  A prompt belongs to one class. With a task that takes no text, labels that equal a prompt become
  its class.
- **classes**: names without `class_suffix`. Clients repeat the classes that the app tells them
  about: a list of nothing but the general ones (`object`, `text`, ...), or with all of them, counts
  as empty unless one of them was asked for.
- **confidence_threshold**: a mapping of classes to numbers is the same as `class_thresholds`. A
  list such as `[{{text_prompt: 0.1}}, {{reference_image: 0.9}}]` stands for its `text_prompt`.
- **rectangle, regions**: `[x1, y1, x2, y2]` in pixels with x2 and y2 outside, or a rectangle as the
  SDK writes it, whose last row and column are inside. With a `<REGION_...>` task and no regions,
  the rectangle is the region. What is over the image's edge is cut off; a box under a pixel, such
  as one from 0 to 1, is refused.
- **reference**: text and mapping are not looked at, and a task that takes no text gives way to
  `<CAPTION_TO_PHRASE_GROUNDING>`.
- **tiling**: `{{width, height, overlap, full_image}}`, or one number for both sides. Sides are 768
  by default and the overlap is 128 or a quarter of the side; `overlap: [x, y]` has one for each
  direction. `sliding_window_params` never includes the look at the whole image. What a window's
  edge cuts is joined with its other pieces; a piece inside an object that was seen whole goes,
  whatever its name. So that nothing is cut by every window, the overlap is at least as large as
  the objects.
- **class_suffix**: a request whose `settings` are `mapping`, `mode: text_prompt` and `text`, all
  three and nothing else, as the application Apply Florence-2 sends them, has the suffix `_bbox`,
  which that application takes off again. Any other request has the suffix that it names.

## Let through

These keys come with the requests of some clients and change nothing here.

| key | why |
| --- | --- |
{through}
"""


def yaml_text() -> str:
    """The settings file: the keys that people edit with comments, then all other spellings."""
    blocks = [_INTRO, *(_block(key) for key in KEYS if _is_on_top(key))]
    other = [key.name for key in KEYS if key.for_clients]
    other += [name for key in KEYS for name in key.spellings if name not in LEFT_OUT]
    return "\n".join([*blocks, _BELOW + "".join(f"{name}: null\n" for name in [*other, _SDK_KEY])])


def docs_text() -> str:
    """The page about all keys, spellings, types and defaults."""
    rows = [
        _row(
            _code(key.name),
            ", ".join(map(_code, key.spellings)),
            key.takes,
            _default(key),
            _plain(key.says),
        )
        for key in KEYS
    ]
    tasks = [_row(_code(t.token), _code(t.name), t.takes.value, t.summary) for t in TASKS]
    through = [_row(_code(name), why) for name, why in LET_THROUGH.items()]
    return _PAGE.format(keys="\n".join(rows), tasks="\n".join(tasks), through="\n".join(through))


def write_files() -> list[Path]:
    """Write both files; returns those that changed."""
    changed = []
    for path, text in ((YAML_FILE, yaml_text()), (DOCS_FILE, docs_text())):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


def _is_on_top(key: Key) -> bool:
    return not key.for_clients and key.name not in LEFT_OUT


def _block(key: Key) -> str:
    lines = textwrap.wrap(key.says, _WIDTH)
    if key.name == "task_prompt":
        lines += [*textwrap.wrap(_EMPTY_TASK, _WIDTH), *_task_lines()]
    comment = "".join(f"# {line}\n" for line in lines)
    return f"{comment}{key.name}: {json.dumps(key.default)}\n"


_EMPTY_TASK: Final = (
    "Empty: <CAPTION_TO_PHRASE_GROUNDING> when there is text or a mapping, <REGION_TO_CATEGORY> "
    "when there are regions, otherwise <OD>."
)


def _task_lines() -> Iterator[str]:
    widest = max(len(task.token) for task in TASKS)
    for task in TASKS:
        yield f"  {task.token:{widest}}  {task.summary}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(words: str) -> str:
    """Words for a table of Markdown, where a token in angle brackets would vanish."""
    return re.sub(r"<[^<>]+>", lambda token: _code(token.group()), words)


def _code(name: str) -> str:
    return f"`{name}`"


def _default(key: Key) -> str:
    return "" if key.default in (None, "") else _code(json.dumps(key.default))

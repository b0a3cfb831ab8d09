"""The page of ``GET /`` without the platform: try the model, see how to call it.

One document: no file, font or script of anywhere else, so it works without an internet.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Final

from florence2.tasks import TASKS, Task, TaskInput
from serve.http.page_script import SCRIPT
from serve.http.page_style import STYLE

# Only this page's own server may be asked, and nothing but its own script may run.
_POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'"
)

_INPUT_WORDS: Final = {
    TaskInput.NONE: "",
    TaskInput.TEXT: "a text",
    TaskInput.REGION: "a region",
    TaskInput.OPTIONAL_TEXT: "a text, if you like",
}


@dataclass(frozen=True, slots=True)
class PageInfo:
    """What the page says about the app; ``model_name`` is None while no model is loaded."""

    version: str
    model_name: str | None = None
    device: str = ""
    precision: str = ""
    runtime: str = ""
    notes: tuple[str, ...] = ()
    warning: str | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the form on the page can be used now."""
        return self.model_name is not None


def index_page(info: PageInfo) -> str:
    """The whole page as HTML."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            _head(),
            f'<body data-ready="{str(info.is_ready).lower()}">',
            _header(info),
            "<main>",
            _FORM.replace("{options}", _options()),
            _RESULT,
            _CALL,
            _task_table(),
            "</main>",
            f"<footer>Serve Florence-2 {escape(info.version)}</footer>",
            f"<script>{SCRIPT}</script>",
            "</body>",
            "</html>",
        ]
    )


def _head() -> str:
    return (
        '<head><meta charset="utf-8"><title>Florence-2</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<style>{STYLE}</style></head>"
    )


def _header(info: PageInfo) -> str:
    facts = [info.device, info.precision, info.runtime] if info.is_ready else []
    chips = "".join(f'<span class="chip">{escape(fact)}</span>' for fact in facts if fact)
    state = "ready" if info.is_ready else "waiting"
    words = "Ready" if info.is_ready else "No model is loaded yet"
    warning = f'<p class="warning" role="alert">{escape(info.warning)}</p>' if info.warning else ""
    notes = "".join(f"<p>Note: {escape(note)}</p>" for note in info.notes)
    return (
        f"<header><h1>{escape(info.model_name or 'Florence-2')}</h1>"
        f'<p><span class="chip {state}" role="status">{words}</span>{chips}</p>{warning}{notes}'
        "</header>"
    )


def _options() -> str:
    return "".join(_option(task) for task in TASKS)


def _option(task: Task) -> str:
    chosen = " selected" if task.token == "<OD>" else ""
    return (
        f'<option value="{escape(task.token)}" data-takes="{escape(task.takes.value)}"'
        f' data-summary="{escape(task.summary)}"{chosen}>'
        f"{escape(task.name.replace('_', ' '))}</option>"
    )


def _task_table() -> str:
    rows = [
        f"<tr><td><code>{escape(task.token)}</code></td><td>{escape(_INPUT_WORDS[task.takes])}</td>"
        f"<td>{escape(task.summary)}</td></tr>"
        for task in TASKS
    ]
    return (
        '<section class="wide"><h2>Tasks</h2><div class="scroll"><table id="tasks"><thead><tr>'
        "<th>Task prompt</th><th>Needs besides the image</th><th>Gives</th></tr></thead><tbody>"
        f"{''.join(rows)}</tbody></table></div></section>"
    )


_FORM: Final = """\
<section><h2>Try it</h2>
<form id="form">
<label>Image <input id="file" type="file" accept="image/*" required></label>
<label>Task <select id="task">{options}</select></label>
<p id="summary"></p>
<label id="text-row">Text
<input id="text" type="text" placeholder="a red car. a traffic light" autocomplete="off"></label>
<label id="region-row">Region in pixels, or drag on the image
<input id="region" type="text" placeholder="left, top, right, bottom"
autocomplete="off"></label>
<details><summary>More settings</summary>
<label>As JSON, added to the above
<textarea id="more" rows="3" spellcheck="false" placeholder='{"confidence_threshold": 0.3}'>\
</textarea></label></details>
<button id="run" type="submit">Ask</button>
</form>
<p id="message" role="status" aria-live="polite"></p>
</section>"""

_RESULT: Final = """\
<section id="result"><h2>Answer</h2>
<div id="stage"><canvas id="canvas" role="img" aria-label="No image chosen"></canvas>
<p id="hint">Choose an image, or drop one here.</p></div>
<div id="tags"></div>
<div class="scroll"><table id="objects" hidden><thead><tr><th>Class</th><th>Shape</th>
<th>Confidence</th></tr></thead><tbody></tbody></table></div>
<details id="raw" hidden><summary>The answer as JSON</summary><pre></pre></details>
</section>"""

_CALL: Final = """\
<section class="wide"><h2>Call it</h2>
<p>The same request from a shell:</p>
<pre id="curl" tabindex="0"></pre>
<p>More: <a href="tasks">tasks as JSON</a> and <a href="metrics">metrics</a>.</p>
<details id="settings"><summary>All settings</summary><pre tabindex="0">Loading…</pre></details>
</section>"""

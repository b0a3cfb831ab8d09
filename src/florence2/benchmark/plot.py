"""Draws the rows as bars: how many times as long as ours the reference takes. Plain SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final
from xml.sax.saxutils import escape

from florence2.benchmark.rows import Row

_WIDTH: Final = 860
_BARS_X: Final = 310
_BARS_WIDTH: Final = 480
_BAR_HEIGHT: Final = 13
_ROW_GAP: Final = 14
_TOP: Final = 78
_BOTTOM: Final = 56

_BARS: Final = (
    ("fp32", "reference in float32", "ratio_fp32", "reference_fp32"),
    ("bf16", "reference in bfloat16", "ratio_bf16", "reference_bf16"),
)

# An <img> has no colours of the page around it, so both themes are written down here.
_STYLE: Final = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.title { font-size: 15px; font-weight: 600 }
.axes, .note { fill: #57606a }
.fp32 { fill: #2f81c7 }
.bf16 { fill: #d4812a }
.one { stroke: #57606a; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .axes, .note { fill: #9aa4af }
  .fp32 { fill: #58a6e6 }
  .bf16 { fill: #e8a04c }
  .one { stroke: #9aa4af }
}
"""


def draw_plot(rows: Sequence[Row], machine: Mapping[str, Any]) -> str:
    """An SVG with two bars for each row that has a ratio; the dashed line is our own time."""
    shown = [row for row in rows if row.ratio_fp32 is not None or row.ratio_bf16 is not None]
    step = len(_BARS) * _BAR_HEIGHT + _ROW_GAP
    height = _TOP + step * len(shown) + _BOTTOM
    ratios = [ratio for row in shown for ratio in (row.ratio_fp32, row.ratio_bf16) if ratio]
    scale = _BARS_WIDTH / max([1.0, *ratios])
    parts = [_head(height), *_legend(), _line_at_one(scale, height)]
    for place, row in enumerate(shown):
        parts += _bars_of(row, _TOP + step * place, scale)
    parts += [_text(16, height - 18, _machine_line(machine), "note"), "</svg>"]
    return "\n".join(parts) + "\n"


def _head(height: int) -> str:
    title = "Time of the reference's generate() over ours"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" role="img">',
            f"<title>{title}</title>",
            f"<style>{_STYLE}</style>",
            _text(16, 26, title, "title"),
        ]
    )


def _legend() -> list[str]:
    parts = []
    for place, (kind, label, _, _) in enumerate(_BARS):
        x = 16 + place * 170
        parts.append(f'<rect class="{kind}" x="{x}" y="40" width="12" height="12" rx="2"/>')
        parts.append(_text(x + 18, 50, label))
    parts.append(
        _text(
            16 + len(_BARS) * 170, 50, "longer is better; the dashed line is our own time", "note"
        )
    )
    return parts


def _line_at_one(scale: float, height: int) -> str:
    x = _BARS_X + scale
    return f'<line class="one" x1="{x:.1f}" y1="62" x2="{x:.1f}" y2="{height - _BOTTOM + 6}"/>'


def _bars_of(row: Row, top: int, scale: float) -> list[str]:
    parts = [
        _text(16, top + 11, f"{row.size}, ours in {row.precision}"),
        _text(16, top + 25, _axes_of(row), "axes"),
    ]
    for place, (kind, _, name, side) in enumerate(_BARS):
        ratio = getattr(row, name)
        y = top + place * _BAR_HEIGHT
        if ratio is None:
            reason = "failed" if side in row.failed else "not measured"
            parts.append(_text(_BARS_X + 4, y + 10, reason, "note"))
            continue
        width = ratio * scale
        parts.append(
            f'<rect class="{kind}" x="{_BARS_X}" y="{y}" width="{width:.1f}" '
            f'height="{_BAR_HEIGHT - 1}" rx="2"/>'
        )
        # A short bar's figure stands behind the dashed line, not on it.
        parts.append(_text(_BARS_X + max(width, scale) + 5, y + 10, f"{ratio:.2f}x"))
    return parts


def _axes_of(row: Row) -> str:
    images = "1 image" if row.batch == 1 else f"{row.batch} images"
    each = "" if row.batch == 1 else " each"
    prompts = f"1 prompt{each}" if row.prompts == 1 else f"{row.prompts} prompts{each}"
    beams = "1 beam" if row.beams == 1 else f"{row.beams} beams"
    return f"{images}, {prompts}, {row.tokens} tokens, {beams}"


def _machine_line(machine: Mapping[str, Any]) -> str:
    versions = f"torch {machine.get('torch')}, transformers {machine.get('transformers')}"
    where = machine.get("gpu") or f"{machine.get('threads')} threads of {machine.get('processor')}"
    return f"{where}; {versions}; random weights, answers forced to full length"


def _text(x: float, y: float, content: str, kind: str | None = None) -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'

"""How the rows are shown: a sentence each, one table with the notes below it, and bars in SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final
from xml.sax.saxutils import escape

from rich.console import Console
from rich.table import Table

from florence2.benchmark.results import REFERENCE_BF16, REFERENCE_FP32, Growth, Row, growth_of
from florence2.benchmark.sides import OTHERS, OURS

# A fixed width: columns cut to a pipe's 80 characters would be useless.
_TABLE_WIDTH: Final = 178
_STAGES: Final = ("preprocess", "vision", "prompt", "decode")
_SIDES: Final = {
    OURS: "ours",
    REFERENCE_FP32: "the reference in fp32",
    REFERENCE_BF16: "the reference in bf16",
    OTHERS: "one prompt at a time",
}
_HEADING: Final = (
    "seconds and MiB: ours / generate() of transformers in fp32; ratios: generate() in fp32, "
    "in bf16, and one prompt at a time, over ours; all in the same run"
)


def row_sentence(row: Row) -> str:
    """What is said while the run goes on."""
    axes = (
        f"{row.size} {row.form}, batch {row.batch}, prompts {row.prompts}, "
        f"beams {row.beams}, tokens {row.tokens}"
    )
    if row.ours_s is None:
        return f"{axes}: failed: {row.failed.get(OURS, 'no figure')}"
    if row.ratio_fp32 is None:
        return f"{axes}: {row.ours_s:.2f} s, the reference failed: {row.failed[REFERENCE_FP32]}"
    return f"{axes}: {row.ours_s:.2f} s, the reference takes {row.ratio_fp32:.2f} times as long"


def print_results(rows: Sequence[Row]) -> None:
    """The table, what is to be known about its figures, and how the cost grows."""
    console = Console(width=_TABLE_WIDTH, highlight=False)
    console.print(_table(rows))
    for line in (*_notes(rows), *(_growth_sentence(one) for one in growth_of(rows))):
        console.print(line, markup=False)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title=_HEADING, box=None)
    for name in ("size", "precision", "batch", "prompts", "beams", "tokens"):
        table.add_column(name)
    ratios = ("fp32", "bf16", "one by one")
    for name in (*_STAGES, "whole", *ratios, "MiB", "same", "runs"):
        table.add_column(name, justify="right")
    for row in rows:
        axes = (row.size, row.form, row.batch, row.prompts, row.beams, row.tokens)
        table.add_row(*(str(axis) for axis in axes), *_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    ours, reference = row.stages_s.get(OURS, {}), row.stages_s.get(REFERENCE_FP32, {})
    stages = [(ours.get(f"{name}_s"), reference.get(f"{name}_s")) for name in _STAGES]
    counted = "*" if row.others_measured_asks not in (None, row.asks) else ""
    return [
        *(_pair(*stage) for stage in stages),
        _pair(row.ours_s, row.reference_fp32_s),
        _ratio(row.ratio_fp32),
        _ratio(row.ratio_bf16),
        _ratio(row.ratio_others) + counted,
        _pair(row.peak_memory_mib, row.reference_peak_memory_mib, ".0f"),
        {True: "yes", False: "no", None: "-"}[row.same_tokens],
        "/".join(str(row.runs.get(side, 0)) for side in _SIDES),
    ]


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = [
        "runs: timed runs of ours, of the reference in fp32 and bf16, and one by one. "
        "same: the tokens are those of the reference in fp32."
    ]
    for row in rows:
        where = f"{row.size} {row.form} {row.batch}x{row.prompts}x{row.beams}x{row.tokens}"
        notes += [
            f"{where} (batch x prompts x beams x tokens): {_SIDES[side]} measured on {count} of "
            f"{row.asks} answers and counted over all."
            for side, count in row.measured_asks.items()
            if count < row.asks
        ]
        notes += [f"{where}: {_SIDES[side]} failed: {why}." for side, why in row.failed.items()]
    return notes


def _growth_sentence(growth: Growth) -> str:
    theirs = [
        f"{_SIDES[side]} {slope:.2f} s" for side, slope in growth.slopes_s.items() if side != OURS
    ]
    each = ", ".join(f"{value:.2f}" for value in growth.each_s[OURS])
    counts = ", ".join(str(count) for count in growth.counts)
    return (
        f"{growth.size} {growth.precision}, {growth.beams} beams, {growth.tokens} tokens: each "
        f"further {growth.per} costs {growth.slopes_s[OURS]:.2f} s ({'; '.join(theirs)}); "
        f"seconds per {growth.per} at {counts}: {each}."
    )


def _pair(ours: float | None, reference: float | None, form: str = ".2f") -> str:
    return f"{_shown(ours, form)} / {_shown(reference, form)}"


def _ratio(value: float | None) -> str:
    return _shown(value, ".2f", "x")


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


# The plot

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
        _text(16, top + 11, f"{row.size}, ours in {row.form}"),
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

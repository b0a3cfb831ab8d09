"""A report as one HTML file that opens offline: tables, curves as SVG, pictures inside of it.

Everything that is put in is text, and escaped: names of classes and files are other people's.
"""

from __future__ import annotations

import html
import io
import math
import unicodedata
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from PIL import Image

_STYLE: Final = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: Canvas; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number, td.short { white-space: pre; }
td:first-child { min-width: 6rem; max-width: 40vw; overflow-wrap: anywhere; }
td.short:first-child { white-space: pre-wrap; }
td svg { display: block; max-width: none; }
@media (max-width: 40rem) { th, td { padding: .25rem .45rem; } td svg { width: 7rem; } }
pre { border: 1px solid var(--line); padding: .6rem; white-space: pre-wrap; }
pre, figcaption { overflow-wrap: anywhere; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; max-width: min(30rem, 100%); }
figure { vertical-align: top; } figure img { max-width: 100%; } figcaption { opacity: .8; }
.verdict { border-left: .35rem solid; font-size: 1.15rem; font-weight: 600; padding: .4rem .9rem; }
.verdict { overflow-wrap: anywhere; }
.good { border-color: #009e73; } .warning { border-color: #e69f00; } .bad { border-color: #d52b00; }
.counts { display: flex; flex-wrap: wrap; gap: .4rem 2rem; margin: 1rem 0; }
.counts div { display: flex; flex-direction: column-reverse; }
.counts dt { opacity: .8; } .counts dd { font-size: 1.5rem; margin: 0; }
.counts dd { font-variant-numeric: tabular-nums; }
.thumbnails { display: grid; gap: 1rem; }
.thumbnails { grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
.thumbnails figure { margin: 0; } .thumbnails img { display: block; margin-bottom: .2rem; }
.thumbnails figcaption { font-size: .85rem; line-height: 1.35; }
td.long { min-width: min(14rem, 45vw); overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
"""
# Distinct for people who see few colours too, on light and on dark.
COLORS: Final = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a6761d", "#7570b3",
)  # fmt: skip
_WIDTH, _HEIGHT = 520, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 44
_TICKS: Final = 5
_JPEG_QUALITY: Final = 85
_SHORT: Final = 24
"""Cells of so many characters have the lines that they have, and no others."""
_LONG: Final = 60
"""Cells of more are wide enough to be read, also on a narrow screen."""
_BARS_WH: Final = (160, 46)
_BARS_LABELS: Final = 14


Tone = Literal["good", "warning", "bad"]


@dataclass(frozen=True, slots=True)
class Link:
    """Text that leads somewhere; without ``href`` it is text alone.

    ``href`` is a relative path that is percent-encoded, or an address of http or https.
    """

    text: str
    href: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of equal bins between ``low`` and ``high``, as small bars in a table's cell."""

    counts: Sequence[int]
    low: float = 0.0
    high: float = 1.0

    def __str__(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A small picture, as the bytes of a JPEG, with what is said about it, a line each."""

    jpeg: bytes
    lines: Sequence[Link]


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line through points (x, y); points that are no numbers are left out."""

    name: str
    points: Sequence[tuple[float, float]]


class HtmlReport:
    """A page that grows by sections, tables, curves and pictures, and is written once."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts = [f"<h1>{escaped(title)}</h1>"]

    def section(self, title: str) -> None:
        self._parts.append(f"<h2>{escaped(title)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escaped(text)}</p>")

    def verdict(self, text: str, tone: Tone) -> None:
        """The one sentence that is to be read first."""
        self._parts.append(f'<p class="verdict {tone}">{escaped(text)}</p>')

    def counts(self, counts: Sequence[tuple[str, int | str]]) -> None:
        """Large figures beside each other, each with its name."""
        cells = (
            f"<div><dt>{escaped(name)}</dt><dd>{escaped(_grouped(count))}</dd></div>"
            for name, count in counts
        )
        self._parts.append(f'<dl class="counts">{"".join(cells)}</dl>')

    def code(self, text: str) -> None:
        """A command or file, as it is."""
        self._parts.append(f"<pre>{escaped(text)}</pre>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table; numbers stand right, floats with three digits, and None is empty.

        A cell may be a ``Link`` or a ``Histogram``.
        """
        if not rows:
            return
        is_number = [
            all(isinstance(row[place], int | float | None) for row in rows)
            for place in range(len(head))
        ]
        lines = [_row("th", head, is_number), *(_row("td", row, is_number) for row in rows)]
        self._parts.append(f"<table>{''.join(lines)}</table>")

    def curves(
        self,
        curves: Sequence[Curve],
        x_label: str,
        y_label: str,
        *,
        y_range: tuple[float, float] | None = None,
        x_range: tuple[float, float] | None = None,
    ) -> None:
        """Lines in one picture, with a legend where there are several."""
        named = [
            Curve(one.name, [point for point in one.points if all(map(math.isfinite, point))])
            for one in curves
        ]
        self._parts.append(
            _svg([one for one in named if one.points], x_label, y_label, x_range, y_range)
        )

    def picture(self, picture: Image.Image, caption: str) -> None:
        """A picture as JPEG, in the file itself; pictures in a row stand side by side."""
        encoded = io.BytesIO()
        picture.convert("RGB").save(encoded, "JPEG", quality=_JPEG_QUALITY)
        self._parts.append(_figure(encoded.getvalue(), caption, escaped(caption)))

    def thumbnails(self, thumbnails: Sequence[Thumbnail]) -> None:
        """Small pictures in a grid."""
        figures = (
            _figure(one.jpeg, ", ".join(map(str, one.lines)), "<br>".join(map(_link, one.lines)))
            for one in thumbnails
        )
        self._parts.append(f'<div class="thumbnails">{"".join(figures)}</div>')

    def render(self) -> str:
        """The whole page."""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            # Also what would slip through could load and run nothing.
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escaped(self._title)}</title><style>{_STYLE}</style></head>\n<body>\n"
            + "\n".join(self._parts)
            + "\n</body></html>\n"
        )

    def write(self, path: Path) -> None:
        """The page into a file, which is whole or as it was."""
        part = path.with_name(f".{path.name}.part")
        part.write_text(self.render(), "utf-8")
        part.replace(path)


def escaped(text: str) -> str:
    """Text that stands for itself in HTML, also in an attribute; control characters are shown."""
    shown = "".join(
        char if char == "\n" or unicodedata.category(char) not in ("Cc", "Cs") else repr(char)[1:-1]
        for char in text
    )
    return html.escape(shown)


def _figure(jpeg: bytes, said: str, caption_html: str) -> str:
    data = b64encode(jpeg).decode("ascii")
    return (
        f'<figure><img alt="{escaped(said)}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{caption_html}</figcaption></figure>"
    )


def _grouped(count: int | str) -> str:
    return f"{count:,}" if isinstance(count, int) else count


def _link(link: Link) -> str:
    text = escaped(link.text)
    scheme = urlsplit(link.href).scheme
    if not link.href or scheme not in ("", "http", "https"):
        return text
    return f'<a href="{escaped(link.href)}">{text}</a>'


def _bars(bars: Histogram) -> str:
    """Heights are of the most; what is there at all can be seen."""
    most, width = max((*bars.counts, 1)), _BARS_WH[0] / max(len(bars.counts), 1)
    height = _BARS_WH[1] - _BARS_LABELS
    outline = []
    for place, count in enumerate(bars.counts):
        if count:
            tall = max(1.5, count / most * height)
            outline.append(f"M{place * width:.1f} {height}v-{tall:.1f}h{width - 1:.1f}v{tall:.1f}z")
    said = ", ".join(map(str, bars.counts))
    return (
        f'<svg viewBox="0 0 {_BARS_WH[0]} {_BARS_WH[1]}" width="{_BARS_WH[0]}" '
        f'height="{_BARS_WH[1]}" role="img" aria-label="{said}">'
        f'<path d="{"".join(outline)}" fill="{COLORS[0]}"/>'
        f'<path d="M0 {height + 0.5}h{_BARS_WH[0]}" stroke="currentColor" stroke-opacity="0.3"/>'
        f"{_svg_text(0, _BARS_WH[1] - 1, f'{bars.low:g}', 'start')}"
        f"{_svg_text(_BARS_WH[0], _BARS_WH[1] - 1, f'{bars.high:g}', 'end')}</svg>"
    )


def _row(tag: str, cells: Sequence[object], is_number: Sequence[bool]) -> str:
    parts = []
    for cell, number in zip(cells, is_number, strict=True):
        text = _cell(cell)
        said = len(str(cell))
        kind = "number" if number else "short" if said <= _SHORT else "long" if said > _LONG else ""
        parts.append(f'<{tag} class="{kind}">{text}</{tag}>' if kind else f"<{tag}>{text}</{tag}>")
    return f"<tr>{''.join(parts)}</tr>"


def _cell(cell: object) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, Link):
        return _link(cell)
    if isinstance(cell, Histogram):
        return _bars(cell)
    return f"{cell:.3f}" if isinstance(cell, float) else escaped(str(cell))


def _svg(
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None,
    y_range: tuple[float, float] | None,
) -> str:
    xs = [x for one in curves for x, _ in one.points]
    ys = [y for one in curves for _, y in one.points]
    x_low, x_high = x_range or _range(xs)
    y_low, y_high = y_range or _range(ys)
    inner_wh = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - x_low) / (x_high - x_low) * inner_wh[0]
        up = (y - y_low) / (y_high - y_low) * inner_wh[1]
        return _LEFT + right, _HEIGHT - _BOTTOM - up

    legend = curves if len(curves) > 1 else ()
    height = _HEIGHT + 18 * len(legend)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img">']
    for step in range(_TICKS + 1):
        x = x_low + (x_high - x_low) * step / _TICKS
        y = y_low + (y_high - y_low) * step / _TICKS
        at_x, at_y = place(x, y)
        parts += [
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at_y:.1f}" y2="{at_y:.1f}" '
            'stroke="currentColor" stroke-opacity="0.15"/>',
            _svg_text(_LEFT - 6, at_y + 4, f"{y:.4g}", "end"),
            _svg_text(at_x, _HEIGHT - _BOTTOM + 16, f"{x:.4g}", "middle"),
        ]
    parts += [
        _svg_text(_LEFT + inner_wh[0] / 2, _HEIGHT - 8, x_label, "middle"),
        f'<g transform="rotate(-90 12 {_HEIGHT / 2})">'
        f"{_svg_text(12, _HEIGHT / 2, y_label, 'middle')}</g>",
    ]
    for number, one in enumerate(curves):
        color = COLORS[number % len(COLORS)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in one.points))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
    for number, one in enumerate(legend):
        at_y = _HEIGHT + 12 + 18 * number
        color = COLORS[number % len(COLORS)]
        parts += [
            f'<rect x="{_LEFT}" y="{at_y - 9}" width="12" height="10" fill="{color}"/>',
            _svg_text(_LEFT + 20, at_y, one.name, "start"),
        ]
    return "".join((*parts, "</svg>"))


def _svg_text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The least and the most, apart from each other."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if low < high else (low - 0.5, high + 0.5)

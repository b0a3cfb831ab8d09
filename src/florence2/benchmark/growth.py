"""How the cost grows with images and with prompts: what one more of them costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from florence2.benchmark.rows import OURS, SIDES, Row

AXES: Final = {"image": "batch", "prompt": "prompts"}
"""What is counted, and the column that counts it."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Seconds of each further image, or prompt of one image, with all else the same.

    ``slopes_s`` is a least-squares line through the rows with these ``counts``, by side;
    ``each_s`` are the seconds per image or prompt of each of the rows.
    """

    per: str
    size: str
    runtime: str
    precision: str
    beams: int
    tokens: int
    counts: tuple[int, ...]
    slopes_s: dict[str, float]
    each_s: dict[str, tuple[float, ...]]


def growth_of(rows: Sequence[Row]) -> list[Growth]:
    """One record for every series of at least two rows that differ in one count only."""
    found = []
    for per, counted in AXES.items():
        series: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
        others = [name for name in AXES.values() if name != counted]
        for row in rows:
            if all(getattr(row, name) == 1 for name in others):
                same = (row.size, row.runtime, row.precision, row.beams, row.tokens)
                series[same].append(row)
        for same, members in series.items():
            by_count = {getattr(row, counted): row for row in members}
            found += _growth(per, same, dict(sorted(by_count.items())))
    return found


def _growth(per: str, same: tuple[Any, ...], rows: dict[int, Row]) -> list[Growth]:
    slopes: dict[str, float] = {}
    each: dict[str, tuple[float, ...]] = {}
    for side in SIDES:
        whole = [row.seconds[side] for row in rows.values()]
        seconds = [value for value in whole if value is not None]
        if len(rows) > 1 and len(seconds) == len(rows):
            slopes[side] = _slope(list(rows), seconds)
            each[side] = tuple(value / count for count, value in zip(rows, seconds, strict=True))
    if OURS not in slopes:
        return []
    size, runtime, precision, beams, tokens = same
    return [Growth(per, size, runtime, precision, beams, tokens, tuple(rows), slopes, each)]


def _slope(counts: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of the least-squares line."""
    mean_count, mean_s = sum(counts) / len(counts), sum(seconds) / len(seconds)
    together = sum(
        (count - mean_count) * (value - mean_s)
        for count, value in zip(counts, seconds, strict=True)
    )
    return together / sum((count - mean_count) ** 2 for count in counts)

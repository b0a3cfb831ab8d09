"""The rows of the table, made of the runs of all sides; how the cost grows; and a run's file."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from florence2.benchmark.plan import Case, Subject
from florence2.benchmark.sides import OTHERS, OURS, STAGES, Measured
from florence2.errors import RequestError
from florence2.runtimes.device import choose_device

REFERENCE_FP32: Final = "reference_fp32"
REFERENCE_BF16: Final = "reference_bf16"
SIDES: Final = (OURS, REFERENCE_FP32, REFERENCE_BF16, OTHERS)
COUNTED_AXES: Final = {"image": "batch", "prompt": "prompts"}
"""What is counted, and the column that counts it."""
_PROCESSOR: Final = Path("/proc/cpuinfo")
_INSTRUCTIONS: Final = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; None is a figure that was not asked for or could not be had.

    Seconds are medians of whole cases: ``batch`` images with ``prompts`` prompts each. A ratio is
    how many times as long as ours the other side takes. Memory is the larger of what loading and
    running took at most, in MiB. The dictionaries have an entry for each side: the seconds of its
    stages, how many runs were timed, how many answers of each run were (where fewer than all, the
    seconds are those times all over measured), and why it has no figure.
    """

    size: str
    runtime: str
    precision: str
    batch: int
    prompts: int
    beams: int
    tokens: int
    ours_s: float | None
    reference_fp32_s: float | None
    reference_bf16_s: float | None
    others_s: float | None
    ratio_fp32: float | None
    ratio_bf16: float | None
    ratio_others: float | None
    peak_memory_mib: float | None
    reference_peak_memory_mib: float | None
    others_measured_asks: int | None
    same_tokens: bool | None
    stages_s: dict[str, dict[str, float]] = field(default_factory=dict)
    memory_mib: dict[str, dict[str, float]] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
    measured_asks: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def asks(self) -> int:
        """Answers of the whole case."""
        return self.batch * self.prompts

    @property
    def form(self) -> str:
        """The precision of ours, and the runtime where it is not torch."""
        return self.precision if self.runtime == "torch" else f"{self.precision} {self.runtime}"

    @property
    def seconds(self) -> dict[str, float | None]:
        """The whole case's seconds by side."""
        values = (self.ours_s, self.reference_fp32_s, self.reference_bf16_s, self.others_s)
        return dict(zip(SIDES, values, strict=True))


def make_row(
    subject: Subject,
    case: Case,
    runs: Mapping[str, Sequence[Measured]],
    failed: Mapping[str, str],
    same_tokens: bool | None,
) -> Row:
    """The row of one thing of ours; ``runs`` are the timed ones of each side that has any."""
    seconds = {
        side: statistics.median(run.whole_s for run in found) for side, found in runs.items()
    }
    peaks = {
        side: max(max(run.loading_mib, run.running_mib) for run in found)
        for side, found in runs.items()
    }
    measured = {side: min(run.measured_asks for run in found) for side, found in runs.items()}
    return Row(
        **asdict(subject),
        **asdict(case),
        ours_s=seconds.get(OURS),
        reference_fp32_s=seconds.get(REFERENCE_FP32),
        reference_bf16_s=seconds.get(REFERENCE_BF16),
        others_s=seconds.get(OTHERS),
        ratio_fp32=_ratio(seconds, REFERENCE_FP32),
        ratio_bf16=_ratio(seconds, REFERENCE_BF16),
        ratio_others=_ratio(seconds, OTHERS),
        peak_memory_mib=peaks.get(OURS),
        reference_peak_memory_mib=peaks.get(REFERENCE_FP32),
        others_measured_asks=measured.get(OTHERS),
        same_tokens=same_tokens,
        stages_s={side: _stages(found) for side, found in runs.items()},
        memory_mib={side: _memory(found) for side, found in runs.items()},
        runs={side: len(found) for side, found in runs.items()},
        measured_asks=measured,
        failed=dict(failed),
    )


def have_same_tokens(ours: Measured, reference: Measured) -> bool:
    """Whether the answers that both sides measured are the same."""
    pairs = zip(ours.token_ids, reference.token_ids, strict=True)
    return all(mine == theirs for mine, theirs in pairs if None not in (mine, theirs))


def _ratio(seconds: Mapping[str, float], side: str) -> float | None:
    return seconds[side] / seconds[OURS] if side in seconds and OURS in seconds else None


def _stages(runs: Sequence[Measured]) -> dict[str, float]:
    """Medians by stage, of the whole case where only a part of it was measured."""
    whole = [run.whole_stages_s for run in runs]
    return {stage: statistics.median(stages_s[stage] for stages_s in whole) for stage in STAGES}


def _memory(runs: Sequence[Measured]) -> dict[str, float]:
    return {
        "loading": max(run.loading_mib for run in runs),
        "running": max(run.running_mib for run in runs),
    }


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
    for per, counted in COUNTED_AXES.items():
        series: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
        others = [name for name in COUNTED_AXES.values() if name != counted]
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


def describe_machine(device: str) -> dict[str, Any]:
    """Processor, cores, memory and versions; nothing that names the machine or its user."""
    import transformers

    found = {
        "processor": _field("model name") or platform.processor() or platform.machine(),
        "instructions": [name for name in _INSTRUCTIONS if name in _field("flags").split()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    chosen = choose_device(device)
    if chosen.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(chosen)
    return found


def _field(name: str) -> str:
    """The first value of a line of the processor's description, "" where there is none."""
    if not _PROCESSOR.is_file():
        return ""
    for line in _PROCESSOR.read_text(encoding="utf-8").splitlines():
        label, _, value = line.partition(":")
        if label.strip() == name:
            return value.strip()
    return ""


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def save_rows(path: Path, machine: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Writes all rows so far, so that a kill leaves the file as it was or as it should be."""
    growth = [asdict(one) for one in growth_of(rows)]
    content = {"machine": dict(machine), "rows": [asdict(row) for row in rows], "growth": growth}
    write_text(path, json.dumps(content, indent=2) + "\n")


def load_rows(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The machine and the rows of a file; RequestError for one that has none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content["machine"]), [Row(**values) for values in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"A saved run is a file that florence2 benchmark --json wrote, and {path} is none; "
            "name such a file."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` whole or not at all, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)

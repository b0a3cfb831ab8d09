"""The rows of the table, made of the runs of all sides."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from florence2.benchmark.case import STAGES, Case
from florence2.benchmark.plan import Subject
from florence2.benchmark.process import Measured

OURS: Final = "ours"
REFERENCE_FP32: Final = "reference_fp32"
REFERENCE_BF16: Final = "reference_bf16"
OTHERS: Final = "others"
SIDES: Final = (OURS, REFERENCE_FP32, REFERENCE_BF16, OTHERS)


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
        side: statistics.median(run.timing.whole_s for run in found) for side, found in runs.items()
    }
    peaks = {
        side: max(max(run.loading_mib, run.running_mib) for run in found)
        for side, found in runs.items()
    }
    measured = {
        side: min(run.timing.measured_asks for run in found) for side, found in runs.items()
    }
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


def row_from_dict(values: Mapping[str, Any]) -> Row:
    """A row as ``dataclasses.asdict`` wrote it into a JSON file."""
    return Row(**values)


def have_same_tokens(ours: Measured, reference: Measured) -> bool:
    """Whether the answers that both sides measured are the same."""
    pairs = zip(ours.timing.token_ids, reference.timing.token_ids, strict=True)
    return all(mine == theirs for mine, theirs in pairs if None not in (mine, theirs))


def _ratio(seconds: Mapping[str, float], side: str) -> float | None:
    return seconds[side] / seconds[OURS] if side in seconds and OURS in seconds else None


def _stages(runs: Sequence[Measured]) -> dict[str, float]:
    """Medians by stage, of the whole case where only a part of it was measured."""
    return {
        stage: statistics.median(
            run.timing.stages_s[stage] * len(run.timing.token_ids) / run.timing.measured_asks
            for run in runs
        )
        for stage in STAGES
    }


def _memory(runs: Sequence[Measured]) -> dict[str, float]:
    return {
        "loading": max(run.loading_mib for run in runs),
        "running": max(run.running_mib for run in runs),
    }

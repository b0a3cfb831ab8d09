"""What int8 was measured to cost on a user's own labeled images, and what lets auto take it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from florence2.checkpoint.files import read_json, write_whole
from florence2.errors import CheckpointError

logger = logging.getLogger(__name__)

MOST_POINTS: Final = 1.0
"""A loss of so many points is too much for a precision that nobody asked for by name."""

FEWEST_IMAGES: Final = 50
"""With fewer, the interval is several points wide: a loss of some of them passes for none."""

LEAST_FIGURE: Final = 0.1
"""What hardly finds anything in float32 has nothing to lose: a point would be a tenth of it."""


@dataclass(frozen=True, slots=True)
class TaskLoss:
    """What one task lost on ``images`` that were answered both ways.

    ``figure`` says what ``before`` and ``after`` are, of which 1 is best. ``points`` are hundredths
    of it that were lost, with their 95 % interval; below 0 where it gained.
    """

    task: str
    figure: str
    images: int
    before: float
    after: float
    points: float
    low: float
    high: float

    def __str__(self) -> str:
        """Figures, for a sentence."""
        return (
            f"{self.task} lost {self.points:.2f} points of {self.figure} (95 %: {self.low:.2f} to "
            f"{self.high:.2f}) on {self.images} images, from {100 * self.before:.1f} to "
            f"{100 * self.after:.1f}"
        )


def why_not_enough(tasks: Sequence[TaskLoss]) -> str | None:
    """Why these losses do not show that int8 costs less than a point; None where they do."""
    if not tasks:
        return "nothing could be compared"
    for one in tasks:
        if one.images < FEWEST_IMAGES:
            return f"{one.task} was compared on {one.images} images, fewer than {FEWEST_IMAGES}"
        if one.before < LEAST_FIGURE:
            return (
                f"{one.task} reaches {100 * one.before:.1f} points of {one.figure} in float32, of "
                f"which there is little to lose; it takes {100 * LEAST_FIGURE:.0f}"
            )
        # A figure that is no number is not below it either.
        if not one.points < MOST_POINTS:
            return f"{one.task} lost {one.points:.2f} points of {one.figure}"
    return None


@dataclass(frozen=True, slots=True)
class Int8Loss:
    """A measure of a checkpoint's conversion to int8 against float32.

    ``source_sha256`` is the checkpoint's hash, ``conversion_sha256`` that of the conversion's
    manifest, which has the hashes of its files. ``data`` is where the labeled images are,
    ``data_sha256`` a hash of images and labels. ``date`` is YYYY-MM-DD.
    """

    source_sha256: str
    conversion_sha256: str
    versions: dict[str, str]
    data: str
    data_sha256: str
    command: str
    date: str
    tasks: tuple[TaskLoss, ...]

    def __str__(self) -> str:
        """What is known, for a sentence."""
        # The whole path is nobody's business who asks a server what it runs.
        name = Path(self.data).name
        return f"{'; '.join(map(str, self.tasks))} ({name}, against fp32, {self.date})"

    def write(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), indent=2) + "\n")


def read_loss(path: Path) -> Int8Loss | None:
    """What was written there; None where there is nothing, or nothing that can be read."""
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        tasks = tuple(TaskLoss(**one) for one in content.pop("tasks"))
        loss = Int8Loss(**content, tasks=tasks)
        return loss if why_not_enough(loss.tasks) is None else None
    except (CheckpointError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be read (%s) and is left aside", path, error)
        return None

"""How much is done, and the table of what was injected and what was lost by it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

KILLS = int(os.environ.get("FLORENCE_SOAK_KILLS", "10"))
NUM_IMAGES = int(os.environ.get("FLORENCE_SOAK_IMAGES", "2000"))
"""Fewer for a quick look."""
DISK_BYTES = 100_000 + 6_000 * NUM_IMAGES
"""Of the small disk: room for about half of the images, with their labels."""


@dataclass(frozen=True)
class FaultRow:
    """One test. ``named`` are images that a run said it had not done, at first."""

    injected: str
    times: str
    images: int
    named: int
    lost: int
    twice: int


@dataclass
class FaultTable:
    rows: list[FaultRow] = field(default_factory=list)

    def add(
        self, injected: str, times: object, images: int, named: int, lost: int, twice: int
    ) -> None:
        self.rows.append(FaultRow(injected, str(times), images, named, lost, twice))

    def lines(self) -> list[str]:
        if not self.rows:
            return []
        head = [
            "",
            "| injected | how often | images | named at first | lost | labeled twice |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
        ]
        return head + [
            f"| {row.injected} | {row.times} | {row.images} | {row.named} | {row.lost} | "
            f"{row.twice} |"
            for row in self.rows
        ]


TABLE = FaultTable()

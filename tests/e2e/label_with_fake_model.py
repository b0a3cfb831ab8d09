"""``florence2`` in a process of its own with a scripted, slow model: ``SECONDS LOG ARGUMENTS...``.

Each image that the model is asked about leaves its colour in LOG, so that a test can tell from
outside what was looked at, and how often.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from label_fakes import FakeModel, color_in, result

from florence2.records import Box


def main() -> None:
    seconds, path, *arguments = sys.argv[1:]
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def answer(ask):
        red, green, _ = color_in(ask)
        number = red + 256 * green
        os.write(log, f"{number}\n".encode())
        boxes = () if number % 3 == 0 else (Box((2.0, 2.0, 9.0, 9.0), f"thing {number % 7}", 0.5),)
        return result(ask.task, *boxes, size=ask.image.size_wh)

    FakeModel(answer, float(seconds)).put_in(Patch)
    from serve.cli.main import main as florence2

    florence2(arguments)


class Patch:
    """For this process, for good."""

    setattr = staticmethod(setattr)


if __name__ == "__main__":
    main()

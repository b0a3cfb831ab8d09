"""``florence2`` in a process of its own with a scripted, slow model: ``SECONDS LOG ARGUMENTS...``.

Each image that the model is asked about leaves its colour in LOG, so that a test can tell from
outside what was looked at, and how often.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import make_dataclass
from types import ModuleType, SimpleNamespace

from florence2.records import Box, Result


class SlowModel:
    def __init__(self, seconds: float, log: str) -> None:
        self._seconds = seconds
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    @property
    def engine(self):
        """What is asked of a model that was loaded: how wide its text network is."""
        text = SimpleNamespace(d_model=1024)
        return SimpleNamespace(checkpoint=SimpleNamespace(config=SimpleNamespace(text=text)))

    def run_many(self, requests):
        time.sleep(self._seconds)
        return [self._answer(ask) for ask in requests]

    def _answer(self, ask):
        red, green, _ = ask.image.image.getpixel((0, 0))
        number = red + 256 * green
        os.write(self._log, f"{number}\n".encode())
        boxes = () if number % 3 == 0 else (Box((2.0, 2.0, 9.0, 9.0), f"thing {number % 7}", 0.5),)
        return Result(ask.task, ask.image.size_wh, boxes, None, "", (), False)


def main() -> None:
    seconds, log, *arguments = sys.argv[1:]
    fake = ModuleType("florence2.api")
    fake.Florence2 = type(
        "Florence2", (), {"load": staticmethod(lambda *_, **__: SlowModel(float(seconds), log))}
    )
    # The engine's request stands in the module that brings torch: half the time of a start.
    names = ["image", "task", "text", "region", "num_beams", "max_new_tokens"]
    questions = ModuleType("florence2.engine.ask")
    questions.Ask = make_dataclass("Ask", names)
    sys.modules |= {"florence2.api": fake, "florence2.engine.ask": questions}
    from serve.cli.main import main as florence2

    florence2(arguments)


if __name__ == "__main__":
    main()

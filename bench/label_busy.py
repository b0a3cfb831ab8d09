"""Time of ``florence2 label`` beside nothing and beside one busy process per core.

python bench/label_busy.py --images 100
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene

FIRST_SEED = 400_000
BUSY = "while True: pass"


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes that take whatever the cores give them."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def label_s(images: Path, words: list[str]) -> float:
    """Seconds per image as the run's own report has them: without start and loading."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            "-m",
            "serve.cli.main",
            "label",
            str(images),
            "--out",
            out,
            "--model",
            "demo",
            *words,
        ]
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        report = Path(out, "report.json").read_text(encoding="utf-8")
    run = json.loads(report)["this_run"]
    return float(run["seconds"]) / int(run["images"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("words", nargs="*", help="further words for florence2 label, after --")
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    quiet, busy = [], []
    with tempfile.TemporaryDirectory() as name:
        for number in range(given.images):
            scene = make_scene(FIRST_SEED + number)
            draw_scene(scene, (640, 480)).save(Path(name, f"{number:05}.png"))
        # In turns, so that whatever else goes on meets both.
        for number in range(given.rounds):
            quiet.append(label_s(Path(name), given.words))
            with busy_processes(cores):
                time.sleep(1)
                busy.append(label_s(Path(name), given.words))
            print(f"round {number + 1}: quiet {quiet[-1]:.3f} s, busy {busy[-1]:.3f} s an image")
    ratio = median(busy) / median(quiet)
    print(f"{cores} cores, load {os.getloadavg()[0]:.1f} at the end; busy / quiet: {ratio:.2f}")


if __name__ == "__main__":
    main()

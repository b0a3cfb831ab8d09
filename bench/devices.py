"""Images a second of ``florence2 label`` on several devices, over those on one of them.

python -m bench.devices --images 48 --random base --tokens 30
python -m bench.devices --devices cuda:0,cuda:1 --images 2000

Without ``--devices`` a device is one core of the CPU: one process has one of them, then as many
processes as ``--cores`` have as many. Each side is a process of its own, in turns; the annotations
of both must be equal. Loading is not counted. The ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

# What both sides' annotations may differ in: scores of batches of another size, in the last digits.
DIGITS = 3


def measure(checkpoint: str, devices: str, folder: Path, tokens: int | None) -> None:
    """One side, in a process of its own: prints what it measured as JSON."""
    from bench.label_throughput import label_s
    from serve.cli.loading import first_and_others, one_model

    first, others = first_and_others("auto", devices)
    model = one_model(checkpoint, first, "torch", "fp32", others)
    while not all(worker.pid for worker in model.current.scheduler.others):
        time.sleep(0.1)
    images = folder / "images"
    spent_s = label_s(model, images, tokens, draw=False)
    annotations = sorted((folder / "out" / "project").rglob("*.png.json")) or sorted(
        (folder / "out" / "project").rglob("*.jpg.json")
    )
    found = {path.name: _what_was_found(json.loads(path.read_text())) for path in annotations}
    print(json.dumps({"seconds": spent_s, "found": found}))
    sys.stdout.flush()
    model.current.scheduler.close()


def _what_was_found(annotation: dict[str, Any]) -> list[Any]:
    return [
        (
            one["classTitle"],
            one["points"],
            [round(tag["value"], DIGITS) for tag in one["tags"] if isinstance(tag["value"], float)],
        )
        for one in annotation["objects"]
    ]


def side(command: list[str], num_cores: int | None) -> dict[str, Any]:
    """What one side measured, with so many cores of the machine."""
    limit: Callable[[], None] | None = None
    if num_cores is not None:
        cores = sorted(os.sched_getaffinity(0))[:num_cores]
        limit = partial(os.sched_setaffinity, 0, cores)
    done = subprocess.run(command, preexec_fn=limit, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", help="all, or cuda:0,cuda:1; else cores of the CPU")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--random", help="base or large, with random weights")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        checkpoint, devices, folder = given.measure
        measure(checkpoint, devices, Path(folder), given.tokens)
        return
    from bench.label_throughput import draw_images
    from florence2.benchmark.run import write_checkpoint
    from florence2.runtimes.device import choose_devices

    several = given.devices or ",".join(["cpu"] * given.cores)
    one = choose_devices(several)[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "images").mkdir()
        draw_images(folder / "images", given.images)
        checkpoint = given.model
        if given.random:
            checkpoint = str(folder / given.random)
            write_checkpoint(given.random, Path(checkpoint))
        base = [sys.executable, "-m", "bench.devices"]
        if given.tokens:
            base += ["--tokens", str(given.tokens)]
        ratios = []
        for number in range(1, given.rounds + 1):
            rates, found = [], []
            for devices, cores in ((one, 1), (several, given.cores)):
                command = [*base, "--measure", checkpoint, devices, temporary]
                done = side(command, None if given.devices else cores)
                rates.append(given.images / done["seconds"])
                found.append(done["found"])
            different = [name for name, labels in found[0].items() if found[1][name] != labels]
            ratios.append(rates[1] / rates[0])
            print(
                f"round {number}: {one} {rates[0]:.3f} images/s, {several} {rates[1]:.3f}, "
                f"ratio {ratios[-1]:.2f}; {len(found[0])} annotations, {len(different)} differ"
            )
        print(f"median ratio {median(ratios):.2f}")


if __name__ == "__main__":
    main()

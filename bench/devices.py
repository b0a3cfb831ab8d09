"""Images a second of ``florence2 label`` on several devices, over those on one of them.

python -m bench.devices --images 48 --random base --tokens 30
python -m bench.devices --devices cuda:0,cuda:1 --images 2000

Without ``--devices`` a device is one core of the CPU: one process has one of them, then as many
processes as ``--cores`` have as many. Each side is a process of its own, in turns; the annotations
of both must be equal. Loading is not counted. The ratio is the median of the rounds' ratios.

Cores share memory and caches, so what they can do at most is measured too: as many runs as cores,
each alone on its own with all the images, at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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


def begun(command: list[str], cores: Sequence[int] | None) -> subprocess.Popen[str]:
    """One side, with these cores of the machine."""
    limit: Callable[[], None] | None = None
    if cores is not None:
        limit = partial(os.sched_setaffinity, 0, cores)
    return subprocess.Popen(command, preexec_fn=limit, stdout=subprocess.PIPE, text=True)


def measured(running: subprocess.Popen[str]) -> dict[str, Any]:
    """What one side measured, once it has ended."""
    said, _ = running.communicate()
    if running.returncode:
        raise SystemExit("One side failed.")
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def most_of_cores(base: list[str], checkpoint: str, folder: Path, cores: Sequence[int]) -> float:
    """Seconds that as many runs as cores take, each alone on its own with all the images."""
    runs = []
    for core in cores:
        own = folder / f"core{core}"
        own.mkdir(exist_ok=True)
        if not (own / "images").exists():
            (own / "images").symlink_to(folder / "images")
        command = [*base, "--measure", checkpoint, "cpu", str(own)]
        runs.append(begun(command, [core]))
    return max(measured(one)["seconds"] for one in runs)


def compared(sides: Sequence[list[str]], cores: Sequence[int] | None, num_images: int) -> float:
    """Images a second of the second side over those of the first, which has one of the cores."""
    rates, found = [], []
    for command, own_cores in zip(sides, (cores and cores[:1], cores), strict=True):
        done = measured(begun(command, own_cores))
        rates.append(num_images / done["seconds"])
        found.append(done["found"])
    different = [name for name, labels in found[0].items() if found[1][name] != labels]
    print(
        f"one {rates[0]:.3f} images/s, several {rates[1]:.3f}, ratio {rates[1] / rates[0]:.2f}; "
        f"{len(found[0])} annotations, {len(different)} differ"
    )
    return rates[1] / rates[0]


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
        cores = None if given.devices else sorted(os.sched_getaffinity(0))[: given.cores]
        if cores is not None:
            most = given.images * len(cores) / most_of_cores(base, checkpoint, folder, cores)
            print(f"{len(cores)} runs on a core each, at the same time: {most:.3f} images/s")
        sides = [[*base, "--measure", checkpoint, devices, temporary] for devices in (one, several)]
        ratios = [compared(sides, cores, given.images) for _ in range(given.rounds)]
        print(f"median ratio {median(ratios):.2f}")


if __name__ == "__main__":
    main()

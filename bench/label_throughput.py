"""Time of ``florence2 label`` with previews, over the engine's own time for the same images.

python -m bench.label_throughput --images 200
python -m bench.label_throughput --images 24 --rounds 1 --random base

The engine's own time is that of its scheduler with the paths of the same batches, one after the
other, while the images of the next one are opened and scaled. Both are of the same loaded model, in
turns, so that whatever else goes on meets both; the ratio is the median of the rounds' ratios.

``--random base`` takes a checkpoint of that size with random weights instead, whose answers all run
to ``--tokens``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from florence2.benchmark.run import write_checkpoint
from florence2.engine.ask import Ask
from florence2.engine.scheduler import Priority
from florence2.records import Failure
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene
from serve.cli.loading import OneModel, one_model
from serve.labeling.run import Job, ModelSource, label_folder
from serve.labeling.settings import label_settings
from serve.predict.predictor import Predictor
from serve.process import bound_spinning

FIRST_SEED = 500_000
SIZE_WH = (1920, 1080)
TASK = "<OD>"
BATCH = 8


def draw_images(folder: Path, count: int) -> list[Path]:
    """So many drawn scenes of 2 megapixels, as JPEG."""
    paths = [folder / f"{number:05}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        draw_scene(make_scene(FIRST_SEED + number), SIZE_WH).save(path, quality=90)
    return paths


def engine_s(model: OneModel, paths: list[Path], tokens: int | None) -> float:
    """Seconds of the engine for the paths of all images, batch by batch."""
    preparer, scheduler = model.current.model.engine.preparer, model.current.scheduler
    began = time.perf_counter()
    for start in range(0, len(paths), BATCH):
        # With those of this batch, because what is not named any more is given up.
        preparer.ahead(paths[start : start + 2 * BATCH], "this batch and the next")
        asks = [Ask(path, TASK, max_new_tokens=tokens) for path in paths[start : start + BATCH]]
        if any(isinstance(one, Failure) for one in scheduler.run(asks, priority=Priority.BULK)):
            raise SystemExit("The engine failed on one of the images.")
    return time.perf_counter() - began


def label_s(model: OneModel, images: Path, tokens: int | None, *, draw: bool) -> float:
    """Seconds of a whole run, from its first look at the folder to its report."""
    out = images.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    source = ModelSource("measured", load=lambda: Predictor(model, fixed_shapes={}))
    began = time.perf_counter()
    settings = label_settings(task=TASK, max_new_tokens=tokens)
    report = label_folder(settings, Job(images, out, batch=BATCH, draw=draw), source)
    spent = time.perf_counter() - began
    if report.exit_code:
        raise SystemExit("Not every image was labeled.")
    return spent


def cpu_share(work: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a piece of work, and of all cores for it."""
    before = time.process_time()
    return work(), time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-draw", action="store_true", help="without previews")
    parser.add_argument("--device", default="auto")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="demo", help="a checkpoint's name or folder")
    which.add_argument("--random", metavar="SIZE", help="random weights: base or large")
    parser.add_argument("--tokens", type=int, help="limit of each answer; 20 for random weights")
    given = parser.parse_args()
    bound_spinning()
    ratios, cpu_ratios = [], []
    with tempfile.TemporaryDirectory() as name:
        checkpoint, tokens = given.model, given.tokens
        if given.random:
            checkpoint, tokens = str(Path(name, "checkpoint")), tokens or 20
            Path(checkpoint).mkdir()
            write_checkpoint(given.random, Path(checkpoint))
        model = one_model(checkpoint, given.device, "auto", "auto")
        images = Path(name, "images")
        images.mkdir()
        paths = draw_images(images, given.images)
        engine_s(model, paths[:BATCH], tokens)
        for number in range(given.rounds):
            turns = [
                lambda: cpu_share(lambda: engine_s(model, paths, tokens)),
                lambda: cpu_share(lambda: label_s(model, images, tokens, draw=not given.no_draw)),
            ]
            # Who goes first changes, because a machine slows down and speeds up.
            if number % 2:
                (labeling, labeling_cpu), (engine, engine_cpu) = turns[1](), turns[0]()
            else:
                (engine, engine_cpu), (labeling, labeling_cpu) = turns[0](), turns[1]()
            ratios.append(labeling / engine)
            cpu_ratios.append(labeling_cpu / engine_cpu)
            print(
                f"round {number + 1}: engine {engine:.1f} s ({engine_cpu:.1f} s of all cores), "
                f"label {labeling:.1f} s ({labeling_cpu:.1f} s); ratio {ratios[-1]:.3f}",
                flush=True,
            )
    print(
        f"{given.random or given.model}: {given.images} images of {SIZE_WH[0]}x{SIZE_WH[1]}, "
        f"{len(os.sched_getaffinity(0))} "
        f"cores, load {os.getloadavg()[0]:.1f} at the end\n"
        f"label / engine: {median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f}); "
        f"time of all cores: {median(cpu_ratios):.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())

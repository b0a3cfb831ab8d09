"""Seconds and memory of the vision tower: ours against transformers', same random weights.

python bench/vision.py --size base,large --precision fp32,bf16

Each side is a process of its own; they run in turns, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from florence2.benchmark.plan import size_config
from florence2.benchmark.sides import PeakMemory
from florence2.network.florence import Florence2Network

SIDES: Final = ("reference", "ours")
DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
IMAGE_SIDE: Final = 768


def build_tower(side: str, size: str, precision: str) -> Callable[[Tensor], object]:
    """The tower of one side, ready to be called with pixels [B, 3, H, W]."""
    torch.manual_seed(0)
    config = size_config(size)
    network = Florence2Network(config)
    dtype = DTYPES[precision]
    if side == "ours":
        return network.to(dtype).prepare_for_inference().model.vision_tower
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    with torch.device("meta"):
        reference = Florence2ForConditionalGeneration(Florence2Config(**config.to_native_dict()))
    reference.load_state_dict(network.state_dict(), strict=True, assign=True)
    tower: Callable[[Tensor], object] = reference.to(dtype).eval().model.vision_tower
    return tower


def answer(side: str, size: str, precision: str, batch: int) -> None:
    """A side's process: one run for every line that comes in, answered in seconds and MiB."""
    tower = build_tower(side, size, precision)
    pixels = torch.randn(batch, 3, IMAGE_SIDE, IMAGE_SIDE).to(DTYPES[precision])
    memory = PeakMemory("cpu")
    memory.restart()
    loaded_mib = memory.peak_mib()
    with torch.inference_mode():
        tower(pixels)
        for _ in sys.stdin:
            began = time.perf_counter()
            tower(pixels)
            seconds, peak_mib = time.perf_counter() - began, memory.peak_mib()
            print(seconds, peak_mib - loaded_mib, peak_mib, flush=True)


def ask(process: subprocess.Popen[str]) -> list[float]:
    """Seconds of one run, MiB above what loading took, MiB in all."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("A side was started without pipes.")
    process.stdin.write("run\n")
    process.stdin.flush()
    return [float(word) for word in process.stdout.readline().split()]


def compare(size: str, precision: str, options: argparse.Namespace) -> None:
    """Prints one row: both sides' median seconds and memory, and the ratios."""
    words = ["--size", size, "--precision", precision, "--batch", str(options.batch)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--side", side, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for side in SIDES
    ]
    runs = [[ask(process) for process in processes] for _ in range(options.runs)]
    for process in processes:
        process.communicate()
    seconds = [statistics.median(run[side][0] for run in runs) for side in range(2)]
    ratio = statistics.median(run[0][0] / run[1][0] for run in runs)
    (_, grown, peak), (_, our_grown, our_peak) = runs[-1]
    print(
        f"{size} {precision} batch {options.batch}: reference {seconds[0]:.3f} s, "
        f"ours {seconds[1]:.3f} s, {ratio:.2f} times as fast; memory above the loaded network "
        f"{grown:.0f} and {our_grown:.0f} MiB, in all {peak:.0f} and {our_peak:.0f} MiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="base", help="tiny, base, large; several with commas")
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        answer(options.side, options.size, options.precision, options.batch)
        return
    for size in options.size.split(","):
        for precision in options.precision.split(","):
            compare(size, precision, options)


if __name__ == "__main__":
    main()

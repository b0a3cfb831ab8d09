"""The engine on a GPU: CUDA graphs on and off, the reference, and the device's own floors.

python bench/gpu.py --size base,large --precision bf16,fp16 --json gpu.json
python bench/gpu.py --device cpu --size tiny --precision fp32 --batch 1,2 --repeats 1

For every size and precision: the vision tower from bytes, a decoder step, and whole asks against
``generate()`` of transformers in the same precision, also with 20 prompts on one image. "of floor"
is the time over what a large product and a copy on the same device in the same run allow.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_measures import (
    Axes,
    Row,
    count_work,
    loaded,
    measure_floors,
    step_row,
    vision_row,
)

from florence2.benchmark.run import write_checkpoint
from florence2.engine.checks import check_against_fp32


def measure(folder: Path, device: str, precision: str, axes: Axes) -> dict[str, Any]:
    """All tables of one checkpoint in one precision."""
    floors = measure_floors(torch.device(device), precision, axes.repeats)
    began = time.perf_counter()
    with loaded(folder, device, precision) as asks:
        load_s = time.perf_counter() - began
        engine = asks.ours.engine
        runtime: Any = engine.runtime
        side_px, _ = engine.checkpoint.image_processor.size_wh
        work = count_work(runtime.network, side_px)
        images = torch.zeros(1, 3, side_px, side_px).numpy()
        features = runtime.encode_images(images)[0]
        tables: dict[str, Any] = {
            "floors": asdict(floors),
            "work": asdict(work),
            "batches": {"images": engine.image_batch, "prompts": engine.prompt_batch},
            "load_both_sides_s": load_s,
            "error_against_fp32": check_against_fp32(engine.checkpoint, runtime, is_error=False),
        }
        for name, row_of in {
            "vision": lambda batch: vision_row(runtime, batch, side_px, work, floors, axes.repeats),
            "step": lambda batch: step_row(runtime, features, batch, work, floors, axes),
        }.items():
            tables[name] = [row_of(batch) for batch in axes.batches]
            show(f"{folder.name} {precision}: {name}", tables[name])
        tables["asks"] = [asks.row(case, work, floors, axes.repeats) for case in axes.ask_cases()]
        show(f"{folder.name} {precision}: whole asks, without preprocessing", tables["asks"])
        tables["graphs"] = runtime.graphs.num_graphs
    return tables


def show(title: str, rows: list[Row]) -> None:
    """A table with the columns of its rows."""
    print(f"\n{title}")
    cells = [[*rows[0]], *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="base,large", help="base, large, tiny, with commas")
    parser.add_argument("--precision", default="bf16,fp16", help="fp32, bf16, fp16, with commas")
    parser.add_argument("--batch", default="1,2,4,8,16,32", help="images or prompts, ascending")
    parser.add_argument("--tokens", default="30,100", help="a short and a long answer")
    parser.add_argument("--prompts", type=int, default=20, help="prompts on one image")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    short, long = (int(part) for part in options.tokens.split(","))
    batches = sorted(int(part) for part in options.batch.split(","))
    axes = Axes(batches, (short, long), options.prompts, options.repeats)
    found: dict[str, Any] = {"machine": machine(options.device), "tables": {}}
    for size in options.size.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name, size)
            folder.mkdir()
            write_checkpoint(size, folder)
            for precision in options.precision.split(","):
                tables = measure(folder, options.device, precision, axes)
                found["tables"][f"{size} {precision}"] = tables
                # After each, so that what is measured is not lost.
                if options.json is not None:
                    options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

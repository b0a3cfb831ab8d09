"""Memory of ``florence2 label`` after 50 images and at the end, with the demo checkpoint.

python bench/label_memory.py --images 1000
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene

FIRST_SEED = 300_000


def resident_mib(process_id: int) -> float:
    """The process's resident memory, from Linux's own count."""
    fields = Path(f"/proc/{process_id}/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * 4096 / 2**20


def num_done(journal: Path) -> int:
    """Images with an entry in the journal."""
    if not journal.is_file():
        return 0
    return sum('"image"' in line for line in journal.read_text(encoding="utf-8").splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    count = parser.parse_args().images
    with tempfile.TemporaryDirectory() as name:
        images, out = Path(name, "images"), Path(name, "out")
        images.mkdir()
        for number in range(count):
            scene = make_scene(FIRST_SEED + number)
            draw_scene(scene, (160, 120)).save(images / f"{number:05}.png")
        words = ["-m", "serve.cli.main", "label", str(images), "--out", str(out), "--model", "demo"]
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, *words, "--num-beams", "1"])
        after_50, last = 0.0, 0.0
        while process.poll() is None:
            time.sleep(0.2)
            done = num_done(out / "journal.jsonl")
            last = resident_mib(process.pid) or last
            if done >= 50 and not after_50:
                after_50 = last
        print(f"{count} images in {time.monotonic() - began:.0f} s, exit {process.returncode}")
        print(
            f"after 50: {after_50:.0f} MiB, at the end: {last:.0f} MiB, ratio {last / after_50:.3f}"
        )


if __name__ == "__main__":
    main()

"""How long it takes to upload a labeled folder: to the double of the platform, on this machine.

    python bench/upload.py --images 1000

The folder is drawn and labeled with the demo checkpoint first; what is timed is the upload, over
HTTP to threads of this process, so the time on its cores is that of both sides.
"""

# ruff: noqa: E402 - the path to the double comes first
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

# In the place of this folder, whose serve.py would be taken for the app.
sys.path[0] = str(Path(__file__).parents[1] / "tests" / "contract")
os.environ["SUPERVISELY_SKIP_HTTPS_USER_HELPER_CHECK"] = "true"

from platform_double import TOKEN, PlatformDouble

from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene
from serve.scaling.upload import UploadJob, upload_labeled
from serve.sdk import sly

FIRST_SEED = 900_000
SIZE_WH = (320, 240)


def label(folder: Path, num_images: int) -> Path:
    photos, out = folder / "photos", folder / "labeled"
    photos.mkdir()
    for number in range(num_images):
        draw_scene(make_scene(FIRST_SEED + number), SIZE_WH).save(photos / f"{number:06}.jpg")
    words = ["label", str(photos), "--out", str(out), "--model", "demo", "--task", "<OD>"]
    command = [sys.executable, "-m", "serve.cli.main", *words, "--num-beams", "1"]
    subprocess.run(command, check=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    num_images = parser.parse_args().images
    double = PlatformDouble()
    double.start()
    project = double.state.add_project("uploaded")
    with TemporaryDirectory() as folder:
        job = UploadJob(str(label(Path(folder), num_images)), project.id)
        began, began_cpu = time.monotonic(), time.process_time()
        report = upload_labeled(sly.Api(double.address, TOKEN), job)
        took_s, cpu_s = time.monotonic() - began, time.process_time() - began_cpu
    calls = Counter(call.method for call in double.calls)
    print(*report.lines(job), sep="\n")
    print(
        f"{num_images} images, {report.labels} labels: {took_s:.1f} s, "
        f"{1000 * cpu_s / num_images:.1f} ms of a core an image, "
        f"{100 * calls.total() / num_images:.1f} calls per 100 images"
    )
    print(", ".join(f"{count} {method}" for method, count in calls.most_common()))
    double.stop()


if __name__ == "__main__":
    main()

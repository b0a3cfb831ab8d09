"""How long it takes to find out what a run over a project has done before it goes on.

    python bench/resume.py --images 50000 --labels 6

What is timed is all that a run that goes on does more than a new one before its first image: its
manifest, its lease, the lines of every image, over HTTP to the double of the platform in a thread
of this process.
"""

# ruff: noqa: E402 - the path to the double comes first
from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# In the place of this folder, whose serve.py would be taken for the app.
sys.path[0] = str(Path(__file__).parents[1] / "tests" / "contract")
os.environ["SUPERVISELY_SKIP_HTTPS_USER_HELPER_CHECK"] = "true"

from platform_double import TOKEN, PlatformDouble

from serve.platform.images import Target
from serve.platform.lease import CONFIRM_S
from serve.platform.request_state import Destination
from serve.platform.run_records import RunRecord
from serve.sdk import sly
from serve.settings import Settings

SIZE_HW = (480, 640)
THING = sly.ObjClass("thing", sly.Rectangle)


def record(api: sly.Api, num_images: int) -> RunRecord:
    return RunRecord(api, Settings(), {"name": "demo"}, Destination("append"), num_images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--labels", type=int, default=6, help="on each image")
    asked = parser.parse_args()
    double = PlatformDouble()
    double.start()
    project_id = double.state.add_project("resume").id
    api = sly.Api(double.address, TOKEN, retry_count=1)
    labels = [sly.Label(sly.Rectangle(at, 5, at + 9, 50), THING) for at in range(asked.labels)]
    annotation, image_ids = sly.Annotation(SIZE_HW, labels), range(1, asked.images + 1)
    started = time.perf_counter()
    with record(api, asked.images) as first:
        for image_id in image_ids:
            first.before_upload(project_id, image_id, annotation)
            first.settled(project_id, Target(image_id, project_id))
    noted_s = time.perf_counter() - started
    started = time.perf_counter()
    second = record(api, asked.images)
    done = second.resume(project_id, set(image_ids), lambda: False)
    resumed_s = time.perf_counter() - started
    with second:
        pass
    double.stop()
    print(
        f"{len(done)} images done before: read back in {resumed_s:.1f} s, of which {CONFIRM_S:g} s "
        "makes sure that nobody else holds the run; "
        f"noted in {1000 * noted_s / asked.images:.2f} ms an image"
    )


if __name__ == "__main__":
    main()

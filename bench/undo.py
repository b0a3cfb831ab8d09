"""How long it takes to undo a run of many labels: on the double of the platform, and on disk.

    python bench/undo.py --images 1000 --labels 10

The runs are made by the app's own code with a model that invents boxes; what is timed is the undo,
with its downloads, comparisons and deletions, over HTTP to a process thread of this machine.
"""

# ruff: noqa: E402 - the path to the double comes first
from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

# In the place of this folder, whose serve.py would be taken for the app.
sys.path[0] = str(Path(__file__).parents[1] / "tests" / "contract")
os.environ["SUPERVISELY_SKIP_HTTPS_USER_HELPER_CHECK"] = "true"

from platform_double import TOKEN, PlatformDouble

from florence2.budget import Budget
from serve.labeling.files import Stamp, opened_workspace
from serve.labeling.images import ImageFile
from serve.labeling.journal import Entry, open_journal
from serve.labeling.project import GrowingProject
from serve.labeling.undo import keep_manifest, undo_in
from serve.platform.project_run import run_project
from serve.platform.registry import RequestsManager
from serve.platform.run import RunServices
from serve.platform.run_store import runs_of
from serve.platform.undo import undo_run
from serve.platform.upload import SdkUpload
from serve.predict.predictor import Predicted
from serve.provenance import RUN_TAG, Manifest, new_run_id, now
from serve.sdk import sly
from serve.settings import Settings

SIZE_WH = (640, 480)


def annotation(number: int, num_labels: int) -> sly.Annotation:
    labels = [
        sly.Label(
            sly.Rectangle(at, number % 400, at + 20, number % 400 + 30),
            sly.ObjClass("thing", sly.Rectangle),
        )
        for at in range(0, num_labels * 21, 21)
    ]
    return sly.Annotation(SIZE_WH[::-1], labels)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", SIZE_WH, (90, 90, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def on_the_platform(num_images: int, num_labels: int) -> tuple[float, float, int]:
    """Seconds of the run and of its undo, and how many labels went."""
    double = PlatformDouble()
    double.start()
    project = double.state.add_project("undo")
    dataset = double.state.add_dataset(project.id, "ds")
    content = png()
    for number in range(num_images):
        double.state.add_image(dataset.id, f"{number:06}.png", content)
    counted = iter(range(num_images))

    def predict(images: Sequence[Any], *_: object) -> list[Predicted]:
        return [Predicted(annotation(next(counted), num_labels)) for _ in images]

    services = RunServices(
        predict=predict,
        ask=lambda asks, call: [],
        settings_of=lambda state: Settings(),
        upload=SdkUpload().upload_predictions,
        budget=Budget(10**9, "bytes"),
        task_id=None,
        default_batch_size=16,
    )
    api = sly.Api(double.address, TOKEN, retry_count=1)
    manager = RequestsManager(ThreadPoolExecutor(2))
    state = {"project_id": project.id, "upload_mode": "append"}
    work: Callable[..., None] = run_project
    run_s, _ = timed(
        lambda: manager.run(
            lambda api, state, inference_request: work(api, state, inference_request, services),
            api,
            state,
        )
    )
    [manifest] = runs_of(api, project.id)
    undo_s, undone = timed(lambda: undo_run(api, project.id, manifest.run))
    double.stop()
    if undone.kept or undone.failed:
        raise SystemExit(f"Not all went: {undone.lines()}")
    return run_s, undo_s, undone.num_deleted


def on_disk(folder: Path, num_images: int, num_labels: int) -> tuple[float, int]:
    """Seconds of the undo of a folder's run, and how many labels went."""
    source, content = folder / "source", png()
    source.mkdir()
    run_id = new_run_id()
    with opened_workspace(folder / "out") as workspace:
        project = GrowingProject(workspace, link=True)
        journal = open_journal(workspace, {}, project.is_kept)
        project.create()
        keep_manifest(
            workspace, Manifest(run_id, {}, "<OD>", (), {}, None, started=now(), state="done")
        )
        entries = []
        for number in range(num_images):
            path = source / f"{number:06}.png"
            path.write_bytes(content)
            stats = path.stat()
            stamp = Stamp(stats.st_size, stats.st_mtime_ns)
            file = ImageFile(path, path.name, path.name)
            found = annotation(number, num_labels)
            stored = project.add(file, found, stamp, None, run_id)
            entries.append(
                Entry(
                    path.name,
                    path.name,
                    "labeled",
                    objects=num_labels,
                    hash=stored.hash,
                    labels_hash=stored.labels_hash,
                    run=run_id,
                    labels=stored.written.labels,
                )
            )
        journal.append(entries)
        journal.close()
    undo_s, undone = timed(lambda: undo_in(folder / "out", run_id))
    return undo_s, undone.num_deleted


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--labels", type=int, default=10, help="on each image")
    asked = parser.parse_args()
    run_s, undo_s, count = on_the_platform(asked.images, asked.labels)
    print(f"platform: {count} labels with {RUN_TAG.name}, run {run_s:.1f} s, undo {undo_s:.1f} s")
    with TemporaryDirectory() as folder:
        undo_s, count = on_disk(Path(folder), asked.images, asked.labels)
    print(f"disk: {count} labels, undo {undo_s:.1f} s")


if __name__ == "__main__":
    main()

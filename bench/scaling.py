"""What an image costs beside the model in a run on many machines: ``python bench/scaling.py``.

Time of one core and bytes, for images of 1920 x 1080 and a network of 768 x 768 pixels, which is
what the published checkpoints take; what docs/scaling.md computes with.
"""

# ruff: noqa: E402 - the path to the app comes first
from __future__ import annotations

import argparse
import io
import json
import pickle
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# In the place of this folder, whose serve.py would be taken for the app.
sys.path[0] = str(Path(__file__).parents[1])

from florence2.engine.encoding import Preparer
from florence2.pixels import ImageProcessor
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene
from serve.labeling.settings import label_settings
from serve.predict.predictor import Predicted
from serve.provenance import Manifest
from serve.scaling.plan import Plan, PlannedImage, Shard, Source
from serve.scaling.shards import ShardImage, Work, commit_shard, committed_in, open_shard
from serve.scaling.storage import Storage
from serve.sdk import sly

SIZE_WH = (1920, 1080)
OBJECTS = 8


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--images", type=int, default=100)
    reader.add_argument("--listed", type=int, default=20_000)
    asked = reader.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = _draw(folder / "images", asked.images)
        work = _work(Storage(str(folder / "out")))
        shard = Shard(0, tuple(images))
        began, wall = time.process_time(), time.perf_counter()
        opened = open_shard(work, shard, Preparer(ImageProcessor(), threads=1))
        _say("open (read, decode, scale)", began, wall, asked.images)
        sent = pickle.dumps(opened, pickle.HIGHEST_PROTOCOL)
        print(f"{'sent to the model':30} {len(sent) / asked.images / 1e6:8.3f} MB an image")
        _answer(opened)
        answered = pickle.dumps(opened, pickle.HIGHEST_PROTOCOL)
        print(f"{'sent on from there':30} {len(answered) / asked.images / 1e6:8.3f} MB an image")
        began, wall = time.process_time(), time.perf_counter()
        commit_shard(work, shard, opened)
        _say("commit (project, journal)", began, wall, asked.images)
        stored = [path for path in (folder / "out/shards").rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in stored)
        print(f"{'stored':30} {size / asked.images / 1e6:8.3f} MB an image")
        print(f"{'files':30} {len(stored) / asked.images:8.2f} an image")
        _list(folder, asked.listed)
        _merge(work.target, asked.listed // 100)


def _say(what: str, began_s: float, wall_s: float, count: int) -> None:
    core_ms = 1000 * (time.process_time() - began_s) / count
    passed_ms = 1000 * (time.perf_counter() - wall_s) / count
    print(f"{what:30} {core_ms:8.3f} ms of a core, {passed_ms:.3f} ms passed, an image")


def _draw(folder: Path, count: int) -> list[PlannedImage]:
    folder.mkdir()
    scenes = [draw_scene(make_scene(seed)).resize(SIZE_WH) for seed in range(min(10, count))]
    planned = []
    for number in range(count):
        file = io.BytesIO()
        scenes[number % len(scenes)].save(file, "JPEG", quality=92)
        path = folder / f"{number:06}.jpg"
        path.write_bytes(file.getvalue())
        planned.append(PlannedImage(path.name, str(path), path.name))
    size = sum(path.stat().st_size for path in folder.iterdir()) / count
    print(f"{'files of images':30} {size / 1e6:8.3f} MB an image")
    return planned


def _work(target: Storage) -> Work:
    settings = label_settings(task="<OD>")
    manifest = Manifest("00000000", {"name": "none"}, "<OD>", (), {}, None, "2026-01-01T00:00:00Z")
    return Work(target, settings, {"task": "<OD>"}, manifest)


def _answer(images: Sequence[ShardImage]) -> None:
    """Boxes, as if a model had given them."""
    thing = sly.ObjClass("thing", sly.Rectangle)
    boxes = [sly.Rectangle(10 * place, 10, 10 * place + 90, 200) for place in range(OBJECTS)]
    labels = [sly.Label(box, thing) for box in boxes]
    width, height = SIZE_WH
    for one in images:
        one.opened = None
        one.predicted = Predicted(sly.Annotation((height, width), labels))


def _list(folder: Path, count: int) -> None:
    table = folder / "list.csv"
    rows = (
        f"s3://bucket-of-images/year/month/camera/{number:012}.jpg\n" for number in range(count)
    )
    table.write_text("image\n" + "".join(rows))
    target = Storage(str(folder / "plan"))
    source = Source(str(table), recursive=False, skip=target.address)
    began, wall = time.process_time(), time.perf_counter()
    number = sum(len(shard.images) for shard in Plan(target, source, 100).shards())
    _say("plan from a table", began, wall, number)
    size = sum(path.stat().st_size for path in (folder / "plan").rglob("*") if path.is_file())
    print(f"{'plan':30} {size / number:8.0f} bytes an image")


def _merge(target: Storage, count: int) -> None:
    note = json.loads(target.read("committed/000000.json") or b"{}")
    for number in range(count):
        text = json.dumps(note | {"shard": number})
        target.write(f"committed/{number:06}.json", text.encode())
    began, wall = time.process_time(), time.perf_counter()
    _say("merge, a shard", began, wall, sum(1 for _ in committed_in(target)))


if __name__ == "__main__":
    main()

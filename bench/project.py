"""A run over a project of the platform against the engine alone, on the same images.

    python bench/project.py --images 1000 --rounds 3
    python bench/project.py --images 48 --rounds 3 --random base --tokens 30
    python bench/project.py --done 50000

The app, the double of the platform and the engine are processes of their own, the engine asked in
turns with the others, by the app's batches, with as many threads as the app has. Every round has
images of its own, as what was seen once is kept in a cache. Their drawing, and loading, are not
counted; the second in which a run makes sure that it alone works on the project is. Then what a
call costs that the double answers, and with ``--done`` what a run costs that finds all done.
"""

# ruff: noqa: E402 - the path to the double comes first
from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
# In the place of this folder, whose serve.py would be taken for the app.
sys.path[0] = str(ROOT / "tests" / "contract")
sys.path.insert(1, str(ROOT / "tests"))
os.environ["SUPERVISELY_SKIP_HTTPS_USER_HELPER_CHECK"] = "true"

import requests
from app_server import SDK_ENVIRONMENT, AppServer
from PIL import Image
from platform_double import TOKEN, PlatformDouble
from platform_state import TEAM_ID
from starlette.types import Receive, Scope, Send

from florence2 import Florence2
from florence2.engine.ask import Ask
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene

FIRST_SEED = 600_000
BATCH = 16
NUM_CALLS = 300
# A look costs the app about 1.5 ms, and clients look once a second or less often.
LOOK_AFTER_S = 0.2
MOST_MS = 5.0
LEAST_RATIO = 0.9
MOST_RESUME_S = 10.0


class TimedDouble(PlatformDouble):
    """Knows how long it was busy with each call, from its first byte to the end of the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.spent_ms: dict[str, list[float]] = defaultdict(list)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        await super()._app(scope, receive, send)
        if scope["type"] == "http":
            method = scope["path"].rpartition("/")[2]
            self.spent_ms[method].append(1000 * (time.perf_counter() - began))


def serve_double(orders: Connection) -> None:
    """The double, in a process of its own, until the other side is gone."""
    double = TimedDouble()
    double.start()
    orders.send(double.address)
    while True:
        try:
            order, given = orders.recv()
        except EOFError:
            return
        if order == "project":
            project = double.state.add_project(f"round {len(double.state.projects)}")
            dataset = double.state.add_dataset(project.id, "drawn")
            for number, content in enumerate(given):
                double.state.add_image(dataset.id, f"{number:06}.jpg", content)
            double.spent_ms.clear()
            orders.send(project.id)
        elif order == "labels":
            images = [
                one
                for row in double.state.datasets_of(given)
                for one in double.state.images_of(row.id)
            ]
            orders.send(sum(len(one.annotation["objects"]) for one in images))
        else:
            orders.send(dict(double.spent_ms))


class Other:
    """A process that ``serves`` orders until this side is closed."""

    def __init__(self, serves: Callable[..., None], *given: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=serves, args=(theirs, *given), daemon=True)
        self._process.start()
        theirs.close()
        self.hello: Any = self._orders.recv()

    def tell(self, *order: object) -> Any:  # noqa: ANN401
        self._orders.send(order)
        return self._orders.recv()

    def close(self) -> None:
        self._orders.close()
        self._process.join(10)


def serve_engine(orders: Connection, name: str, search: dict[str, Any]) -> None:
    """The engine, which answers images with the seconds it took, in the app's batches."""
    model = Florence2.load(name)
    orders.send(model.device)
    while True:
        try:
            (images,) = orders.recv()
        except EOFError:
            return
        began = time.perf_counter()
        for start in range(0, len(images), BATCH):
            model.run_many([Ask(one, "<OD>", **search) for one in images[start : start + BATCH]])
        orders.send(time.perf_counter() - began)


def drawn(first: int, count: int, size_wh: tuple[int, int]) -> list[bytes]:
    files = []
    for number in range(first, first + count):
        buffer = io.BytesIO()
        draw_scene(make_scene(FIRST_SEED + number), size_wh).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def run_s(url: str, project_id: int, settings: dict[str, Any]) -> float:
    """Seconds of a run over the project that writes, until it says that it is over."""
    asked = {"project_id": project_id, "upload_mode": "append", "batch_size": BATCH}
    began = time.perf_counter()
    answer = requests.post(
        f"{url}/inference_project_id_async",
        json={"state": {**asked, "settings": settings}},
        timeout=60,
    )
    request = {"state": {"inference_request_uuid": answer.json()["inference_request_uuid"]}}
    while True:
        progress = requests.post(f"{url}/get_inference_progress", json=request, timeout=60).json()
        if progress["finished"]:
            break
        time.sleep(LOOK_AFTER_S)
    spent_s = time.perf_counter() - began
    if progress["exception"]:
        raise SystemExit(str(progress["exception"]))
    return spent_s


def compare(given: argparse.Namespace, folder: Path) -> float:
    """The median of the rounds' ratios."""
    from florence2.benchmark.run import write_checkpoint

    name = given.model
    if given.random:
        name = str(folder / given.random)
        write_checkpoint(given.random, Path(name))
    search = {} if given.tokens is None else {"max_new_tokens": given.tokens}
    search |= {} if given.num_beams is None else {"num_beams": given.num_beams}
    size_wh = tuple(map(int, given.size.split("x")))
    os.environ["OMP_NUM_THREADS"] = str(given.threads or os.cpu_count() or 1)
    double = Other(serve_double)
    engine = Other(serve_engine, name, search)
    env = {**SDK_ENVIRONMENT, "SERVER_ADDRESS": double.hello, "API_TOKEN": TOKEN}
    app = AppServer(
        folder,
        {**env, "TEAM_ID": str(TEAM_ID), "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]},
        lambda port: [
            sys.executable, "-m", "serve.cli.main", "serve", "--model", name, "--port", str(port)
        ],
    )  # fmt: skip
    app.start()
    ratios = []
    try:
        for number in range(-1, given.rounds):
            count = given.images if number >= 0 else BATCH
            images = drawn((number + 1) * given.images, count, (size_wh[0], size_wh[1]))
            project_id = double.tell("project", images)
            turns: list[Callable[[], float]] = [
                lambda images=images: engine.tell(images),
                lambda project_id=project_id: run_s(
                    app.url, project_id, {"task_prompt": "<OD>", **search}
                ),
            ]
            order = (0, 1) if number % 2 else (1, 0)
            spent_s = {turn: turns[turn]() for turn in order}
            if number < 0:
                continue
            alone, run = (count / spent_s[turn] for turn in (0, 1))
            ratios.append(run / alone)
            print(
                f"{count} images, {double.tell('labels', project_id)} labels: engine {alone:.1f}, "
                f"run {run:.1f} images/s, ratio {ratios[-1]:.2f}"
            )
        tell_of_calls(double)
    finally:
        engine.close()
        app.stop()
        double.close()
    print(f"median ratio {median(ratios):.2f} (at least {LEAST_RATIO} is wanted)")
    return median(ratios)


def tell_of_calls(double: Other) -> None:
    """What the double takes for the calls of the last run, and what one costs with nothing else."""
    spent_ms: dict[str, list[float]] = double.tell("spent", None)
    for method, each in sorted(spent_ms.items()):
        print(
            f"  {method:28} {len(each):5} calls, mean {mean(each):6.2f} ms, median "
            f"{median(each):6.2f} ms in the double, beside the model"
        )
    project_id = double.tell("project", ())
    headers, body = {"x-api-key": TOKEN}, {"id": project_id}
    each = []
    for _ in range(NUM_CALLS):
        began = time.perf_counter()
        requests.post(
            f"{double.hello}/public/api/v3/projects.info", json=body, headers=headers, timeout=60
        )
        each.append(1000 * (time.perf_counter() - began))
    print(
        f"one call with nothing else: {median(each):.2f} ms with its client, "
        f"{median(double.tell('spent', None)['projects.info']):.2f} ms in the double "
        f"(at most {MOST_MS:g} is wanted)"
    )


def tell_of_done(folder: Path, count: int) -> None:
    """What ``florence2 label`` takes for a folder in which nothing is left to do."""
    spent_s = {number: done_s(folder / str(number), number) for number in (1, count)}
    print(
        f"florence2 label on a folder that is done: {spent_s[count]:.1f} s for {count} images, "
        f"{spent_s[1]:.1f} s for one; {spent_s[count] - spent_s[1]:.1f} s more "
        f"(at most {MOST_RESUME_S:g} is wanted)"
    )


def done_s(folder: Path, count: int) -> float:
    """Labels small images by a model that invents boxes, then times the same command again."""
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        image = Image.new("RGB", (16, 12), (number % 256, number // 256 % 256, number // 65536))
        image.save(folder / "images" / f"{number:06}.png")
    words = ["label", str(folder / "images"), "--out", str(folder / "out"), "--model", "demo"]
    words += ["--device", "cpu", "--batch", "256"]
    first = [sys.executable, __file__, "--label", *words]
    again = [sys.executable, "-m", "serve.cli.main", *words]
    subprocess.run(first, check=True, capture_output=True)
    began = time.perf_counter()
    said = subprocess.run(again, check=True, capture_output=True, text=True).stderr
    spent_s = time.perf_counter() - began
    if len(list((folder / "out" / "project" / "ds0" / "ann").iterdir())) != count:
        raise SystemExit(f"Not every image was labeled:\n{said}")
    return spent_s


def label_by_invention(words: Sequence[str]) -> None:
    """``florence2`` with a model that takes no time."""
    from label_fakes import FakeModel, one_box

    from serve.cli.main import main as florence2

    class Patch:
        setattr = staticmethod(setattr)

    FakeModel(one_box).put_in(Patch)
    florence2(list(words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="640x480", help="of an image")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--random", help="base or large, with random weights")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--num-beams", type=int)
    parser.add_argument("--threads", type=int, help="of the engine and of the app; all cores")
    parser.add_argument("--done", type=int, help="only: so many images that are done already")
    parser.add_argument("--label", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.label:
        label_by_invention(given.label)
        return
    with TemporaryDirectory() as folder:
        if given.done:
            tell_of_done(Path(folder), given.done)
            return
        compare(given, Path(folder))


if __name__ == "__main__":
    main()

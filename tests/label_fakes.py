"""A scripted stand-in for the model, at the one edge where labeling meets the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from florence2.api import Florence2
from florence2.engine import scheduler
from florence2.engine.ask import Ask
from florence2.engine.encoding import Preparer
from florence2.pixels import ImageProcessor, PreparedImage
from florence2.records import Box, Failure, Result
from serve.sdk import sly


def color_of(number: int) -> tuple[int, int, int]:
    return (number % 256, number // 256, 7)


def paint(path: Path, number: int, size=(64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color_of(number)).save(path)
    return path


def color_in(ask: Ask) -> tuple[int, int, int]:
    """The colour of an image of one, as the model is given it."""
    image = ask.image
    if isinstance(image, PreparedImage):
        return tuple(image.scaled[0, 0].tolist())
    return image.image.getpixel((0, 0))


def result(
    task: str = "<OD>", *objects: Any, size=(64, 48), text=None, truncated=False, steps=(), notes=()
):
    return Result(task, size, tuple(objects), text, "", (), truncated, notes, steps)


def one_box(ask: Ask) -> Result:
    label = ask.text or "cat"
    return result(ask.task, Box((4.0, 4.0, 20.0, 20.0), label, 0.9), size=ask.image.size_wh)


@dataclass
class FakeModel:
    """Answers each ask with ``answer`` and remembers the colours of the images it was asked about.

    The colour of the top left pixel is how tests tell images apart.
    """

    answer: Callable[[Ask], Result | Failure] = one_box
    seconds: float = 0.0
    asked: list[tuple[int, int, int]] = field(default_factory=list)
    asks: list[tuple[str, str | None]] = field(default_factory=list)

    def __post_init__(self):
        """What is asked of a model that was loaded: how wide its text network is, and pixels."""
        text = SimpleNamespace(d_model=1024)
        self.engine = SimpleNamespace(
            checkpoint=SimpleNamespace(config=SimpleNamespace(text=text)),
            preparer=Preparer(ImageProcessor((8, 8)), threads=1),
        )

    def put_in(self, patch) -> list[tuple[str, str, str]]:
        """In place of every model; names, devices and runtimes of what is loaded from now on."""
        loads: list[tuple[str, str, str]] = []

        def load(name, device="auto", runtime="auto", **_):
            loads.append((name, device, runtime))
            return self

        def run(asks, **_):
            return self.run_many(asks)

        patch.setattr(Florence2, "load", staticmethod(load))
        patch.setattr(
            scheduler,
            "Scheduler",
            lambda engine, **_: SimpleNamespace(run=run, close=lambda: None, num_devices=1),
        )
        return loads

    def run_many(self, requests: Sequence[Ask]) -> list[Result | Failure]:
        time.sleep(self.seconds)
        self.asked += [color_in(ask) for ask in requests]
        self.asks += [(ask.task, ask.text) for ask in requests]
        return [self.answer(ask) for ask in requests]


def read_project(out):
    """The annotations by image name, read by the SDK, and the project itself."""
    project = sly.Project(str(out / "project"), sly.OpenMode.READ)
    (dataset,) = project.datasets
    return {
        name: sly.Annotation.load_json_file(dataset.get_ann_path(name), project.meta)
        for name in dataset.get_items_names()
    }, project


def dataset_of(out):
    """The folder of the images and annotations, wherever in an output folder it is."""
    (found,) = out.rglob("ds0")
    return found


def files_below(folder):
    """Every file with the time it was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}

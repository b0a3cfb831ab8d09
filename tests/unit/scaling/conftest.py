from __future__ import annotations

import fsspec
import pytest
from label_fakes import FakeModel

from florence2.engine.encoding import Preparer
from florence2.pixels import ImageProcessor
from serve.cli.loading import one_model
from serve.labeling.settings import label_settings
from serve.predict.predictor import Predictor
from serve.provenance import Manifest
from serve.scaling.shards import Work
from serve.scaling.storage import Storage


@pytest.fixture
def bucket():
    """An object store in this process: puts files under memory://in, and gives their address."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]

    def put(**files: bytes) -> str:
        for name, content in files.items():
            fs.pipe_file(f"/in/{name.replace('__', '/')}.png", content)
        return "memory://in"

    return put


@pytest.fixture(params=["folder", "bucket"])
def target(request, tmp_path, bucket):
    """Where labels go: a folder of a disk, or a bucket."""
    return Storage(str(tmp_path / "out") if request.param == "folder" else "memory://labels/out")


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def predictor(model, monkeypatch):
    model.put_in(monkeypatch)
    return Predictor(one_model("demo", "cpu", "auto", "auto"), fixed_shapes={})


@pytest.fixture(scope="session")
def preparer():
    return Preparer(ImageProcessor((8, 8)), threads=1)


@pytest.fixture
def work(target):
    """What machines are told of a run; keys of the settings may be given."""

    def made(run: str = "aaaaaaaa", *, run_tag: bool = False, **options) -> Work:
        settings = label_settings(prompt="cat", **options)
        settings = settings.model_copy(update={"run_tag": run_tag})
        manifest = Manifest(run, {"name": "demo"}, settings.task_prompt, ["cat"], {}, None, "now")
        return Work(target, settings, {"task": settings.task_prompt}, manifest, batch=2)

    return made

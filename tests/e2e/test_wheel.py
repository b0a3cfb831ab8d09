"""The wheel alone, in an environment and a folder that know nothing of the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy
import pytest
import requests

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "requirements.txt", "LICENSE", "README.md", "src", "serve", "demo")
DATA = [
    "serve/models.json",
    "serve/app_options.yaml",
    "serve/inference_settings.yaml",
    "serve/http/static/index.html",
    "serve/http/static/app.js",
    "serve/http/static/style.css",
    "serve/http/samples/scene_bike.png",
    "serve/http/samples/photo_table.jpg",
    "florence2/demo_checkpoint/model.safetensors",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools keeps what it built before beside the sources."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        whole = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        whole(ROOT / name, copy / name)
    build = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist"]
    subprocess.run([sys.executable, "-m", *build, "."], cwd=copy, check=True, timeout=120)
    [built] = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """``florence2`` of a new environment, beside the dependencies but without this project."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    [packages] = (folder / "lib").glob("python*/site-packages")
    # A path file is read for its paths only, so the checkout's own, in there, is not followed.
    dependencies = Path(numpy.__file__).parents[1]
    (packages / "dependencies.pth").write_text(f"{dependencies}\n", encoding="utf-8")
    install = ["pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([sys.executable, "-m", *install, str(wheel)], check=True, timeout=120)
    return folder / "bin" / "florence2"


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    kept = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def test_the_wheel_has_every_file_that_is_no_module(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert set(DATA) <= names
    written = {str(path.relative_to(ROOT)) for path in (ROOT / "serve").rglob("*.*")}
    wanted = {name for name in written if not name.endswith((".pyc", ".pyo"))}
    assert wanted <= names


def test_the_installed_command_labels_and_serves(installed, environment, tmp_path):
    (tmp_path / "images").mkdir()
    image = tmp_path / "images" / "bike.png"
    shutil.copy(ROOT / "demo" / "images" / "scene_bike.png", image)
    run = {"cwd": tmp_path, "env": environment, "text": True, "stderr": subprocess.PIPE}
    label = [installed, "label", "images", "--model", "demo", "--out", "labeled"]
    labeled = subprocess.run(label, timeout=120, check=False, **run)
    assert labeled.returncode == 0, labeled.stderr
    [written] = (tmp_path / "labeled").rglob("bike.png.json")
    assert len(json.loads(written.read_text(encoding="utf-8"))["objects"]) == 4

    with subprocess.Popen([installed, "serve", "--port", "0"], **run) as serving:
        try:
            said = iter(serving.stderr)
            url = next(match[0] for line in said if (match := re.search(r"http://[\d.:]+", line)))
            curl = next(said)
            samples = requests.get(f"{url}/page/samples", timeout=60).json()
            with image.open("rb") as file:
                answer = requests.post(f"{url}/inference_image", files={"files": file}, timeout=60)
        finally:
            serving.terminate()
    assert len(answer.json()["annotation"]["objects"]) == 4
    assert sorted(samples) == sorted(path.name for path in (ROOT / "demo" / "images").iterdir())
    # The examples of the repository are not here.
    assert "files=@image.jpg" in curl

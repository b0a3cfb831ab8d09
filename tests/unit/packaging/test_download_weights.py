"""docker/download_weights.py, run as the image's build runs it, against a hub on localhost."""

from __future__ import annotations

import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_standin import HubStandin, Repository, hub_standin
from packaging_files import ROOT
from safetensors.numpy import save

from florence2.checkpoint.catalog import KNOWN_BY_NAME

TINY = "someone/tiny"
OTHER = "someone/other"
WEIGHTS = "model.safetensors"


def files() -> dict[str, bytes]:
    values = np.random.default_rng(0).integers(0, 255, 100_000, dtype=np.uint8)
    return {
        "config.json": b'{"vision_config": {"dim_embed": [1]}}',
        "tokenizer.json": b'{"model": "tiny"}',
        WEIGHTS: save({"weight": values}),
    }


class Pinned(Repository):
    """A repository that claims a commit which its content does not have."""

    commit = KNOWN_BY_NAME["Florence-2-base"].revision


@pytest.fixture
def hub() -> Iterator[HubStandin]:
    with hub_standin() as standin:
        standin.add(TINY, files())
        yield standin


def run_script(hub: HubStandin, cache: Path, *names: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "FLOR"))}
    env |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(cache.parent / "client"),
        "NO_PROXY": "127.0.0.1,localhost",
        "FLORENCE2_CACHE": str(cache),
        "PYTHONPATH": str(ROOT / "src"),
    }
    command = [sys.executable, "docker/download_weights.py", *names]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


Download = Callable[..., tuple[int, str]]


@pytest.fixture
def download(hub: HubStandin, tmp_path: Path, monkeypatch, caplog) -> Download:
    """The script in this process: its exit code and what it says."""
    for name in [name for name in os.environ if name.startswith(("HF_", "FLOR"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("FLORENCE2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "client"))
    main = runpy.run_path(str(ROOT / "docker" / "download_weights.py"))["main"]

    def call(*names: str) -> tuple[int, str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "download_weights"):
            return main(names), caplog.text

    return call


def whole_folders(cache: Path) -> list[Path]:
    return [manifest.parent for manifest in cache.rglob("florence2-manifest.json")]


def test_a_whole_checkpoint_lands_in_the_cache_and_ends_with_0(hub: HubStandin, tmp_path: Path):
    ran = run_script(hub, tmp_path / "cache", TINY)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (folder,) = whole_folders(tmp_path / "cache")
    assert {name: (folder / name).read_bytes() for name in files()} == files()


def misses(name: str) -> Callable[[HubStandin], None]:
    return lambda hub: hub.add(TINY, {key: data for key, data in files().items() if key != name})


SPOILT: dict[str, tuple[Callable[[HubStandin], None], str]] = {
    "a hash that stays wrong": (lambda hub: hub.faults.corrupt_left.update({WEIGHTS: 9}), WEIGHTS),
    **{f"no {name}": (misses(name), f"Not in the image: {TINY}.") for name in files()},
    "status 403": (lambda hub: hub.faults.file_status.update({WEIGHTS: 403}), ""),
    "status 404": (lambda hub: hub.faults.file_status.update({WEIGHTS: 404}), ""),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILT.values(), ids=SPOILT)
def test_a_checkpoint_that_is_not_whole_ends_with_1_and_is_not_kept(
    spoil: Callable[[HubStandin], None],
    words: str,
    hub: HubStandin,
    download: Download,
    tmp_path: Path,
):
    spoil(hub)
    code, said = download(TINY)
    assert code == 1
    assert words in said
    assert whole_folders(tmp_path / "cache") == []


def test_a_published_name_with_other_weights_ends_with_1(hub: HubStandin, tmp_path: Path):
    hub.repositories["microsoft/Florence-2-base"] = Pinned(files())
    ran = run_script(hub, tmp_path / "cache", "Florence-2-base")
    assert ran.returncode == 1
    assert "other weights for Florence-2-base than the published ones" in ran.stdout
    assert hub.gets(WEIGHTS) == []


def test_one_failure_of_several_fails_all_and_only_it_is_named(
    hub: HubStandin, download: Download, tmp_path: Path
):
    code, said = download(f"{OTHER} {TINY}")
    assert code == 1
    assert f"Not in the image: {OTHER}." in said
    assert len(whole_folders(tmp_path / "cache")) == 1


@pytest.mark.parametrize("arguments", [(), ("",)], ids=["nothing", "an empty build argument"])
def test_no_names_stand_for_the_four_published_checkpoints(
    arguments: tuple[str, ...], download: Download
):
    code, said = download(*arguments)
    assert code == 1
    assert f"Not in the image: {', '.join(KNOWN_BY_NAME)}." in said


def test_a_checkpoint_damaged_in_the_cache_is_fetched_again(
    hub: HubStandin, download: Download, tmp_path: Path
):
    download(TINY)
    (folder,) = whole_folders(tmp_path / "cache")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert download(TINY)[0] == 0
    assert (folder / WEIGHTS).read_bytes() == content

"""The Dockerfiles, what is sent to them, and the compose file."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from packaging_files import (
    COMPOSE,
    DOCKERFILE,
    DOCKERFILE_DEPLOY,
    ROOT,
    SCRIPTS,
    environment,
    instructions,
    schema_errors,
    text_of,
    yaml_of,
)

DOCKERFILES = [DOCKERFILE, DOCKERFILE_DEPLOY]

BAD_DOCKERFILES = {
    "no tag": "FROM python\n",
    "the newest tag": "FROM python:latest\n",
    "a package without a version": "FROM python:3.11.14\nRUN pip install --no-cache-dir torch\n",
    "apt's lists left behind": (
        "FROM debian:12\nRUN apt-get update && apt-get install -y --no-install-recommends git=1:2\n"
    ),
    "a shell command that cannot be parsed": "FROM debian:12\nRUN if true; then ls\n",
}


@contextmanager
def answering(status: int) -> Iterator[str]:
    """The address of a server that gives every request this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPTS / "hadolint"), "--no-color", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_linter_finds_nothing(path: Path):
    assert hadolint(path).stdout == ""


@pytest.mark.parametrize("content", BAD_DOCKERFILES.values(), ids=BAD_DOCKERFILES.keys())
def test_the_linter_would_find(content: str, tmp_path: Path):
    (tmp_path / "Dockerfile").write_text(content, encoding="utf-8")
    assert hadolint(tmp_path / "Dockerfile").returncode == 1


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_failure_of_a_build_is_swallowed(path: Path):
    assert "|| true" not in text_of(path)
    assert "|| :" not in text_of(path)


def test_the_label_that_the_image_workflow_looks_for_is_the_last_line():
    last = text_of(DOCKERFILE).rstrip("\n").splitlines()[-1]
    assert last.startswith('LABEL python_sdk_version="')


def test_weights_are_downloaded_where_the_app_looks_for_them():
    stage = text_of(DOCKERFILE).split("FROM ")
    cache = "FLORENCE2_CACHE=/opt/florence2/checkpoints"
    assert cache in stage[2], "the stage that downloads"
    assert cache in stage[3], "the image itself"
    assert "COPY --from=weights /opt/florence2/checkpoints /opt/florence2/checkpoints" in stage[3]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_is_sent_to_the_build(path: Path):
    sent = {line[1:] for line in text_of(ROOT / ".dockerignore").splitlines() if line[:1] == "!"}
    copied = [words.split()[0] for keyword, words in instructions(path) if keyword == "COPY"]
    named = [source for source in copied if not source.startswith(("--from", "."))]
    assert all((ROOT / source).exists() for source in [*named, *sent])
    assert set(named) <= sent


CUDA_BUILDS = {"13.0": 0, "12.8": 1, None: 1}


@pytest.mark.parametrize(("build", "exit_code"), CUDA_BUILDS.items(), ids=str)
def test_the_image_build_stops_where_torch_has_another_cuda(
    build: str | None, exit_code: int, tmp_path: Path
):
    guards = [words for keyword, words in instructions(DOCKERFILE) if "torch.version" in words]
    (version,) = [
        words.removeprefix("CUDA_VERSION=")
        for keyword, words in instructions(DOCKERFILE)
        if keyword == "ARG" and words.startswith("CUDA_VERSION=")
    ]
    (tmp_path / "torch.py").write_text(f"class version:\n    cuda = {build!r}\n", encoding="utf-8")
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    env = {"PATH": path, "PYTHONPATH": str(tmp_path), "CUDA_VERSION": version}
    ran = subprocess.run(["sh", "-c", *guards], env=env, capture_output=True, text=True, timeout=60)
    assert ran.returncode == exit_code
    if exit_code:
        assert ran.stderr == f"torch is built for CUDA {build}, not {version}\n"


def test_the_image_asks_the_nvidia_runtime_for_every_gpu_and_what_torch_and_ffmpeg_need():
    variables = environment(DOCKERFILE)
    assert variables["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert variables["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility,video"


def test_pip_is_cut_off_from_its_index_only_once_all_is_installed():
    before, _, last = text_of(DOCKERFILE).rpartition("\nFROM ")
    assert "PIP_NO_INDEX" not in before
    assert environment(DOCKERFILE)["PIP_NO_INDEX"] == "1"
    for path, text in ((DOCKERFILE, last), (DOCKERFILE_DEPLOY, text_of(DOCKERFILE_DEPLOY))):
        assert "RUN pip" not in text, path


def rehearsed(script: Path) -> subprocess.CompletedProcess[str]:
    command = [str(script), "--pip-only", sys.prefix]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_agents_two_pip_commands_change_nothing_and_find_all_installed():
    ran = rehearsed(ROOT / "docker" / "rehearse_start.sh")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.findall(r"exit status (\d)", ran.stdout) == ["1", "0", "0"]
    assert "No matching distribution found for setuptools==69.0.0" in ran.stdout


SPOILT = {
    "pip may reach an index": ("PIP_NO_INDEX=1", "PIP_NO_INDEX=0", "reach for an index"),
    "no folder for pip's cache": ("RUN mkdir -p /root/.cache/pip", "", "no cache folder"),
}


@pytest.mark.parametrize(("good", "bad", "reason"), SPOILT.values(), ids=SPOILT.keys())
def test_the_rehearsal_refuses_before_it_runs_pip(good: str, bad: str, reason: str, tmp_path: Path):
    (tmp_path / "docker").mkdir()
    script = tmp_path / "docker" / "rehearse_start.sh"
    shutil.copy(ROOT / "docker" / "rehearse_start.sh", script)
    (tmp_path / "docker" / "Dockerfile").write_text(
        text_of(DOCKERFILE).replace(good, bad), encoding="utf-8"
    )
    ran = rehearsed(script)
    assert ran.returncode == 1
    assert reason in ran.stderr
    assert "pip3" not in ran.stdout


def test_the_deployable_image_sets_the_variable_that_the_app_reads_its_address_from():
    assert environment(DOCKERFILE_DEPLOY)["FLORENCE_HOST"] == "0.0.0.0"
    assert '"FLORENCE_HOST"' in text_of(ROOT / "serve" / "app.py")


def test_the_deployable_image_is_healthy_while_the_app_says_so():
    checks = [
        words for keyword, words in instructions(DOCKERFILE_DEPLOY) if keyword == "HEALTHCHECK"
    ]
    program = json.loads(checks[0].partition("CMD ")[2])[2]
    for status, exit_code in ((200, 0), (503, 1)):
        with answering(status) as address:
            local = program.replace("http://127.0.0.1:8000", address)
            assert local != program
            ran = subprocess.run([sys.executable, "-c", local], capture_output=True, timeout=60)
        assert ran.returncode == exit_code


def test_compose_serves_on_this_machine_only():
    assert yaml_of(COMPOSE)["services"]["florence-2"]["ports"] == ["127.0.0.1:8000:8000"]


def test_the_compose_file_follows_the_compose_specification():
    assert schema_errors("compose-spec", COMPOSE) == ""


def test_the_image_has_the_packages_for_videos():
    extras = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    steps = [arguments for keyword, arguments in instructions(DOCKERFILE) if keyword == "RUN"]
    assert any(all(package in step.split() for package in extras["video"]) for step in steps)

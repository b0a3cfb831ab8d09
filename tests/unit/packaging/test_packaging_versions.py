"""Versions that are written in several places agree."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging_files import (
    COMPOSE,
    DOCKERFILE,
    DOCKERFILE_DEPLOY,
    ROOT,
    instructions,
    manifest,
    pinned,
    text_of,
    yaml_of,
)

from serve.version import VERSION

DEPLOYING = ROOT / "docs" / "deploying.md"
IMAGE = manifest()["docker_image"]


def project() -> dict[str, object]:
    return tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]


def test_the_image_has_the_projects_version():
    assert IMAGE.partition(":")[2] == VERSION


def test_the_deployable_image_is_built_from_the_platforms():
    assert instructions(DOCKERFILE_DEPLOY)[0] == ("FROM", IMAGE)


def test_compose_runs_the_deployable_image():
    assert yaml_of(COMPOSE)["services"]["florence-2"]["image"] == f"{IMAGE}-deploy"


@pytest.mark.parametrize(
    "path", [DOCKERFILE, DOCKERFILE_DEPLOY, COMPOSE, DEPLOYING], ids=lambda path: path.name
)
def test_no_file_names_another_tag_of_the_image(path):
    tags = re.findall(r"supervisely/florence-2:[\w.-]+", text_of(path))
    assert tags
    assert {tag.removesuffix("-deploy") for tag in tags} == {IMAGE}


def test_the_label_is_the_pinned_sdk():
    assert instructions(DOCKERFILE)[-1] == (
        "LABEL",
        f'python_sdk_version="{pinned("supervisely")}"',
    )


def test_the_manifest_names_the_cuda_that_the_image_checks_for():
    assert ("ARG", f"CUDA_VERSION={manifest()['cuda_version']}") in instructions(DOCKERFILE)


def test_the_image_runs_a_python_that_the_project_allows():
    base = instructions(DOCKERFILE)[0][1]
    minor = re.match(r"python:(\d+\.\d+)\.\d+-slim", base)
    assert minor, base
    assert project()["requires-python"] == f">={minor[1]}"


def test_the_guide_names_the_versions_as_they_are():
    stated = dict(re.findall(r"^\| ([^|]+) \| `([^`]+)`", text_of(DEPLOYING), re.MULTILINE))
    assert stated == {
        "image": IMAGE,
        "Supervisely SDK": pinned("supervisely"),
        "Supervisely instance": manifest()["instance_version"],
        "torch": pinned("torch"),
        "CUDA in the image": str(manifest()["cuda_version"]),
    }

"""Workflows: their form, and what they hand to the ecosystem's reusable ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from packaging_files import ROOT, WORKFLOWS, manifest, schema_errors, yaml_of

REUSABLE = "supervisely-ecosystem/workflows/.github/workflows/"
# Inputs of the reusable workflows at commit 09ca757 of their repository: (required, optional).
INPUTS = {
    "build_image.yml": (
        {"tag_version", "dockerfile_path"},
        {"image_name", "sdk_version", "latest_tag"},
    ),
    "common.yml": (
        {"SLUG", "RELEASE_VERSION", "RELEASE_DESCRIPTION", "SUBAPP_PATHS", "RELEASE_TYPE"},
        {"SUPERVISELY_SERVER_ADDRESS", "SUPERVISELY_PROD_SERVER_ADDRESS"},
    ),
}
SECRETS = {
    "build_image.yml": {"DOCKERHUB_USERNAME", "DOCKERHUB_TOKEN"},
    "common.yml": {
        "SUPERVISELY_DEV_API_TOKEN",
        "SUPERVISELY_PRIVATE_DEV_API_TOKEN",
        "SUPERVISELY_PROD_API_TOKEN",
        "GH_ACCESS_TOKEN",
    },
}
RELEASE_TYPES = {
    "dev_branch_build.yml": "release-branch",
    "publish.yml": "publish",
    "release.yml": "release",
    "release_branch.yml": "release-branch",
}
CALLS = {
    f"{path.name}:{name}": job
    for path in WORKFLOWS
    for name, job in yaml_of(path)["jobs"].items()
    if "uses" in job
}


def job_of(file: str, job: str) -> dict[str, Any]:
    return CALLS[f"{file}:{job}"]


def test_there_is_every_workflow_the_ecosystem_runs_and_one_for_the_tests():
    names = {path.name for path in WORKFLOWS}
    assert names == {"build_image.yml", "tests.yml", *RELEASE_TYPES}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_follows_githubs_schema(path: Path):
    assert schema_errors("github-workflows", path) == ""


@pytest.mark.parametrize("job", CALLS.values(), ids=CALLS.keys())
def test_a_call_gives_what_the_reusable_workflow_takes_and_no_more(job: dict[str, Any]):
    file, _, branch = job["uses"].removeprefix(REUSABLE).partition("@")
    required, optional = INPUTS[file]
    assert branch == "master"
    assert required <= set(job["with"]) <= required | optional
    assert set(job["secrets"]) == SECRETS[file]


@pytest.mark.parametrize(("file", "kind"), RELEASE_TYPES.items(), ids=RELEASE_TYPES.keys())
def test_a_release_is_of_its_kind_and_of_the_app_at_the_root(file: str, kind: str):
    releases = [
        job["with"]
        for name, job in CALLS.items()
        if name.startswith(f"{file}:") and "common.yml" in job["uses"]
    ]
    assert [given["RELEASE_TYPE"] for given in releases] == [kind]
    assert [given["SUBAPP_PATHS"] for given in releases] == ["__ROOT_APP__"]


@pytest.mark.parametrize("file", ["build_image.yml", "dev_branch_build.yml"])
def test_an_image_is_built_under_the_manifests_name(file: str):
    given = job_of(file, "build-image")["with"]
    assert f"supervisely/{given['image_name']}" == manifest()["docker_image"].partition(":")[0]
    assert (ROOT / given["dockerfile_path"]).is_file()


def test_a_branch_is_released_only_after_its_image_is_built():
    assert job_of("dev_branch_build.yml", "release-branch")["needs"] == "build-image"


def test_the_tests_run_what_a_developer_runs():
    steps = yaml_of(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["tests"]["steps"]
    assert steps[-1] == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)

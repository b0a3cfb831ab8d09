"""The example of a run on Kubernetes: the fields of KubeRay 1.7.0, our version and options."""

from __future__ import annotations

import re
import shlex
import tomllib

import yaml
from packaging_files import ROOT

FIELDS = {
    (): {"apiVersion", "kind", "metadata", "spec"},
    ("spec",): {
        "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
        "rayClusterSpec",
    },
    ("spec", "rayClusterSpec"): {
        "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec",
        "workerGroupSpecs",
    },
    ("spec", "rayClusterSpec", "headGroupSpec"): {"rayStartParams", "template"},
    ("spec", "rayClusterSpec", "workerGroupSpecs", 0): {
        "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template",
    },
}  # fmt: skip


def example():
    return yaml.safe_load((ROOT / "docs" / "kuberay.yaml").read_text("utf-8"))


def test_it_has_the_fields_of_a_ray_job():
    for path, fields in FIELDS.items():
        found = example()
        for key in path:
            found = found[key]
        assert set(found) == fields
    assert (example()["apiVersion"], example()["kind"]) == ("ray.io/v1", "RayJob")


def test_every_container_is_of_one_image_and_no_statistics_leave():
    cluster = example()["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [one for group in groups for one in group["template"]["spec"]["containers"]]
    assert len({one["image"] for one in containers}) == 1
    for one in containers:
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in one["env"]
        assert one["resources"]["limits"] == one["resources"]["requests"]


def test_its_version_of_ray_is_the_one_that_the_extra_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extra = project["project"]["optional-dependencies"]["ray"]
    version = example()["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"ray[data]=={version}" in extra


def test_its_command_is_one_of_ours():
    import typer

    from serve.cli.main import app

    words = shlex.split(example()["spec"]["entrypoint"])
    label = typer.main.get_command(app).commands["label"]
    known = {name for option in label.params for name in option.opts}
    assert words[:2] == ["florence2", "label"]
    assert {word for word in words if re.match("--", word)} <= known

"""What the platform reads: config.json, and the models and options that the app's page offers."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import supervisely
from jsonschema import Draft202012Validator
from packaging.version import Version
from packaging_files import HERE, ROOT, manifest, pinned, text_of, yaml_of
from PIL import Image

from florence2.checkpoint.catalog import KNOWN_BY_NAME, KNOWN_CHECKPOINTS
from serve.sdk import sly

MODELS = ROOT / "serve" / "models.json"
ROWS: list[dict[str, Any]] = json.loads(text_of(MODELS))
TASK_TYPE = "prompt-based object detection"
SCHEMA = json.loads(text_of(HERE / "manifest_schema.json"))

Change = Callable[[dict[str, Any]], object]
WRONG: dict[str, Change] = {
    "another name, which other apps select by": lambda m: m.update(name="Florence-2"),
    "no entrypoint": lambda m: m.pop("entrypoint"),
    "a misspelt key": lambda m: m.update(sesion_tags=[]),
    "a GPU word the platform does not know": lambda m: m.update(gpu="optional"),
    "the image's newest tag": lambda m: m.update(docker_image="supervisely/florence-2:latest"),
    "a version as a number": lambda m: m.update(instance_version=6.18),
    "no tag that other apps find it by": lambda m: m["session_tags"].remove("deployed_florence_2"),
    "a category twice": lambda m: m["categories"].append("images"),
    "no icon": lambda m: m.pop("icon"),
    "a poster without an address": lambda m: m.update(poster="docs/images/poster.png"),
    "a driver without a required GPU": lambda m: m.update(min_nvidia_driver_version="580"),
}


def errors_of(value: dict[str, Any]) -> list[str]:
    return [error.message for error in Draft202012Validator(SCHEMA).iter_errors(value)]


def test_the_schema_itself_is_a_schema():
    Draft202012Validator.check_schema(SCHEMA)


def test_the_manifest_follows_its_schema():
    assert errors_of(manifest()) == []


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_the_schema_refuses(change: Change):
    wrong = manifest()
    change(wrong)
    assert errors_of(wrong)


def test_the_instance_version_is_the_one_the_sdk_pairs_with_its_version():
    sdk = Version(pinned("supervisely"))
    pairs = json.loads(text_of(Path(supervisely.__file__).parent / "versions.json"))
    able = [instance for instance, oldest_sdk in pairs.items() if Version(oldest_sdk) <= sdk]
    assert manifest()["instance_version"] == max(able, key=Version)


@pytest.mark.parametrize("kind", ["models", "inference_settings"])
def test_every_file_the_manifest_names_is_there(kind: str):
    assert (ROOT / manifest()["files"][kind]).is_file()


@pytest.mark.parametrize(("kind", "ratio"), [("icon", 1), ("poster", 2)])
def test_a_picture_is_addressed_where_a_release_has_it(kind: str, ratio: int):
    address = re.fullmatch(
        r"https://raw\.githubusercontent\.com/supervisely-ecosystem/serve-florence-2/master/(.+)",
        manifest()[kind],
    )
    path = ROOT / address[1]
    with Image.open(path) as picture:
        width, height = picture.size
        assert picture.format == "PNG"
    assert width == ratio * height >= 512
    assert path.stat().st_size < 150_000, "a page of apps loads many of them"


def test_the_entrypoint_names_a_module_of_the_app_and_the_manifests_port():
    words = shlex.split(manifest()["entrypoint"])
    module, _, attribute = words[3].partition(":")
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
    assert attribute == "model.app"
    assert words[words.index("--port") + 1] == str(manifest()["port"])


def test_the_entrypoint_finds_both_packages_in_a_clone_where_nothing_is_installed(tmp_path: Path):
    (tmp_path / "src" / "florence2").mkdir(parents=True)
    (tmp_path / "serve").mkdir()
    (tmp_path / "src" / "florence2" / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "serve" / "__init__.py").write_text("", encoding="utf-8")
    main = "import florence2\nraise SystemExit(f'{florence2.__file__}\\n{__file__}')\n"
    (tmp_path / "serve" / "main.py").write_text(main, encoding="utf-8")
    command = [sys.executable, *shlex.split(manifest()["entrypoint"])[1:]]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    found = [(tmp_path / line).resolve() for line in ran.stderr.splitlines()[-2:]]
    assert found == [
        (tmp_path / "src" / "florence2" / "__init__.py").resolve(),
        (tmp_path / "serve" / "main.py").resolve(),
    ], ran.stderr


def test_the_rows_are_the_published_checkpoints_in_their_order():
    assert [row["Model"] for row in ROWS] == [known.name for known in KNOWN_CHECKPOINTS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["Model"])
def test_a_row_names_one_checkpoint_everywhere_in_cells_of_text(row: dict[str, Any]):
    name = row["Model"]
    files = {"checkpoint": name}
    assert row["meta"] == {"task_type": TASK_TYPE, "model_name": name, "model_files": files}
    assert row["Hub repository"] == KNOWN_BY_NAME[name].repository
    # The first row makes the header, and the page compiles each cell as a template.
    assert list(row) == list(ROWS[0])
    cells = [value for column, value in row.items() if column != "meta"]
    assert all(isinstance(cell, str) and cell for cell in cells)


def test_the_sdk_reads_the_file():
    assert sly.nn.inference.Inference._load_models_json_file(None, str(MODELS)) == ROWS


def test_the_sdks_selector_shows_one_table_with_all_rows():
    from supervisely.app.widgets import PretrainedModelsSelector

    selected = PretrainedModelsSelector._filter_and_sort_models(None, copy.deepcopy(ROWS), False)
    assert selected == {TASK_TYPE: {"other": ROWS}}


def test_the_page_offers_the_published_checkpoints_and_the_teams_own():
    assert yaml_of(ROOT / "serve" / "app_options.yaml") == {
        "pretrained_models": "true",
        "custom_models": "true",
        "supported_runtimes": ["pytorch"],
    }

"""serve/models.json and serve/app_options.yaml: the table the app's page offers."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from packaging_files import ROOT, text_of, yaml_of

from florence2.checkpoint.catalog import KNOWN_BY_NAME, KNOWN_CHECKPOINTS
from serve.sdk import sly

MODELS = ROOT / "serve" / "models.json"
ROWS: list[dict[str, Any]] = json.loads(text_of(MODELS))
TASK_TYPE = "prompt-based object detection"


def test_the_rows_are_the_published_checkpoints_in_their_order():
    assert [row["Model"] for row in ROWS] == [known.name for known in KNOWN_CHECKPOINTS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["Model"])
def test_a_row_names_one_checkpoint_everywhere(row: dict[str, Any]):
    name = row["Model"]
    assert row["meta"] == {
        "task_type": TASK_TYPE,
        "model_name": name,
        "model_files": {"checkpoint": name},
    }
    assert row["Hub repository"] == KNOWN_BY_NAME[name].repository


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["Model"])
def test_every_row_has_the_columns_of_the_first_which_makes_the_header(row: dict[str, Any]):
    assert list(row) == list(ROWS[0])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["Model"])
def test_every_cell_is_text_because_the_page_compiles_it_as_a_template(row: dict[str, Any]):
    cells = [value for column, value in row.items() if column != "meta"]
    assert all(isinstance(cell, str) and cell for cell in cells)


def test_the_sdk_reads_the_file():
    assert sly.nn.inference.Inference._load_models_json_file(None, str(MODELS)) == ROWS


def test_the_sdks_selector_shows_one_table_with_all_rows():
    from supervisely.app.widgets import PretrainedModelsSelector

    selected = PretrainedModelsSelector._filter_and_sort_models(None, copy.deepcopy(ROWS), False)
    assert selected == {TASK_TYPE: {"other": ROWS}}


def test_the_page_offers_the_published_checkpoints_only():
    assert yaml_of(ROOT / "serve" / "app_options.yaml") == {
        "pretrained_models": "true",
        "custom_models": "false",
        "supported_runtimes": ["pytorch"],
    }
